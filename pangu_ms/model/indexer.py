"""DSA's lightning indexer: which `topk` rows a query of the main attention may see (section 6)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache.rings import append
from pangu_ms.device import replaceable
from pangu_ms.model.elementary import MASKED, top_k
from pangu_ms.model.linear import Linear, linear
from pangu_ms.model.norm import RMSNorm, rms_norm
from pangu_ms.model.rope import apply_rope
from pangu_ms.shaping import arange


def index_scores(q, keys, weight):
    """q [B, T, heads, D], keys [B, S, D], weight [B, T, heads] -> float32 [B, T, S], not masked."""
    b, s, d = keys.shape
    each = ops.BatchMatMul(transpose_b=True)(ops.reshape(q, (b, -1, d)), keys)  # [B, T * heads, S]
    each = ops.reshape(ops.relu(ops.cast(each, ms.float32)), (b, -1, weight.shape[2], s))
    return ops.squeeze(ops.matmul(ops.expand_dims(ops.cast(weight, ms.float32), 2), each), 2)


def index_rows(x, weights, step):
    """The indexer's keys of x [B, T, H], the layer's normed input -> [B, T, D], normed and rotated."""
    key = ops.expand_dims(rms_norm(linear(x, weights["key"]), weights["key_norm"]), 2)
    return ops.squeeze(apply_rope(key, step["rope"], 0), 2)         # unlike in the main heads, first


def index_query(x, q_latent, weights, step):
    """-> q [B, T, heads, D], rotated, and the heads' weights float32 [B, T, heads].

    q_latent [B, T, q_lora_rank], after convolution and norm. The scale has no effect on the ranking; the indexer's loss
    needs it.
    """
    weight = ops.cast(linear(x, weights["head_weights"]), ms.float32)           # [B, T, heads]
    heads = weight.shape[-1]
    q = ops.reshape(linear(q_latent, weights["query"]), (x.shape[0], -1, heads, weights["dim"]))
    return apply_rope(q, step["rope"], 0), weight * weights["scale"]


@replaceable
def append_index_rows(x, weights, kept, step):
    """`index_rows` of x are written to the cache's tensor kept [B * S, D] -> kept."""
    return append(kept, index_rows(x, weights, step), step["slots"])


@replaceable
def select_rows(x, q_latent, weights, kept, step):
    """`append_index_rows`, then the best rows for each query -> positions int32 [B, T, topk], and kept.

    What a query that has fewer earlier rows is given besides lies behind it, or below 0, for `sparse_attention` to
    leave out.
    """
    kept = append_index_rows(x, weights, kept, step)
    past = ops.reshape(kept, (x.shape[0], -1, kept.shape[1]))                   # [B, S, D]
    q, weight = index_query(x, q_latent, weights, step)
    return topk_indices(q, past, weight, step["position"], weights["topk"]), kept


@replaceable
def topk_indices(q, keys, weight, position, k):
    """The k rows up to each query's position int32 [B, T] that score best -> int32 [B, T, k].

    Arguments of `index_scores`.
    """
    scores = index_scores(q, keys, weight)
    behind = arange(keys.shape[1]) > ops.expand_dims(position, 2)
    return top_k(ops.masked_fill(scores, behind, MASKED), k)


def topk_mask(scores, causal, k):
    """bool [B, T, S]: the k best of each query's earlier rows, all of them while there are no more.

    scores float32 [B, T, S]; causal bool [B, T, S]: which rows are earlier ones.
    """
    if scores.shape[-1] <= k:
        return causal
    chosen = top_k(ops.stop_gradient(scores), k)                                # choosing has no gradient
    ones = ops.ones_like(chosen, dtype=scores.dtype)
    picked = ops.tensor_scatter_elements(ops.zeros_like(scores), chosen, ones, -1)
    return ops.logical_and(picked > 0, causal)


class Indexer(nn.Cell):
    """The indexer of one layer."""

    def __init__(self, indexer, attention, plan):
        super().__init__()
        dim = indexer.head_dim
        self.wq_b = Linear(attention.q_lora_rank, indexer.num_heads * dim, plan)
        self.wk = Linear(plan.hidden_size, dim, plan)
        self.k_norm = RMSNorm(dim, plan)
        self.weights_proj = Linear(plan.hidden_size, indexer.num_heads, plan)
        self.weights = {"query": self.wq_b.matrix, "key": self.wk.matrix, "key_norm": self.k_norm.handle,
                        "head_weights": self.weights_proj.matrix, "dim": dim, "topk": indexer.topk,
                        "scale": indexer.num_heads ** -0.5 * dim ** -0.5}

    def construct(self, x, q_latent, step):
        """Scores of x's rows for x's queries, without a cache -> float32 [B, T, T], not masked."""
        return self.scores(x, q_latent, self.rows(x, step), step)

    def scores(self, x, q_latent, keys, step):
        """Of keys [B, S, D] that `rows` gave -> float32 [B, T, S], not masked."""
        q, weight = index_query(x, q_latent, self.weights, step)
        return index_scores(q, keys, weight)

    def rows(self, x, step):
        return index_rows(x, self.weights, step)
