"""Rotary position embedding: angles from positions, and the rotation (section 5)."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.device import replaceable

STRIDE = 1024


@replaceable
def apply_rope(x, rope, start):
    """Rotate the dimensions start .. start + 2h - 1 in pairs; all keep their places, the others their values.

    Dimension start + i is paired with start + i + h, interleaved start + 2i with start + 2i + 1. x [B, T, heads, D];
    rope: cos and sin [B, T, 1, h], float32, and whether pairs are interleaved.
    """
    wide, cos, sin = ops.cast(x, ms.float32), rope["cos"], rope["sin"]
    half = cos.shape[-1]
    end = start + 2 * half
    if rope["interleaved"]:
        first, second = wide[..., start:end:2], wide[..., start + 1:end:2]
    else:
        first, second = wide[..., start:start + half], wide[..., start + half:end]
    parts = (first * cos - second * sin, second * cos + first * sin)
    if rope["interleaved"]:
        parts = (ops.reshape(ops.stack(parts, -1), (x.shape[0], -1, x.shape[2], 2 * half)),)
    if start > 0:
        parts = (wide[..., :start],) + parts
    if end < x.shape[-1]:
        parts = parts + (wide[..., end:],)
    return ops.cast(ops.cat(parts, -1), x.dtype)


@replaceable
def rotary_angles(coarse, fine, position):
    """position int32 [B, T] -> cos and sin [B, T, 1, h], by the addition theorem; see `RotaryAngles`.

    coarse [.., 2h] and fine [S, 2h]: cosines, then sines, of the multiples of S and of 0 .. S - 1.
    """
    position = ops.expand_dims(ops.maximum(position, 0), 2)                     # rows before the text mean nothing
    stride, half = fine.shape[0], fine.shape[1] // 2
    coarse, fine = ops.gather(coarse, position // stride, 0), ops.gather(fine, position % stride, 0)
    (cos_a, sin_a), (cos_b, sin_b) = ops.split(coarse, half, -1), ops.split(fine, half, -1)
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


class RotaryAngles(nn.Cell):
    """position int32 [B, T] -> cos and sin, float32 [B, T, 1, rope_dim / 2], exact to float32 at any position.

    A float32 product of position and frequency is off by 0.03 radians at 500,000 tokens. So a position is split into a
    multiple of STRIDE and a rest, whose cosines and sines come from two tables made in float64, and are joined by
    the addition theorem.
    """

    def __init__(self, plan):
        super().__init__()
        frequency = plan.rope_theta ** (-np.arange(0, plan.rope_dim, 2, dtype=np.float64) / plan.rope_dim)
        # One multiple more than there are positions: drafts may be computed past the last one, and are not used.
        self.coarse = _table(np.arange(-(-plan.max_positions // STRIDE) + 1) * STRIDE, frequency)
        self.fine = _table(np.arange(STRIDE), frequency)

    def construct(self, position):
        cos, sin = rotary_angles(self.coarse, self.fine, position)
        return ops.stop_gradient(cos), ops.stop_gradient(sin)


def _table(positions, frequency):
    """float32 [P, D]: cosines, then sines."""
    angle = positions[:, None] * frequency
    return ms.Tensor(np.concatenate((np.cos(angle), np.sin(angle)), 1).astype(np.float32))
