"""The parts of the loss, each a float32 scalar (section 11)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.ops import operator
from pangu_ms.ops.attention import with_sinks

QUERIES = 128  # of the indexer's loss at once
UNSEEN = -1e30  # finite, unlike the attention's mask: here it is multiplied by a probability of zero


def ahead(values, depth):
    """[B, T] -> row p holds the value of row p + depth; the last `depth` rows hold zero."""
    return ops.cat((values[:, depth:], ops.zeros_like(values[:, :depth])), 1)


def mtp_mask(loss_mask, position, depth):
    """float32 [B, T]: whether row p of an MTP depth has a label. It must lie in the same document and count itself."""
    same = ops.cast(ahead(position, depth) == position + depth, ms.float32)     # positions begin anew with a document
    return same * ahead(loss_mask, depth)


def real_rows(loss_mask, position):
    """float32 [B, T]: one on the rows of documents of which some row counts, zero on padding."""
    start = ops.arange(position.shape[1], dtype=ms.int32) - position            # of each row's document
    counted = ops.tensor_scatter_elements(ops.zeros_like(loss_mask), start, loss_mask, 1, "add")
    return ops.cast(ops.gather_elements(counted, 1, start) > 0, ms.float32)


class IndexerLoss(nn.Cell):
    """KL(where the main attention looks || softmax of the indexer's scores), summed over queries, for one DSA layer.

    The main attention is the target and gets no gradient, and neither do the indexer's inputs. Both are computed for
    QUERIES queries at a time, over the keys up to the last of them.
    """

    def __init__(self, attention, sparse):
        super().__init__(auto_prefix=False)
        self.attention, self.sparse = attention, sparse
        self.attended = operator("attended", attention.q_a_proj.weight.dtype)

    def construct(self, index, rows, weight):
        """index: what `Attention` hands out of a call without a cache; weight float32 [B, T], of each query."""
        _, selected, x, q_latent, q, keys = index
        x, q_latent = ops.stop_gradient(x), ops.stop_gradient(q_latent)
        sinks, kv_b = self.attention.sink_rows(), self.attention.kv_b_proj.weight
        index_keys = self.attention.indexer.keys(x, rows)
        length, total = x.shape[1], 0.0
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            visible = (selected if self.sparse else rows["causal"])[:, first:end, :end]
            mass = self.attended(q[:, first:end], sinks, keys[:, :end], with_sinks(visible, self.attention.sinks), kv_b,
                                 self.attention.scale)
            mass = self.attention.reduce(mass)                                  # of all heads
            target = ops.stop_gradient(mass / (ops.sum(mass, -1, keepdim=True) + 1e-20))
            angles = {"cos": rows["cos"][:, first:end], "sin": rows["sin"][:, first:end]}
            score = self.attention.indexer(x[:, first:end], q_latent[:, first:end], index_keys[:, :end], angles)
            total = total + ops.sum(_divergence(target, score, visible) * weight[:, first:end])
        return total


def _divergence(target, score, visible):
    """target, score float32 [B, T, S], visible bool -> KL(target || softmax(score where visible)) [B, T]."""
    score = ops.select(visible, score, ops.full_like(score, UNSEEN))
    log_share = score - ops.logsumexp(score, -1, True)
    return ops.sum(target * (ops.log(target + 1e-20) - log_share), -1)


def expert_load(ids, experts, real):
    """ids int32 [B, T, K], real [B, T] of `real_rows` -> tokens of each expert in each sequence, float32 [B, E]."""
    hit = ops.expand_dims(ids, -1) == ops.arange(experts, dtype=ms.int32)       # [B, T, K, E]
    return ops.sum(ops.cast(hit, ms.float32) * ops.reshape(real, real.shape + (1, 1)), (1, 2))


def balance_loss(load, logits, real):
    """load [B, E] of `expert_load`, logits [B, T, E], real [B, T]: how far the routing of each sequence is from even.

    1 for an even one, 0 for one of padding. Only the share of the scores has a gradient, the count of tokens none.
    """
    score = ops.sigmoid(logits)
    share = score / ops.sum(score, -1, keepdim=True) * ops.expand_dims(real, -1)
    share = ops.sum(share, 1) / ops.maximum(ops.sum(real, 1, keepdim=True), 1.0)                # [B, E]
    even = ops.maximum(ops.sum(load, -1, keepdim=True), 1.0) / load.shape[-1]
    return ops.mean(ops.sum(ops.stop_gradient(load / even) * share, -1))


def z_loss(logits, weight):
    """logits [B, T, E], weight [B, T] of each row: the square of their log-sum-exp, which keeps them small."""
    return ops.sum(ops.square(ops.logsumexp(logits, -1)) * weight)
