"""A multi-token-prediction layer: a block with a plain residual and its own window (section 8)."""
from mindspore import nn, ops

from pangu_ms.device import replaceable
from pangu_ms.model.block import Block
from pangu_ms.model.linear import Linear, linear
from pangu_ms.model.norm import RMSNorm, rms_norm


@replaceable
def mtp_input(embedding, hidden, weights, step):
    """embedding and hidden [B, T, H], each normed, projected together, the embedding first -> [B, T, H]."""
    both = ops.cat((rms_norm(embedding, weights["embedding_norm"]), rms_norm(hidden, weights["hidden_norm"])), -1)
    return linear(both, weights["projection"])


class SharedHead(nn.Cell):
    """The norm before the trunk's lm_head. The head itself, stored once more in a Hugging Face file, is shared."""

    def __init__(self, plan):
        super().__init__()
        self.norm = RMSNorm(plan.hidden_size, plan)

    def construct(self, hidden):
        return self.norm(hidden)


class MTPLayer(Block):
    """embedding [B, T, H] of the tokens `depth` ahead, hidden [B, T, H] of the depth before -> hidden, normed, pieces.

    Row p keeps position p. The next depth reads hidden, un-normed [B, T, H]; the trunk's lm_head reads normed.
    """

    def __init__(self, layer, plan, ranks):
        super().__init__(layer, plan, ranks)
        hidden = plan.hidden_size
        self.enorm = RMSNorm(hidden, plan)
        self.hnorm = RMSNorm(hidden, plan)
        self.eh_proj = Linear(2 * hidden, hidden, plan)
        self.shared_head = SharedHead(plan)
        self.input_weights = {"embedding_norm": self.enorm.handle, "hidden_norm": self.hnorm.handle,
                              "projection": self.eh_proj.matrix}

    def construct(self, embedding, hidden, step, cache):
        hidden, pieces = self.layer(mtp_input(embedding, hidden, self.input_weights, step), step, cache)
        return hidden, self.shared_head(hidden), pieces
