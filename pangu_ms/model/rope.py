"""Rotary position embedding: angles from positions (section 5 of the model description)."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops


class RotaryAngles(nn.Cell):
    """position int32 [B, T] -> cos and sin, float32 [B, T, qk_rope_head_dim / 2]."""

    def __init__(self, config):
        super().__init__()
        dim = config.qk_rope_head_dim
        self.frequency = ms.Tensor((config.rope_theta ** (-np.arange(0, dim, 2) / dim)).astype(np.float32))

    def construct(self, position):
        angle = ops.cast(ops.expand_dims(position, -1), ms.float32) * self.frequency
        return ops.cos(angle), ops.sin(angle)
