"""The dense feed-forward layer, also the shared expert of the MoE layers."""
from mindspore import nn

from pangu_ms.device import replaceable
from pangu_ms.model.elementary import swiglu
from pangu_ms.model.linear import Linear, linear


@replaceable
def feed_forward(x, matrices):
    """x [..., H] -> down(silu(gate(x)) * up(x)) [..., H]. matrices: gate and up [F, H], down [H, F]."""
    return linear(swiglu(linear(x, matrices["gate"]), linear(x, matrices["up"])), matrices["down"])


class FeedForward(nn.Cell):
    """SwiGLU: x [..., H] -> [..., H].

    On several tensor parallel ranks the part that this rank's share of the width adds, which the caller sums.
    """

    def __init__(self, width, plan, ranks):
        super().__init__()
        width = width // ranks.tensor
        self.gate_proj = Linear(plan.hidden_size, width, plan)
        self.up_proj = Linear(plan.hidden_size, width, plan)
        self.down_proj = Linear(width, plan.hidden_size, plan)
        self.matrices = {"gate": self.gate_proj.matrix, "up": self.up_proj.matrix, "down": self.down_proj.matrix}

    def construct(self, x):
        return feed_forward(x, self.matrices)
