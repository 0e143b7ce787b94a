"""Multi-head latent attention; full, sliding-window or DSA (sections 4 to 6), with or without learned sinks and short
convolutions (without: section 5 of the family).

Keys and values are kept as latent rows D = [kv_lora_rank | qk_rope_head_dim]: the normed latent, then the rotated key
part that all heads share. `expanded_attention` multiplies every row out to keys and values of each head;
`absorbed_attention` moves that product to the query and the output, so that rows are read as they lie in the cache, and
each query may have its own. They are two forms of one function of

    q [B, T, heads, nope + rope], rotated; sinks [S0, D], normed, or None; keys [B, S, D];
    visible bool [B, T, 1, S0 + S]; kv_b, a matrix [heads * (nope + value), latent] -> [B, T, heads * value]

Training may ask the expanded form for the largest logit of each head, as it enters the softmax: float32 [heads]. The
sinks' are among them, for sinks are keys like any others: their logits grow and are clipped with the rest.
"""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache.rings import append, ring_update
from pangu_ms.device import replaceable
from pangu_ms.model.elementary import MASKED, largest_logits, masked_softmax
from pangu_ms.model.indexer import Indexer, append_index_rows, select_rows, topk_mask
from pangu_ms.model.linear import Linear, dense_weight, linear, parameter
from pangu_ms.model.norm import RMSNorm, rms_norm
from pangu_ms.model.rope import apply_rope
from pangu_ms.model.short_conv import ShortConv, conv_with_taps
from pangu_ms.model.sinks import behind_sinks, with_sinks
from pangu_ms.parallel import collectives
from pangu_ms.shaping import arange, part

# ---------------------------------------------------------------- the steps of a layer

