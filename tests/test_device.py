"""Which form of a formula a graph is given: by device, dtype, what is built, and the environment."""
import mindspore as ms
import pytest

from pangu_ms import device
from pangu_ms.model.elementary import softmax, top_k
from pangu_ms.model.linear import linear
from pangu_ms.model.norm import rms_norm
from pangu_ms.ops import ascend, cpu
from pangu_ms.ops.cpu import library


def chosen(formula, dtype=ms.float32):
    return device.replacement(formula.formula, dtype)


@pytest.fixture
def built(monkeypatch):
    """As if the library were there, or not."""
    return lambda yes: monkeypatch.setattr(library, "_library", lambda: "there" if yes else None)


def test_formulas_without_the_library(built):
    built(False)
    assert chosen(rms_norm) is rms_norm.formula


def test_compiled_forms_are_for_float32_alone(built):
    built(True)
    assert chosen(rms_norm) is cpu.rms_norm
    for dtype in (ms.float16, ms.bfloat16):
        assert chosen(rms_norm, dtype) is rms_norm.formula
    assert chosen(softmax) is softmax.formula, "the library has none"


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_ascend_has_its_own_forms(built, on_ascend, dtype):
    built(True)
    assert chosen(rms_norm, dtype) is ascend.rms_norm and chosen(top_k, dtype) is ascend.top_k
    assert chosen(linear, dtype) is linear.formula


def test_the_environment_turns_them_off(built, monkeypatch):
    built(True)
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    assert chosen(rms_norm) is rms_norm.formula


@pytest.mark.parametrize("forms", [ascend, cpu])
def test_every_form_replaces_a_formula_of_the_same_arguments(forms):
    """A misspelt name would replace nothing, in silence; other arguments would be seen only where the form is used."""
    formulas = {name: formula.formula for module in device.formula_modules()
                for name, formula in vars(module).items() if hasattr(formula, "formula")}
    for name in set(forms.__all__) - {"available", "gathers_no_rows"}:
        count = formulas[name].__code__.co_argcount
        assert getattr(forms, name).__code__.co_argcount == count, name
