"""Rotary position embedding: angles from positions (section 5 of the model description)."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.ops import operator

STRIDE = 1024


class RotaryAngles(nn.Cell):
    """position int32 [B, T] -> cos and sin, float32 [B, T, 1, qk_rope_head_dim / 2], exact to float32 at any position.

    A float32 product of position and frequency is off by 0.03 radians at 500,000 tokens. So a position is split into a
    multiple of STRIDE and a rest, whose cosines and sines come from two tables made in float64, and are joined by
    the addition theorem.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.qk_rope_head_dim
        frequency = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        # One multiple more than there are positions: drafts may be computed past the last one, and are not used.
        self.coarse = _table(np.arange(-(-config.max_position_embeddings // STRIDE) + 1) * STRIDE, frequency)
        self.fine = _table(np.arange(STRIDE), frequency)
        self.angles = operator("rotary_angles", ms.float32)

    def construct(self, position):
        cos, sin = self.angles(position, self.coarse, self.fine)
        return ops.stop_gradient(cos), ops.stop_gradient(sin)


def _table(positions, frequency):
    """float32 [P, D]: cosines, then sines."""
    angle = positions[:, None] * frequency
    return ms.Tensor(np.concatenate((np.cos(angle), np.sin(angle)), 1).astype(np.float32))
