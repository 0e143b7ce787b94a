"""The indexer's loss: it learns to look where the main attention looks (section 11)."""
from mindspore import nn, ops

from pangu_ms.model.latent_attention import attention_mass, sink_rows
from pangu_ms.model.sinks import with_sinks

QUERIES = 128  # of the loss at once
UNSEEN = -1e30  # finite, unlike the attention's mask: here it is multiplied by a probability of zero


class IndexerLoss(nn.Cell):
    """KL(where the main attention looks || softmax of the indexer's scores), summed over queries, for one DSA layer.

    The main attention is the target and gets no gradient, and neither do the indexer's inputs. Both are computed for
    QUERIES queries at a time, over the keys up to the last of them.

    Args:
        attention: the layer's `LatentAttention`.
        sparse: among the rows that the indexer selects, not among all.
    """

    def __init__(self, attention, sparse):
        super().__init__(auto_prefix=False)
        self.attention, self.sparse = attention, sparse
        self.output, self.sinks = attention.output_weights, attention.sink_weights

    def construct(self, index, step, weight):
        """index: what the layer says of its indexer without a cache; weight float32 [B, T], of each query."""
        x, q_latent = ops.stop_gradient(index["x"]), ops.stop_gradient(index["q_latent"])
        heads, batch, length = self.output["heads"], x.shape[0], x.shape[1]
        q = ops.reshape(index["q"], (batch, length, heads, -1))
        sinks, indexer, total = sink_rows(self.sinks), self.attention.indexer, 0.0
        index_keys = indexer.rows(x, step)
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            visible = (index["selected"] if self.sparse else step["causal"])[:, first:end, :end]
            mass = attention_mass(q[:, first:end], sinks, index["rows"][:, :end], with_sinks(visible, sinks.shape[0]),
                                  self.output["kv_b"], self.output["scale"])
            mass = self.attention.reduce(mass)                                  # of all heads
            target = ops.stop_gradient(mass / (ops.sum(mass, -1, keepdim=True) + 1e-20))
            rope = {"cos": step["rope"]["cos"][:, first:end], "sin": step["rope"]["sin"][:, first:end],
                    "interleaved": step["rope"]["interleaved"]}
            score = indexer.scores(x[:, first:end], q_latent[:, first:end], index_keys[:, :end], {"rope": rope})
            total = total + ops.sum(_divergence(target, score, visible) * weight[:, first:end])
        return total


def _divergence(target, score, visible):
    """target, score float32 [B, T, S], visible bool -> KL(target || softmax(score where visible)) [B, T]."""
    score = ops.select(visible, score, ops.full_like(score, UNSEEN))
    log_share = score - ops.logsumexp(score, -1, True)
    return ops.sum(target * (ops.log(target + 1e-20) - log_share), -1)
