"""Compiled gradients beyond one operator at a time: the whole model against the plain forms, and the same bits always.

Run as a script it prints a digest of operators' gradients: `python tests/ops/test_gradients.py`.
"""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM, device
from pangu_ms.architectures import read_config
from pangu_ms.model.trace import MTPForward
from pangu_ms.ops.cpu import library
from pangu_ms.training.initial_values import initialize
from tests.ops import flat

device.start()

if not library.available(ms.float32):
    pytest.skip("the compiled operators are not built here (python setup.py build_ext --inplace) or turned off",
                allow_module_level=True)


class Loss(ms.nn.Cell):
    """A weighted sum of the logits of the trunk and of every MTP depth."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model, self.mtp = model, MTPForward(model)

    def construct(self, ids, given):
        total = ms.ops.sum(self.model.construct(ids) * given)
        for logits in self.mtp(ids):
            total = total + ms.ops.sum(logits * given[:, :logits.shape[1]])
        return total


@pytest.mark.slow
@pytest.mark.parametrize("member", ["openpangu_v2", "ultra_moe"])
def test_whole_model(small, data, monkeypatch, member):
    config = small() if member == "openpangu_v2" else read_config(data / member).cut(1, 1, mtp=True)
    rng = np.random.default_rng(0)
    ids = ms.Tensor(rng.integers(0, config.vocab_size, (2, 24)).astype(np.int32))
    given = ms.Tensor(rng.normal(size=(2, 24, config.vocab_size)).astype(np.float32))
    found = gradients(config, ids, given)
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    wanted = gradients(config, ids, given)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # An alpha is one number for a branch: its gradient sums over all tokens and gates, and most of that cancels.
        tolerance = 1e-3 if "branch_alpha" in name else 1e-4
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=tolerance * np.abs(gradient).max(), err_msg=name)


def gradients(config, ids, given):
    """By name, at weights of which none is zero or the like of another."""
    model, draw = PanguForCausalLM(config), np.random.default_rng(1)
    initialize(model, 0)
    for parameter in model.get_parameters():
        parameter.set_data(parameter + ms.Tensor(draw.normal(size=parameter.shape) * 0.2, ms.float32))
    parameters = ms.ParameterTuple(model.trainable_params())
    found = ms.ops.GradOperation(get_by_list=True)(Loss(model), parameters)(ids, given)
    return {parameter.name: gradient.asnumpy() for parameter, gradient in zip(parameters, found, strict=True)}


@pytest.mark.slow
def test_same_bits_with_one_thread():
    """Nor do threads that share the work differently change them from run to run."""
    cells = gradient_cells()
    here = [digest(cells) for _ in range(2)]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    one = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True,
                         preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))
    assert here[0] == here[1] == one.stdout.split()[-1]


class Gradient(ms.nn.Cell):
    def __init__(self, form):
        super().__init__()
        self.form, self.gradient = form, ms.ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, arguments, given):
        return self.gradient(self.form)(*arguments, given)


class Form(ms.nn.Cell):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def construct(self, *arguments):
        return self.form(*arguments)


def gradient_cells():
    """Of the operators of which some gradient is a sum over tokens."""
    return {name: Gradient(Form(getattr(flat, name))) for name in
            ("mhc_pre", "experts_grouped", "feed_forward", "expanded_attention", "rms_norm", "short_conv")}


def digest(cells):
    """Of the bits of their gradients."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return ms.Tensor(rng.normal(size=shape).astype(np.float32))

    b, t, n, h, gates = 2, 150, 4, 48, 24
    ids = ms.Tensor(rng.uniform(size=(b, t, 5)).argsort(-1)[..., :2].astype(np.int32))
    seen = ms.Tensor(np.tile(np.tril(np.ones((t, 3 + t), bool), 3)[None, :, None], (b, 1, 1, 1)))
    cases = {
        "mhc_pre": ((normal(b, t, n, h), normal(n * h), normal(gates, n * h), normal(3), normal(gates),
                                   1e-6, 20), (normal(b, t, h), normal(b, t, n, 1), normal(b, t, n, n))),
        "experts_grouped": ((normal(b, t, h), ids, normal(b, t, 2), normal(5, 40, h), normal(5, 40, h),
                             normal(5, h, 40)), normal(b, t, h)),
        "feed_forward": ((normal(b, t, h), normal(40, h), normal(40, h), normal(h, 40)), normal(b, t, h)),
        "expanded_attention": ((normal(b, t, 2, 24), normal(3, 28), normal(b, t, 28), seen, normal(2 * 36, 20), 0.2),
                               normal(b, t, 40)),
        "rms_norm": ((normal(b, t, h), normal(h), 1e-5), normal(b, t, h)),
        "short_conv": ((normal(b, t, h), normal(b, 2, h), normal(h, 1, 3), ms.Tensor(np.ones((b, t, 1), bool))),
                       normal(b, t, h)),
    }
    bits = hashlib.sha256()
    for name, (arguments, given) in cases.items():
        for gradient in cells[name](arguments, given):
            bits.update(gradient.asnumpy().tobytes())
    return bits.hexdigest()


if __name__ == "__main__":
    print(digest(gradient_cells()))
