"""Which form the table chooses: by device, dtype, what is built, and the environment."""
import mindspore as ms
import pytest

from pangu_ms import ops as operators
from pangu_ms.ops import ascend, compiled, portable


@pytest.fixture
def built(monkeypatch):
    """As if the library were there, or not."""
    return lambda yes: monkeypatch.setattr(compiled, "available", lambda: yes)


@pytest.mark.parametrize("dtype", ["float16", ms.float16, "bfloat16", "float32"])
def test_plain_forms_without_the_library(built, dtype):
    built(False)
    assert operators.operator("rms_norm", dtype) is portable.rms_norm


@pytest.mark.parametrize("dtype", ["float16", ms.float16, "bfloat16"])
def test_compiled_forms_are_for_float32_alone(built, dtype):
    built(True)
    assert operators.operator("rms_norm", dtype) is portable.rms_norm


@pytest.mark.parametrize("dtype", ["float32", ms.float32])
@pytest.mark.parametrize("name", ["rms_norm", "hyper_connection_read"])
def test_compiled_forms(built, monkeypatch, name, dtype):
    built(True)
    monkeypatch.setattr(compiled, "form", lambda function, plain: (function, plain))
    function, plain = operators.operator(name, dtype)
    assert function == {"rms_norm": "RmsNorm", "hyper_connection_read": "HyperConnectionRead"}[name]
    assert callable(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ascend_has_its_own_forms(built, on_ascend, dtype):
    built(True)
    assert operators.operator("rms_norm", dtype) is ascend.rms_norm
    assert operators.operator("top_k", dtype) is ascend.top_k
    assert operators.operator("linear", dtype) is portable.linear


def test_the_environment_turns_them_off(monkeypatch):
    monkeypatch.setattr(compiled, "_library", lambda: "there")
    assert compiled.available()
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    assert not compiled.available()


def test_every_name_has_a_plain_form(built):
    built(False)
    for name in (*operators._SMALL, *operators._COMPOSED):
        assert callable(operators.operator(name, "float32"))
    with pytest.raises(KeyError):
        operators.operator("no such operator", "float32")


@pytest.mark.parametrize("name, module", [
    ("expanded_attention", "ascend_attention"), ("selected_attention", "ascend_attention"),
    ("choose", "ascend_attention"), ("many_tokens", "ascend_experts"), ("cross_entropy", "cross_entropy"),
    ("absorbed_attention", "attention"), ("few_tokens", "experts")])
def test_composed_operators_on_ascend(built, on_ascend, name, module):
    built(True)
    assert operators.operator(name, "bfloat16").__module__ == f"pangu_ms.ops.{module}"
