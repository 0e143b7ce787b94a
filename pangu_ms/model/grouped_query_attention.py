"""Grouped-query attention: each key-value head serves a group of query heads (sections 2 and 4 of the family).

Query head n reads key-value head n // (N / G) of N query heads and G key-value heads. Queries and keys are D wide,
values Dv. The cache keeps rotated keys and values, G heads of each to a row. Learned sinks stand before all rows: they
are in no cache and have no position.
"""
from mindspore import nn, ops

from pangu_ms.cache.rings import append
from pangu_ms.device import replaceable
from pangu_ms.model.elementary import largest_logits, masked_softmax
from pangu_ms.model.linear import Linear, add_bias, linear, parameter, without_bias
from pangu_ms.model.norm import RMSNorm, rms_norm
from pangu_ms.model.rope import apply_rope
from pangu_ms.model.sinks import behind_sinks
from pangu_ms.parallel import collectives
from pangu_ms.shaping import part

# ---------------------------------------------------------------- the steps of a layer

@replaceable
def grouped_rows(x, weights, key_norm, cache, step):
    """x [B, T, H] -> rotated queries [B, T, N, D], and keys and values that they may see, [B, S, G, D] and
    [B, S, G, Dv]: those of x, keys normed and rotated, go to the cache.

    weights: query, key and value, matrices; or fused, one matrix with the rows of all three, and ends, how many rows
    queries have, and queries with keys; width, D; value_width, Dv. key_norm: of each head's keys, or None. cache: keys
    and values, growing tensors [B * S, G * D or Dv], updated in place; or None: S is T, the rows themselves.
    """
    q, keys, values = _projected(x, weights)
    q, keys = _heads(q, weights["width"]), _heads(keys, weights["width"])       # [B, T, N, D], [B, T, G, D]
    if key_norm is not None:
        keys = rms_norm(keys, key_norm)
    q, keys = apply_rope(q, step["rope"], 0), apply_rope(keys, step["rope"], 0)
    groups = values.shape[-1] // weights["value_width"]
    if cache is not None:
        keys = append(cache["keys"], ops.reshape(keys, values.shape[:2] + (groups * weights["width"],)), step["slots"])
        values = append(cache["values"], values, step["slots"])
    return (q, ops.reshape(keys, (x.shape[0], -1, groups, weights["width"])),
            ops.reshape(values, (x.shape[0], -1, groups, weights["value_width"])))


@replaceable
def grouped_attention(q, keys, values, visible, scale, sinks, wants_largest):
    """q [B, T, N, D], keys [B, S, G, D], values [B, S, G, Dv], visible bool [B, T, 1, S0 + S] -> [B, T, N * Dv], and
    the largest logit of each head, the sinks' included, float32 [N], or () where they are not wanted.

    sinks: keys [S0, G, D], normed, and values [S0, G, Dv]; or None, S0 is 0. The queries of a group stand one behind
    the other and meet their keys in one product.
    """
    if sinks is not None:
        keys, values = behind_sinks(sinks["keys"], keys), behind_sinks(sinks["values"], values)
    batch, _, heads, width = q.shape
    rows, groups = keys.shape[1], keys.shape[2]
    q = ops.reshape(ops.transpose(q, (0, 2, 1, 3)), (batch, groups, -1, width))                 # [B, G, N / G * T, D]
    keys, values = ops.transpose(keys, (0, 2, 1, 3)), ops.transpose(values, (0, 2, 1, 3))       # [B, G, S, D]
    score = ops.reshape(ops.BatchMatMul(transpose_b=True)(q, keys), (batch, heads, -1, rows))   # [B, N, T, S]
    visible = ops.transpose(visible, (0, 2, 1, 3))
    prob = masked_softmax(score, visible, scale)
    out = ops.BatchMatMul()(ops.reshape(prob, (batch, groups, -1, rows)), values)               # [B, G, N / G * T, Dv]
    width = values.shape[3]
    out = ops.transpose(ops.reshape(out, (batch, heads, -1, width)), (0, 2, 1, 3))
    largest = largest_logits(score, visible, scale) if wants_largest else ()
    return ops.reshape(out, (batch, -1, heads * width)), largest


