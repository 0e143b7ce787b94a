"""The dense feed-forward layer, also the shared expert of the MoE layers."""
from mindspore import nn

from pangu_ms.model.linear import Linear
from pangu_ms.ops import operator


class FeedForward(nn.Cell):
    """SwiGLU: x [..., H] -> down_proj(silu(gate_proj(x)) * up_proj(x)) [..., H].

    On several tensor parallel ranks the part that this rank's share of the width adds, which the caller sums.
    """

    def __init__(self, width, config, parallel):
        super().__init__()
        width = width // parallel.tensor
        self.gate_proj = Linear(config.hidden_size, width, config)
        self.up_proj = Linear(config.hidden_size, width, config)
        self.down_proj = Linear(width, config.hidden_size, config)
        self.feed_forward = operator("feed_forward", config.compute_dtype)

    def construct(self, x):
        return self.feed_forward(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
