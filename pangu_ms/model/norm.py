"""Root-mean-square norm."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.device import replaceable
from pangu_ms.model.linear import parameter


@replaceable
def rms_norm(x, norm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32. x [..., D], weight [D]."""
    wide = ops.cast(x, ms.float32)
    scale = ops.rsqrt(ops.mean(ops.square(wide), -1, keep_dims=True) + norm["eps"])
    return ops.cast(wide * scale * ops.cast(norm["weight"], ms.float32), x.dtype)


class RMSNorm(nn.Cell):
    """x [..., dim] -> [..., dim]."""

    def __init__(self, dim, plan):
        super().__init__()
        self.weight = parameter((dim,), plan, init="ones")
        self.handle = {"weight": self.weight, "eps": plan.rms_norm_eps}

    def construct(self, x):
        return rms_norm(x, self.handle)
