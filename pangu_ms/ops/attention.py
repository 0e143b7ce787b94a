"""Latent attention over rows [kv_lora_rank | qk_rope_head_dim] and learned sinks: two plain forms of one function.

    q [B, T, heads, nope + rope], turned; sinks [S0, D], normed; keys [B, S, D], D = latent + rope;
    visible bool [B, T, 1, S0 + S]; kv_b [heads * (nope + value), latent] -> [B, T, heads * value]

`expanded` multiplies every row out to keys and values of each head; `absorbed` moves that product to the query and the
output, so that rows are read as they lie in the cache, and each query may have its own: keys [B, T, S, D].
"""
import mindspore as ms
from mindspore import ops

from pangu_ms.ops.portable import MASKED


def latent_rows(small):
    rms_norm, rotate = small("rms_norm"), small("rotate")

    def form(latent, kv, weight, cos, sin, eps):
        """The rows that the cache keeps: latent [B, T, latent], normed, then the key part of kv [B, T, D], turned."""
        k_pe = rotate(ops.expand_dims(kv[..., latent.shape[-1]:], 2), cos, sin, 0)
        return ops.cat((rms_norm(latent, weight, eps), ops.squeeze(k_pe, 2)), -1)

    return form


def masked_softmax(small):
    softmax = small("softmax")

    def form(score, visible, scale):
        """Over the last axis of score [A, B, C, S] * scale, where visible, bool; its other axes as in score or 1."""
        wide = ops.cast(score, ms.float32) * scale
        wide = ops.select(ops.broadcast_to(visible, wide.shape), wide, ops.full_like(wide, MASKED))
        return ops.cast(softmax(wide), score.dtype)

    return form


