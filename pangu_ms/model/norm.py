"""Root-mean-square norm."""
from mindspore import nn

from pangu_ms.model.linear import parameter
from pangu_ms.ops import operator


class RMSNorm(nn.Cell):
    """x [..., dim] -> x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    def __init__(self, dim, config, eps=None):
        super().__init__()
        self.eps = config.rms_norm_eps if eps is None else eps
        self.weight = parameter((dim,), config, init="ones")
        self.rms_norm = operator("rms_norm", config.compute_dtype)

    def construct(self, x):
        return self.rms_norm(x, self.weight, self.eps)
