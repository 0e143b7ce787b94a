"""Grouped-query attention: each key-value head serves a group of query heads (section 2 of the family).

Query head n reads key-value head n // (N / G) of N query heads and G key-value heads. The cache keeps rotated keys and
values, G heads of D numbers each to a row.
"""
from mindspore import nn, ops

from pangu_ms.cache.rings import append
from pangu_ms.device import replaceable
from pangu_ms.model.elementary import masked_softmax
from pangu_ms.model.linear import Linear, add_bias, linear, without_bias
from pangu_ms.model.rope import apply_rope
from pangu_ms.parallel import collectives

# ---------------------------------------------------------------- the steps of a layer

@replaceable
def grouped_query(x, weights, step):
    """x [B, T, H] -> rotated queries [B, T, N, D]. weights: query, a matrix; width, D."""
    return apply_rope(_heads(linear(x, weights["query"]), weights), step["cos"], step["sin"], 0)


@replaceable
def grouped_keys_values(x, weights, cache, step):
    """The keys, rotated, and values of x [B, T, H] go to the cache -> what a query may see, [B, S, G, D] each.

    cache: keys and values, growing tensors [B * S, G * D], updated in place; or None: S is T, the rows themselves.
    weights: key and value, matrices; width, D.
    """
    keys = apply_rope(_heads(linear(x, weights["key"]), weights), step["cos"], step["sin"], 0)      # [B, T, G, D]
    values = linear(x, weights["value"])                                        # [B, T, G * D]
    if cache is not None:
        keys = append(cache["keys"], ops.reshape(keys, values.shape), step["slots"])
        values = append(cache["values"], values, step["slots"])
    shape = (x.shape[0], -1, values.shape[-1] // weights["width"], weights["width"])
    return ops.reshape(keys, shape), ops.reshape(values, shape)


@replaceable
def grouped_attention(q, keys, values, visible, scale):
    """q [B, T, N, D], keys and values [B, S, G, D], visible bool [B, T, 1, S] -> [B, T, N * D].

    The queries of a group stand one behind the other and meet their keys in one product.
    """
    batch, _, heads, width = q.shape
    rows, groups = keys.shape[1], keys.shape[2]
    q = ops.reshape(ops.transpose(q, (0, 2, 1, 3)), (batch, groups, -1, width))                 # [B, G, N / G * T, D]
    keys, values = ops.transpose(keys, (0, 2, 1, 3)), ops.transpose(values, (0, 2, 1, 3))       # [B, G, S, D]
    score = ops.reshape(ops.BatchMatMul(transpose_b=True)(q, keys), (batch, heads, -1, rows))   # [B, N, T, S]
    prob = masked_softmax(score, ops.transpose(visible, (0, 2, 1, 3)), scale)
    out = ops.BatchMatMul()(ops.reshape(prob, (batch, groups, -1, rows)), values)               # [B, G, N / G * T, D]
    out = ops.transpose(ops.reshape(out, (batch, heads, -1, width)), (0, 2, 1, 3))
    return ops.reshape(out, (batch, -1, heads * width))


def _heads(x, weights):
    """[B, T, heads * D] -> [B, T, heads, D]."""
    return ops.reshape(x, (x.shape[0], -1, x.shape[-1] // weights["width"], weights["width"]))


# ---------------------------------------------------------------- the layer

class GroupedQueryAttention(nn.Cell):
    """One body for training, prefill and decoding; see `plan.GroupedQueryAttention` for its sizes."""

    def __init__(self, attention, plan, ranks):
        super().__init__()
        heads, groups = attention.num_heads // ranks.tensor, attention.num_kv_heads // ranks.tensor     # of this rank
        hidden, width, bias = plan.hidden_size, attention.head_dim, attention.bias
        self.q_proj = Linear(hidden, heads * width, plan, bias=bias)
        self.k_proj = Linear(hidden, groups * width, plan, bias=bias)
        self.v_proj = Linear(hidden, groups * width, plan, bias=bias)
        self.o_proj = Linear(heads * width, hidden, plan, bias=bias)
        self.sharded = ranks.tensor > 1
        self.copy, self.reduce = collectives.copy(ranks, "tensor"), collectives.reduce(ranks, "tensor")
        self.window, self.scale = attention.window or 0, width ** -0.5
        self.weights = {"query": self.q_proj.matrix, "key": self.k_proj.matrix, "value": self.v_proj.matrix,
                        "width": width}
        self.out = self.o_proj.matrix

    def construct(self, x, step, cache):
        """x [B, T, H], normed -> y [B, T, H], and (), for there is no indexer.

        cache: None, or this layer's tensors by name (`plan.GroupedQueryAttention.cache_tensors`), updated in place.
        """
        x = self.copy(x)
        q = grouped_query(x, self.weights, step)
        keys, values = grouped_keys_values(x, self.weights, cache, step)
        heads = grouped_attention(q, keys, values, step["visible"][self.window], self.scale)
        if not self.sharded:
            return linear(heads, self.out), ()
        # Ranks add up what their heads give; the output's bias is added once.
        return add_bias(self.reduce(linear(heads, without_bias(self.out))), self.out), ()