def expanded(small):
    linear, masked_softmax = small("linear"), small("masked_softmax")

    def form(q, sinks, keys, visible, kv_b, scale):
        batch, _, heads, width = q.shape
        latent = kv_b.shape[1]
        nope = width - (keys.shape[-1] - latent)
        keys = ops.cat((ops.tile(ops.expand_dims(sinks, 0), (batch, 1, 1)), keys), 1)       # [B, S0 + S, D]
        kv = ops.reshape(linear(keys[..., :latent], kv_b), (batch, -1, heads, kv_b.shape[0] // heads))
        kv = ops.transpose(kv, (0, 2, 1, 3))                                    # [B, heads, S0 + S, nope + value]
        k_pe = ops.expand_dims(keys[..., latent:], 1)                           # [B, 1, S0 + S, rope]
        q = ops.transpose(q, (0, 2, 1, 3))                                      # [B, heads, T, nope + rope]
        score = ops.BatchMatMul(transpose_b=True)(q[..., :nope], kv[..., :nope])
        score = score + ops.matmul(q[..., nope:], ops.swapaxes(k_pe, 2, 3))
        prob = masked_softmax(score, ops.transpose(visible, (0, 2, 1, 3)), scale)           # [B, heads, T, S0 + S]
        out = ops.transpose(ops.matmul(prob, kv[..., nope:]), (0, 2, 1, 3))
        return ops.reshape(out, (batch, -1, heads * out.shape[-1]))

    return form


def absorbed(small):
    masked_softmax = small("masked_softmax")

    def form(q, sinks, keys, visible, kv_b, scale):
        batch, _, heads, width = q.shape
        latent = kv_b.shape[1]
        nope = width - (keys.shape[-1] - latent)
        up = ops.reshape(kv_b, (heads, -1, latent))                             # [heads, nope + value, latent]
        keys = ops.reshape(keys, (-1,) + keys.shape[-2:])                       # [G, S, D]: G = B or B * T
        groups = keys.shape[0]
        keys = ops.cat((ops.tile(ops.expand_dims(sinks, 0), (groups, 1, 1)), keys), 1)
        score = ops.reshape(_latent_score(q, keys, kv_b), (batch, -1, heads, keys.shape[1]))    # [B, T, heads, S0 + S]
        prob = ops.reshape(masked_softmax(score, visible, scale), (groups, -1, keys.shape[1]))
        out = ops.reshape(ops.matmul(prob, keys)[..., :latent], (batch, -1, heads, latent))
        out = by_head(ops.BatchMatMul(transpose_b=True), out, up[:, nope:])    # [B, T, heads, value]
        return ops.reshape(out, (batch, -1, heads * out.shape[-1]))

    return form


def selected(small):
    absorbed = small("absorbed_attention")

    def form(q, sinks, cached, chosen, position, kv_b, scale):
        """Of cached [B, S, D] a query at position int32 [B, T] sees the rows chosen int32 [B, T, K], and the sinks.

        Left out of chosen is what is below 0 or behind the query's position: a query may have fewer rows than K.
        """
        keys, seen = chosen_rows(cached, chosen, position)
        return absorbed(q, sinks, keys, with_sinks(seen, sinks.shape[0]), kv_b, scale)

    return form


def choose(small):
    top_k = small("top_k")

    def form(q, keys, weight, position, k):
        """DSA's choice for `selected`: the k rows that score best -> int32 [B, T, k]. Arguments of `index_scores`."""
        scores = index_scores(q, keys, weight)
        behind = ops.arange(keys.shape[1], dtype=position.dtype) > ops.expand_dims(position, 2)
        return top_k(ops.masked_fill(scores, behind, MASKED), k)

    return form


def attended(small):
    masked_softmax = small("masked_softmax")

    def form(q, sinks, keys, visible, kv_b, scale):
        """Where the heads look: float32 [B, T, S], the sum of their probabilities. Keys [B, S, D]; no sinks in it.

        The sinks take part in the softmax, so a head that looks at them has less to say.
        """
        batch, _, heads, _ = q.shape
        keys = ops.cat((ops.tile(ops.expand_dims(sinks, 0), (batch, 1, 1)), keys), 1)
        score = ops.reshape(_latent_score(q, keys, kv_b), (batch, -1, heads, keys.shape[1]))
        return ops.sum(ops.cast(masked_softmax(score, visible, scale), ms.float32), 2)[..., sinks.shape[0]:]

    return form


def index_scores(q, keys, weight):
    """The indexer: q [B, T, heads, D], keys [B, S, D], weight [B, T, heads] -> float32 [B, T, S], not masked."""
    b, s, d = keys.shape
    each = ops.BatchMatMul(transpose_b=True)(ops.reshape(q, (b, -1, d)), keys)  # [B, T * heads, S]
    each = ops.reshape(ops.relu(ops.cast(each, ms.float32)), (b, -1, weight.shape[2], s))
    return ops.squeeze(ops.matmul(ops.expand_dims(ops.cast(weight, ms.float32), 2), each), 2)


def chosen_rows(cached, chosen, position):
    """The rows that `selected` reads, [B, T, K, D], and which of them count, bool [B, T, K]."""
    b, s, d = cached.shape
    start = ops.reshape(ops.arange(b, dtype=ms.int32) * s, (b, 1, 1))
    keys = ops.gather(ops.reshape(cached, (-1, d)), ops.cast(ops.maximum(chosen, 0) + start, ms.int32), 0)
    return keys, ops.logical_and(chosen >= 0, chosen <= ops.expand_dims(position, 2))


def _latent_score(q, keys, kv_b):
    """q [B, T, heads, nope + rope], keys [G, S0 + S, D] with G = B or B * T -> [G, T * heads or heads, S0 + S]."""
    heads, latent = q.shape[2], kv_b.shape[1]
    nope = q.shape[3] - (keys.shape[-1] - latent)
    up = ops.reshape(kv_b, (heads, -1, latent))[:, :nope]
    q = ops.cat((by_head(ops.matmul, q[..., :nope], up), q[..., nope:]), -1)   # [B, T, heads, D]
    return ops.BatchMatMul(transpose_b=True)(ops.reshape(q, (keys.shape[0], -1, keys.shape[-1])), keys)


def with_sinks(visible, sinks):
    """bool [B, T, S] -> [B, T, 1, sinks + S]: the sinks, in front of the keys, are seen by every query."""
    always = ops.ones(visible.shape[:2] + (sinks,), visible.dtype)
    return ops.expand_dims(ops.cat((always, visible), 2), 2)


def by_head(product, x, weight):
    """x [B, T, heads, I] by one matrix for each head -> [B, T, heads, O]."""
    b, _, heads, width = x.shape
    x = ops.reshape(ops.transpose(x, (2, 0, 1, 3)), (heads, -1, width))         # [heads, B * T, I]
    y = product(x, weight)
    return ops.transpose(ops.reshape(y, (heads, b, -1, y.shape[-1])), (1, 2, 0, 3))