def _projected(x, weights):
    """Queries, keys and values [B, T, heads * D or Dv] of x [B, T, H]; see `grouped_rows`."""
    if "fused" not in weights:
        return linear(x, weights["query"]), linear(x, weights["key"]), linear(x, weights["value"])
    rows, (first, second) = linear(x, weights["fused"]), weights["ends"]
    return part(rows, -1, 0, first), part(rows, -1, first, second), part(rows, -1, second, rows.shape[-1])


def _heads(x, width):
    """[B, T, heads * D] -> [B, T, heads, D]."""
    return ops.reshape(x, (x.shape[0], -1, x.shape[-1] // width, width))


# ---------------------------------------------------------------- the layer

class GroupedQueryAttention(nn.Cell):
    """One body for training, prefill and decoding; see `plan.GroupedQueryAttention` for its sizes.

    The rows of a fused projection are all queries, all keys, all values, as the release stores them; of several tensor
    parallel ranks each has those of its heads, in this order. Files of the training side (Megatron) order the rows by
    key-value head, [its queries, its key, its value]: they have the same shape and are another matrix.
    """

    def __init__(self, attention, plan, ranks):
        super().__init__()
        heads, groups = attention.num_heads // ranks.tensor, attention.num_kv_heads // ranks.tensor     # of this rank
        hidden, width, value, bias = plan.hidden_size, attention.head_dim, attention.v_head_dim, attention.bias
        self.weights = {"width": width, "value_width": value}
        if attention.fused:
            ends = heads * width, (heads + groups) * width
            self.qkv_proj = Linear(hidden, ends[1] + groups * value, plan, bias=bias)
            self.weights |= {"fused": self.qkv_proj.matrix, "ends": ends}
        else:
            self.q_proj = Linear(hidden, heads * width, plan, bias=bias)
            self.k_proj = Linear(hidden, groups * width, plan, bias=bias)
            self.v_proj = Linear(hidden, groups * value, plan, bias=bias)
            self.weights |= {"query": self.q_proj.matrix, "key": self.k_proj.matrix, "value": self.v_proj.matrix}
        self.o_proj = Linear(heads * value, hidden, plan, bias=bias)
        self.key_norm = None
        if attention.key_norm:
            self.k_layernorm = RMSNorm(width, plan)
            self.key_norm = self.k_layernorm.handle
        self.sinks, self.sink_values = attention.sinks, attention.sink_values
        if self.sinks:
            self.param_sink_key = parameter((self.sinks, groups, width), plan)
            if self.sink_values:
                self.param_sink_value = parameter((self.sinks, groups, value), plan)
        self.copy, self.reduce = collectives.copy(ranks, "tensor"), collectives.reduce(ranks, "tensor")
        self.window, self.scale, self.sharded = attention.window or 0, width ** -0.5, ranks.tensor > 1
        self.out = self.o_proj.matrix

    def construct(self, x, step, cache):
        """x [B, T, H], normed -> y [B, T, H], (), for there is no indexer, and the largest logits where the step asks
        for them.

        cache: None, or this layer's tensors by name (`plan.GroupedQueryAttention.cache_tensors`), updated in place.
        """
        norm = self._shared_norm()
        q, keys, values = grouped_rows(self.copy(x), self.weights, norm, cache, step)
        heads, largest = grouped_attention(q, keys, values, step["visible"][self.window], self.scale,
                                           self._sink_rows(norm), step["largest_logits"])
        if not self.sharded:
            return linear(heads, self.out), (), largest
        # Ranks add up what their heads give; the output's bias is added once.
        return add_bias(self.reduce(linear(heads, without_bias(self.out))), self.out), (), largest

    def _shared_norm(self):
        """`key_norm`; tensor parallel ranks sum its gradient, for all of their different keys have it."""
        if not self.sharded or self.key_norm is None:
            return self.key_norm
        return {"weight": self.copy(self.key_norm["weight"]), "eps": self.key_norm["eps"]}

    def _sink_rows(self, norm):
        """Keys and values of the sinks, as `grouped_attention` takes them."""
        if not self.sinks:
            return None
        keys = self.param_sink_key
        if norm is not None:
            keys = rms_norm(keys, norm)
        if self.sink_values:
            return {"keys": keys, "values": self.param_sink_value}
        return {"keys": keys, "values": ops.zeros(keys.shape[:2] + (self.weights["value_width"],), keys.dtype)}
