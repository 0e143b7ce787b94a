"""Elementary functions, each in one place because devices differ in them."""
import mindspore as ms
from mindspore import ops

from pangu_ms.device import replaceable

MASKED = float("-inf")


@replaceable
def softmax(x):
    """Over the last axis. x float32.

    In float64 inside: MindSpore's float32 exp on the CPU is off by up to 5e-6 of its value, which the layers of a
    model add up to more than all other rounding together.
    """
    return ops.cast(ops.softmax(ops.cast(x, ms.float64), -1), ms.float32)


@replaceable
def sigmoid(x):
    """Elementwise, x float32; for gates and scores, in float64 inside for the same reason."""
    return ops.cast(ops.sigmoid(ops.cast(x, ms.float64)), ms.float32)


@replaceable
def masked_softmax(score, visible, scale):
    """Over the last axis of score [A, B, C, S] * scale, where visible, bool; its other axes as in score or 1."""
    return ops.cast(softmax(_masked(score, visible, scale)), score.dtype)


def largest_logits(score, visible, scale):
    """float32 [B]: the largest of score [A, B, C, S] * scale where visible, as `masked_softmax` sees it. No gradient."""
    return ops.stop_gradient(ops.ReduceMax()(_masked(score, visible, scale), (0, 2, 3)))


def _masked(score, visible, scale):
    wide = ops.cast(score, ms.float32) * scale
    return ops.select(ops.broadcast_to(visible, wide.shape), wide, ops.full_like(wide, MASKED))


@replaceable
def top_k(scores, k):
    """Positions int32 [..., k] of the k largest of scores [..., S], in any order; exact, ties broken either way."""
    return ops.TopK()(scores, k)[1]


@replaceable
def swiglu(gate, up):
    """silu(gate) * up, elementwise, computed in float32."""
    wide = ops.cast(gate, ms.float32)
    return ops.cast(wide * ops.sigmoid(wide) * ops.cast(up, ms.float32), gate.dtype)
