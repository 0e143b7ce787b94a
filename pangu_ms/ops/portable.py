"""The operators that differ by device, in plain MindSpore: the form that the tests prove right.

Each computes in float32 whatever its inputs and gives its result in the dtype of its first argument, except
`top_k`. All are differentiable, except in integer arguments.
"""
import mindspore as ms
from mindspore import ops


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., D], weight [D]."""
    wide = ops.cast(x, ms.float32)
    scale = ops.rsqrt(ops.mean(ops.square(wide), -1, keep_dims=True) + eps)
    return ops.cast(wide * scale * ops.cast(weight, ms.float32), x.dtype)


def swiglu(gate, up):
    """silu(gate) * up, elementwise."""
    wide = ops.cast(gate, ms.float32)
    return ops.cast(wide * ops.sigmoid(wide) * ops.cast(up, ms.float32), gate.dtype)


def softmax(x):
    """Over the last axis. x float32.

    In float64 inside: MindSpore's float32 exp on the CPU is off by up to 5e-6 of its value, which the layers of a
    model add up to more than all other rounding together.
    """
    return ops.cast(ops.softmax(ops.cast(x, ms.float64), -1), ms.float32)


def sigmoid(x):
    """Elementwise, x float32; for gates and scores, in float64 inside for the same reason."""
    return ops.cast(ops.sigmoid(ops.cast(x, ms.float64)), ms.float32)


def rotate(x, cos, sin):
    """Half-split rotary embedding: dimension i is paired with i + D/2. x [..., D], cos and sin [..., D/2], float32."""
    first, second = ops.split(ops.cast(x, ms.float32), x.shape[-1] // 2, -1)
    return ops.cast(ops.cat((first * cos - second * sin, second * cos + first * sin), -1), x.dtype)


def top_k(scores, k):
    """Positions int32 [..., k] of the k largest of scores [..., S], in any order; exact, ties broken either way."""
    return ops.topk(scores, k)[1]