@replaceable
def latent_query(x, weights, taps, step, nope, copy):
    """x [B, T, H] -> q_latent [B, T, q_lora_rank], after convolution and norm, and q [B, T, heads * (nope + rope)].

    weights: down and up, matrices; conv; norm. taps: the convolution's ring, or None. nope: where rotation begins.
    copy: a cell for q_latent, from where on tensor parallel ranks have different heads.
    """
    q_latent = rms_norm(conv_with_taps(linear(x, weights["down"]), weights["conv"], taps, step), weights["norm"])
    q = linear(copy(q_latent), weights["up"])                                   # [B, T, heads * (nope + rope)]
    by_head = ops.reshape(q, (x.shape[0], -1, weights["heads"], q.shape[-1] // weights["heads"]))
    return q_latent, ops.reshape(apply_rope(by_head, step["rope"], nope), q.shape)


@replaceable
def latent_keys(x, weights, taps, kept, step, window):
    """The latent rows of x [B, T, H] go to the cache -> what `attention_output` reads of it, for layers of this kind.

    Without a cache the rows themselves [B, T, D]. In a window its ring's rows, oldest first, and the new ones
    [B, R + T, D]. Otherwise the growing tensor [B, S, D].
    weights: down, a matrix; conv; norm. taps: the convolution's ring; kept: the rows' tensor [B * rows, D]; or None.
    window: 0 for none.
    """
    kv = linear(x, weights["down"])                                             # [B, T, latent + rope]
    width = weights["latent"]
    rows = latent_rows(conv_with_taps(part(kv, -1, 0, width), weights["conv"], taps, step), kv, weights["norm"],
                       step["rope"])
    if kept is None:
        return rows
    if window:
        return ops.cat((ring_update(kept, rows, step["rings"][window]), rows), 1)
    return ops.reshape(append(kept, rows, step["slots"]), (x.shape[0], -1, rows.shape[-1]))


@replaceable
def attention_output(q, sinks, keys, seen, weights, taps, step):
    """Attention, the convolution of what the heads give, and their projection -> [B, T, H]; the largest logits [heads],
    or () where the step asks for none.

    q of `latent_query`; keys of `latent_keys`. seen: window, 0 for none, and either visible, bool [B, T, 1, S0 + S], or
    indices int32 [B, T, K], which the indexer has selected. sinks: latent [S0, latent] and k_pe [S0, rope], neither
    convolved nor rotated, and the norm of the first; or None. weights: kv_b and out, matrices; conv; heads; scale.
    """
    q = ops.reshape(q, (q.shape[0], -1, weights["heads"], q.shape[-1] // weights["heads"]))
    rows, kv_b, scale, largest = sink_rows(sinks), weights["kv_b"], weights["scale"], ()
    if "indices" in seen:
        out = sparse_attention(q, rows, keys, seen["indices"], step["position"], kv_b, scale)
    elif step["decode"]:
        out = absorbed_attention(q, rows, keys, seen["visible"], kv_b, scale)
    else:
        out, largest = expanded_attention(q, rows, keys, seen["visible"], kv_b, scale, step["largest_logits"])
    return linear(conv_with_taps(out, weights["conv"], taps, step), weights["out"]), largest


# ---------------------------------------------------------------- rows and attention over them

@replaceable
def latent_rows(latent, kv, norm, rope):
    """The rows that the cache keeps: latent [B, T, latent], normed, then the key part of kv [B, T, D], rotated."""
    k_pe = apply_rope(ops.expand_dims(kv[..., latent.shape[-1]:], 2), rope, 0)
    return ops.cat((rms_norm(latent, norm), ops.squeeze(k_pe, 2)), -1)


def sink_rows(sinks):
    """[S0, D]: normed like every latent row, never convolved, never rotated. None where there are none."""
    if sinks is None:
        return None
    return ops.cat((rms_norm(sinks["latent"], sinks["norm"]), sinks["k_pe"]), -1)


@replaceable
def expanded_attention(q, sinks, keys, visible, kv_b, scale, wants_largest):
    """-> what the heads give, and the largest logits, or () where they are not wanted."""
    batch, _, heads, width = q.shape
    up = dense_weight(kv_b)
    latent = up.shape[1]
    nope = width - (keys.shape[-1] - latent)
    keys = behind_sinks(sinks, keys)                                            # [B, S0 + S, D]
    kv = ops.reshape(linear(keys[..., :latent], kv_b), (batch, -1, heads, up.shape[0] // heads))
    kv = ops.transpose(kv, (0, 2, 1, 3))                                        # [B, heads, S0 + S, nope + value]
    k_pe = ops.expand_dims(keys[..., latent:], 1)                               # [B, 1, S0 + S, rope]
    q = ops.transpose(q, (0, 2, 1, 3))                                          # [B, heads, T, nope + rope]
    score = ops.BatchMatMul(transpose_b=True)(q[..., :nope], kv[..., :nope])
    score = score + ops.matmul(q[..., nope:], ops.transpose(k_pe, (0, 1, 3, 2)))
    visible = ops.transpose(visible, (0, 2, 1, 3))
    prob = masked_softmax(score, visible, scale)                                # [B, heads, T, S0 + S]
    out = ops.transpose(ops.matmul(prob, kv[..., nope:]), (0, 2, 1, 3))
    largest = largest_logits(score, visible, scale) if wants_largest else ()
    return ops.reshape(out, (batch, -1, heads * out.shape[-1])), largest


@replaceable
def absorbed_attention(q, sinks, keys, visible, kv_b, scale):
    """keys [B, S, D], or [B, T, S, D]: other rows for each query."""
    batch, _, heads, width = q.shape
    weight = dense_weight(kv_b)
    latent = weight.shape[1]
    nope = width - (keys.shape[-1] - latent)
    up = ops.reshape(weight, (heads, -1, latent))                               # [heads, nope + value, latent]
    keys = ops.reshape(keys, (-1,) + keys.shape[-2:])                           # [G, S, D]: G = B or B * T
    groups = keys.shape[0]
    keys = behind_sinks(sinks, keys)
    score = ops.reshape(_latent_score(q, keys, up), (batch, -1, heads, keys.shape[1]))      # [B, T, heads, S0 + S]
    prob = ops.reshape(masked_softmax(score, visible, scale), (groups, -1, keys.shape[1]))
    out = ops.reshape(ops.matmul(prob, keys)[..., :latent], (batch, -1, heads, latent))
    out = by_head(ops.BatchMatMul(transpose_b=True), out, up[:, nope:])         # [B, T, heads, value]
    return ops.reshape(out, (batch, -1, heads * out.shape[-1]))


@replaceable
def sparse_attention(q, sinks, keys, indices, position, kv_b, scale):
    """Of keys [B, S, D] a query at position int32 [B, T] sees the rows at indices int32 [B, T, K], and the sinks.

    Left out of indices is what is below 0 or behind the query's position: a query may have fewer rows than K.
    """
    b, s, d = keys.shape
    start = ops.reshape(arange(b) * s, (b, 1, 1))
    rows = ops.gather(ops.reshape(keys, (-1, d)), ops.cast(ops.maximum(indices, 0) + start, ms.int32), 0)
    counts = ops.logical_and(indices >= 0, indices <= ops.expand_dims(position, 2))
    return absorbed_attention(q, sinks, rows, with_sinks(counts, 0 if sinks is None else sinks.shape[0]), kv_b, scale)


def attention_mass(q, sinks, keys, visible, kv_b, scale):
    """Where the heads look: float32 [B, T, S], the sum of their probabilities. Keys [B, S, D]; no sinks in it.

    The sinks take part in the softmax, so a head that looks at them has less to say.
    """
    batch, _, heads, _ = q.shape
    up = ops.reshape(dense_weight(kv_b), (heads, -1, dense_weight(kv_b).shape[1]))
    keys = behind_sinks(sinks, keys)
    score = ops.reshape(_latent_score(q, keys, up), (batch, -1, heads, keys.shape[1]))
    return ops.sum(ops.cast(masked_softmax(score, visible, scale), ms.float32), 2)[..., sinks.shape[0]:]


def _latent_score(q, keys, up):
    """q [B, T, heads, nope + rope], keys [G, S0 + S, D], G = B or B * T, up [heads, nope + value, latent].

    -> [G, T * heads or heads, S0 + S]
    """
    nope = q.shape[3] - (keys.shape[-1] - up.shape[2])
    q = ops.cat((by_head(ops.matmul, q[..., :nope], up[:, :nope]), q[..., nope:]), -1)      # [B, T, heads, D]
    return ops.BatchMatMul(transpose_b=True)(ops.reshape(q, (keys.shape[0], -1, keys.shape[-1])), keys)


def by_head(product, x, weight):
    """x [B, T, heads, I] by one matrix for each head -> [B, T, heads, O]."""
    b, _, heads, width = x.shape
    x = ops.reshape(ops.transpose(x, (2, 0, 1, 3)), (heads, -1, width))         # [heads, B * T, I]
    y = product(x, weight)
    return ops.transpose(ops.reshape(y, (heads, b, -1, y.shape[-1])), (1, 2, 0, 3))


# ---------------------------------------------------------------- the layer

class LatentAttention(nn.Cell):
    """One body for training, prefill, decoding and drafting; see `plan.LatentAttention` for the kinds of layers."""

    def __init__(self, attention, plan, ranks):
        super().__init__()
        self.heads, self.latent = attention.num_heads // ranks.tensor, attention.kv_lora_rank       # of this rank
        self.nope, self.window, self.sinks = attention.qk_nope_head_dim, attention.window or 0, attention.sinks
        self.scale, self.sparse = attention.qk_head_dim ** -0.5, attention.indexer is not None
        self.convolved = attention.conv_width > 1
        self.sharded = ranks.tensor > 1
        hidden, q_rank, out = plan.hidden_size, attention.q_lora_rank, self.heads * attention.v_head_dim
        self.q_a_proj = Linear(hidden, q_rank, plan)
        self.qa_conv = ShortConv(q_rank, attention.conv_width, plan)
        self.q_a_layernorm = RMSNorm(q_rank, plan)
        self.q_b_proj = Linear(q_rank, self.heads * attention.qk_head_dim, plan)
        self.kv_a_proj_with_mqa = Linear(hidden, attention.row_width, plan)
        self.compresskv_conv = ShortConv(self.latent, attention.conv_width, plan)
        self.kv_a_layernorm = RMSNorm(self.latent, plan)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + attention.v_head_dim), plan)
        self.sink_weights = None
        if self.sinks:
            self.param_sink_compressed_kv = parameter((self.sinks, self.latent), plan)
            self.param_sink_k_pe = parameter((self.sinks, attention.qk_rope_head_dim), plan)
            self.sink_weights = {"latent": self.param_sink_compressed_kv, "k_pe": self.param_sink_k_pe,
                                 "norm": self.kv_a_layernorm.handle}
        self.o_conv = ShortConv(out, attention.conv_width, plan)
        self.o_proj = Linear(out, hidden, plan)
        if self.sparse:
            self.topk, self.indexer = attention.indexer.topk, Indexer(attention.indexer, attention, plan)
        self.copy, self.reduce = collectives.copy(ranks, "tensor"), collectives.reduce(ranks, "tensor")
        self.query_weights = {"down": self.q_a_proj.matrix, "conv": self.qa_conv.handle,
                              "norm": self.q_a_layernorm.handle, "up": self.q_b_proj.matrix, "heads": self.heads}
        self.row_weights = {"down": self.kv_a_proj_with_mqa.matrix, "conv": self.compresskv_conv.handle,
                            "norm": self.kv_a_layernorm.handle, "latent": self.latent}
        self.output_weights = {"kv_b": self.kv_b_proj.matrix, "conv": self.o_conv.handle, "out": self.o_proj.matrix,
                               "heads": self.heads, "scale": self.scale}

    def construct(self, x, step, cache):
        """x [B, T, H], normed -> y [B, T, H], for DSA without a cache what the indexer did (`_look`), and the largest
        logits where the step asks for them.

        cache: None, or this layer's tensors by name (`plan.LatentAttention.cache_tensors`), updated in place.
        """
        q_taps, kv_taps, o_taps = None, None, None
        if cache is not None and self.convolved:
            q_taps, kv_taps, o_taps = cache["q_taps"], cache["kv_taps"], cache["o_taps"]
        q_latent, q = latent_query(x, self.query_weights, q_taps, step, self.nope, self.copy)
        keys = latent_keys(x, self.row_weights, kv_taps, None if cache is None else cache["latent"], step, self.window)
        keys, seen, index = self._look(x, q_latent, q, keys, cache, step)
        y, largest = attention_output(q, self._shared_sinks(), self.copy(keys), seen, self.output_weights, o_taps, step)
        return self.reduce(y), index, largest

    def _look(self, x, q_latent, q, keys, cache, step):
        """-> keys, which depend on the indexer's writes; `seen` of `attention_output`; what the indexer did.

        Without a cache that is its scores and its selection [B, T, T], and what its loss needs: inputs, queries, rows.
        """
        seen = {"window": self.window, "visible": step["visible"][self.window]}
        if not self.sparse:
            return keys, seen, ()
        if cache is not None:
            if not step["sparse"]:
                written = append_index_rows(x, self.indexer.weights, cache["index_keys"], step)
                return ops.depend(keys, written), seen, ()                      # a write nobody uses is dropped
            indices, _ = select_rows(x, q_latent, self.indexer.weights, cache["index_keys"], step)
            return keys, {"window": self.window, "indices": indices}, ()
        scores = self.indexer(x, q_latent, step)
        scores = ops.select(step["causal"], scores, ops.full_like(scores, MASKED))
        selected = topk_mask(scores, step["causal"], self.topk)
        if step["sparse"]:
            seen = {"window": self.window, "visible": with_sinks(selected, self.sinks)}
        return keys, seen, {"scores": scores, "selected": selected, "x": x, "q_latent": q_latent, "q": q, "rows": keys}

    def _shared_sinks(self):
        """`sink_weights`, whose gradients tensor parallel ranks sum: they have the same sinks and different heads."""
        if not self.sharded or self.sinks == 0:
            return self.sink_weights
        norm = self.sink_weights["norm"]
        return {"latent": self.copy(self.sink_weights["latent"]), "k_pe": self.copy(self.sink_weights["k_pe"]),
                "norm": {"weight": self.copy(norm["weight"]), "eps": norm["eps"]}}
