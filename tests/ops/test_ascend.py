"""The Ascend forms, as far as a host without CANN goes: types and shapes are inferred, then no kernel is found."""
import mindspore as ms
import numpy as np
import pytest

import pangu_ms.model  # noqa: F401  graph mode
from pangu_ms.ops import ascend, portable


class Call(ms.nn.Cell):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, *arguments):
        return self.function(*arguments)


def rms_norm(x, weight):
    return ascend.rms_norm(x, weight, 1e-5)


def tensor(*shape):
    return ms.Tensor(np.random.default_rng(0).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("function, arguments, primitive", [
    (rms_norm, (tensor(2, 3, 8), tensor(8)), "RmsNorm"),
    (ascend.swiglu, (tensor(4, 6), tensor(4, 6)), "Swiglu")])
@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.float32])
def test_inference_passes_and_only_the_kernel_is_missing(function, arguments, primitive, dtype):
    with pytest.raises(RuntimeError, match=rf"Unsupported op \[{primitive}\] on CPU"):
        Call(function)(*(argument.astype(dtype) for argument in arguments))


@pytest.mark.parametrize("function, arguments", [
    (rms_norm, (tensor(2, 3, 8), tensor(7))),
    (ascend.swiglu, (tensor(4, 6), tensor(5, 6)))])
def test_a_wrong_shape_is_seen_by_inference(function, arguments):
    """Otherwise the test above would show nothing."""
    with pytest.raises(Exception) as error:
        Call(function)(*arguments)
    assert "Unsupported op" not in str(error.value)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_forms_without_a_fused_operator_run_here(name):
    x = tensor(5, 9)
    found, wanted = (Call(getattr(forms, name))(x).asnumpy() for forms in (ascend, portable))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
