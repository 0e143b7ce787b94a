"""Formulas by their names as functions of tensors alone: the handles that they take are put together inside."""
from mindspore import ops

from pangu_ms.cache import rings
from pangu_ms.model import cross_entropy as losses
from pangu_ms.model import elementary, experts, indexer, mtp, norm, residual, rope, router
from pangu_ms.model import feed_forward as dense
from pangu_ms.model import grouped_query_attention as gqa
from pangu_ms.model import hyper_connection as mhc
from pangu_ms.model import latent_attention as mla
from pangu_ms.model import linear as projections
from pangu_ms.model import short_conv as conv

swiglu, masked_softmax, top_k = elementary.swiglu, elementary.masked_softmax, elementary.top_k
softmax, sigmoid = elementary.softmax, elementary.sigmoid
short_conv, mhc_post = conv.short_conv, mhc.mhc_post
topk_indices = indexer.topk_indices


def matrix(weight):
    return {"weight": weight}


def conv_of(weight):
    return None if weight is None else {"weight": weight}


def rows_of(taps, batch):
    """Of the ring of a convolution, for one sequence; None without one."""
    return None if taps is None else taps.shape[0] // batch


def normed(weight, eps):
    return {"weight": weight, "eps": eps}


def linear(x, weight):
    return projections.linear(x, matrix(weight))


def projection(weight, bias):
    return matrix(weight) if bias is None else {"matrix": matrix(weight), "bias": bias}


def linear_bias(x, weight, bias):
    return projections.linear(x, projection(weight, bias))


def rms_norm(x, weight, eps):
    return norm.rms_norm(x, normed(weight, eps))


def turned(cos, sin, interleaved):
    return {"cos": cos, "sin": sin, "interleaved": interleaved}


def apply_rope(x, cos, sin, start, interleaved):
    return rope.apply_rope(x, turned(cos, sin, interleaved), start)


def latent_rows(latent, kv, weight, cos, sin, eps, interleaved):
    return mla.latent_rows(latent, kv, normed(weight, eps), turned(cos, sin, interleaved))


def gates(gamma, phi, alpha, beta, eps, rounds):
    return {"norm": normed(gamma, eps), "phi": matrix(phi), "alpha": alpha, "beta": beta, "rounds": rounds}


def mhc_pre(streams, gamma, phi, alpha, beta, eps, rounds):
    return mhc.mhc_pre(streams, gates(gamma, phi, alpha, beta, eps, rounds))


def mhc_merge(streams, gamma, phi, alpha, beta, eps):
    return mhc.mhc_merge(streams, gates(gamma, phi, alpha, beta, eps, 0))


def matrices(gate, up, down):
    return {"gate": matrix(gate), "up": matrix(up), "down": matrix(down)}


def routing(gate, bias, scale, normalise, scoring, grouped, factor, kept=None):
    return {"gate": gate, "bias": bias, "scale": scale, "normalise": normalise, "scoring": scoring,
            "grouped": grouped, "factor": factor, "kept": kept}


def choose_experts(logits, bias, scale, normalise, scoring, grouped):
    return router.choose_experts(logits, routing(None, bias, scale, normalise, scoring, grouped, None))


def choose_most_voted(logits, bias, scale, normalise, scoring, kept):
    return router.choose_experts(logits, routing(None, bias, scale, normalise, scoring, True, None, kept))


def experts_gathered(x, ids, weights, gate, up, down):
    return experts.experts_gathered(x, ids, weights, matrices(gate, up, down))


def experts_grouped(x, ids, weights, gate, up, down):
    return experts.experts_grouped(x, ids, weights, matrices(gate, up, down))


def feed_forward(x, gate, up, down):
    return dense.feed_forward(x, matrices(gate, up, down))


def cross_entropy(hidden, weight, labels, mask):
    return losses.cross_entropy(hidden, matrix(weight), labels, mask)


def absorbed_attention(q, sinks, keys, visible, kv_b, scale):
    return mla.absorbed_attention(q, sinks, keys, visible, matrix(kv_b), scale)


def expanded_attention(q, sinks, keys, visible, kv_b, scale):
    return mla.expanded_attention(q, sinks, keys, visible, matrix(kv_b), scale, False)[0]


def expanded_attention_and_largest(q, sinks, keys, visible, kv_b, scale):
    return mla.expanded_attention(q, sinks, keys, visible, matrix(kv_b), scale, True)


def sparse_attention(q, sinks, keys, indices, position, kv_b, scale):
    return mla.sparse_attention(q, sinks, keys, indices, position, matrix(kv_b), scale)


def grouped_attention(q, keys, values, visible, scale):
    return gqa.grouped_attention(q, keys, values, visible, scale, None, False)[0]


def grouped_attention_and_largest(q, keys, values, visible, scale):
    return gqa.grouped_attention(q, keys, values, visible, scale, None, True)


def grouped_attention_with_sinks(q, keys, values, visible, scale, sink_keys, sink_values):
    sinks = {"keys": sink_keys, "values": sink_values}
    return gqa.grouped_attention(q, keys, values, visible, scale, sinks, False)[0]


def grouped_attention_with_sinks_and_largest(q, keys, values, visible, scale, sink_keys, sink_values):
    return gqa.grouped_attention(q, keys, values, visible, scale, {"keys": sink_keys, "values": sink_values}, True)


# ---------------------------------------------------------------- steps of decoding, for layers with a cache

def step(position, cos, sin, ring=None, slack_taps=None, width=3, window=0, places=None, sinks=0, interleaved=False):
    """The `StepInfo` of few tokens, for rings of `slack_taps` and `ring` rows, or tensors of `places` rows."""
    at = ops.expand_dims(position, 2)
    found = {"position": position, "rope": turned(cos, sin, interleaved), "conv_mask": at >= width - 1,
             "decode": True, "sparse": False, "largest_logits": False, "rings": {}, "visible": {}}
    if slack_taps is not None:
        found["taps"] = rings.ring_slots(position, slack_taps, True)
    if window:
        found["rings"][window] = rings.ring_slots(position, ring, True)
        row = ops.arange(position.shape[1], dtype=position.dtype)
        distance = ops.expand_dims(row, 1) + ring - ops.arange(position.shape[1] + ring, dtype=position.dtype)
        seen = ops.logical_and(ops.logical_and(distance >= 0, distance <= at), distance < window)
        found["visible"][window] = mla.with_sinks(seen, sinks)
    elif places is not None:
        found["slots"] = rings.in_ring(position, places)
        at = ops.maximum(at, 0)
        distance = at - ops.arange(places, dtype=position.dtype)
        found["visible"][0] = mla.with_sinks(ops.logical_and(distance >= 0, distance <= at), sinks)
    return found


def identity(x):
    return x


def latent_query(x, down, taps, conv_weight, weight, up, position, cos, sin, nope, eps,
                 interleaved=False):
    weights = {"down": matrix(down), "conv": conv_of(conv_weight), "norm": normed(weight, eps), "up": matrix(up),
               "heads": up.shape[0] // (nope + 2 * cos.shape[-1])}
    info = step(position, cos, sin, slack_taps=rows_of(taps, x.shape[0]),
                width=1 if conv_weight is None else conv_weight.shape[2], interleaved=interleaved)
    return mla.latent_query(x, weights, taps, info, nope, identity)


def attend(x, down, row_taps, row_conv, weight, kept, position, cos, sin, q, latent, k_pe, kv_b, out_taps, out_conv,
           out, heads, window, scale, eps, interleaved=False):
    """`latent_keys`, then `attention_output` over them: a layer in a window, or of growing rows where that is 0."""
    return _attend(x, down, row_taps, row_conv, weight, kept, position, cos, sin, q, latent, k_pe, kv_b, out_taps,
                   out_conv, out, heads, window, scale, eps, None, interleaved)


def attend_sparse(x, down, row_taps, row_conv, weight, kept, position, cos, sin, q, latent, k_pe, kv_b, out_taps,
                  out_conv, out, indices, heads, scale, eps):
    """The same over growing rows, of which a query sees those that were selected."""
    return _attend(x, down, row_taps, row_conv, weight, kept, position, cos, sin, q, latent, k_pe, kv_b, out_taps,
                   out_conv, out, heads, 0, scale, eps, indices, False)


def _attend(x, down, row_taps, row_conv, weight, kept, position, cos, sin, q, latent, k_pe, kv_b, out_taps, out_conv,
            out, heads, window, scale, eps, indices, interleaved):
    batch = x.shape[0]
    info = step(position, cos, sin, kept.shape[0] // batch, rows_of(row_taps, batch),
                1 if row_conv is None else row_conv.shape[2], window, kept.shape[0] // batch,
                0 if latent is None else latent.shape[0], interleaved)
    rows = {"down": matrix(down), "conv": conv_of(row_conv), "norm": normed(weight, eps), "latent": weight.shape[0]}
    keys = mla.latent_keys(x, rows, row_taps, kept, info, window)
    sinks = None if latent is None else {"latent": latent, "k_pe": k_pe, "norm": normed(weight, eps)}
    weights = {"kv_b": matrix(kv_b), "conv": conv_of(out_conv), "out": matrix(out), "heads": heads, "scale": scale}
    if out_taps is not None:
        info["taps"] = rings.ring_slots(position, out_taps.shape[0] // batch, True)
    seen = {"window": window, "visible": info["visible"][window]}
    if indices is not None:
        seen = {"window": window, "indices": indices}
    return mla.attention_output(q, sinks, keys, seen, weights, out_taps, info)[0]


def attend_grouped(x, query, query_bias, key, key_bias, value, value_bias, keys, values, position, cos, sin, width,
                   value_width, scale, interleaved=False, norm=None):
    """`grouped_rows`, then `grouped_attention` over what the cache keeps; without a key, of one fused matrix."""
    info = step(position, cos, sin, places=keys.shape[0] // x.shape[0], interleaved=interleaved)
    if key is None:
        ends = query.shape[0] - keys.shape[1] - values.shape[1], query.shape[0] - values.shape[1]
        weights = {"fused": projection(query, query_bias), "ends": ends, "width": width, "value_width": value_width}
    else:
        weights = {"query": projection(query, query_bias), "key": projection(key, key_bias),
                   "value": projection(value, value_bias), "width": width, "value_width": value_width}
    norm = None if norm is None else normed(norm, 1e-3)
    q, keys, values = gqa.grouped_rows(x, weights, norm, {"keys": keys, "values": values}, info)
    return q, gqa.grouped_attention(q, keys, values, info["visible"][0], scale, None, False)[0]


def append_index_rows(x, key, weight, kept, position, cos, sin, eps):
    info = step(position, cos, sin, places=kept.shape[0] // x.shape[0])
    return indexer.append_index_rows(x, {"key": matrix(key), "key_norm": normed(weight, eps)}, kept, info)


def select_rows(x, key, weight, kept, position, cos, sin, q_latent, query, head_weights, places, eps):
    weights = {"key": matrix(key), "key_norm": normed(weight, eps), "query": matrix(query),
               "head_weights": matrix(head_weights), "dim": kept.shape[1], "topk": places.shape[0], "scale": 1.0}
    info = step(position, cos, sin, places=kept.shape[0] // x.shape[0])
    return indexer.select_rows(x, q_latent, weights, kept, info)[0]


def residual_pre(streams, weight, gamma, phi, alpha, beta, eps, rounds, norm_eps):
    x, back = residual.residual_pre(streams, gates(gamma, phi, alpha, beta, eps, rounds), normed(weight, norm_eps),
                                    {"decode": True})
    return x, back[0], back[1]


def residual_post(y, weight, post, mix, streams, eps):
    return residual.residual_post(y, normed(weight, eps), (post, mix), streams, {"decode": True})


def residual_post_pre(y, weight, post, mix, streams, next_weight, gamma, phi, alpha, beta, eps, rounds, norm_eps):
    stream, x, back = residual.residual_post_pre(
        y, normed(weight, norm_eps), (post, mix), streams, gates(gamma, phi, alpha, beta, eps, rounds),
        normed(next_weight, norm_eps), {"decode": True})
    return stream, x, back[0], back[1]


def plain_residual_post(y, weight, x, eps):
    return residual.residual_post(y, normed(weight, eps), (), x, {"decode": True})


def plain_residual_post_pre(y, weight, x, next_weight, eps):
    return _plain_post_pre(y, normed(weight, eps), x, normed(next_weight, eps))


def prenorm_residual_post_pre(y, x, next_weight, eps):
    """No norm behind the sublayer."""
    return _plain_post_pre(y, None, x, normed(next_weight, eps))


def _plain_post_pre(y, norm, x, next_norm):
    stream, x, _ = residual.residual_post_pre(y, norm, (), x, None, next_norm, {"decode": True})
    return stream, x


def mtp_input(embedding, embedding_norm, hidden, hidden_norm, projection, eps):
    weights = {"embedding_norm": normed(embedding_norm, eps), "hidden_norm": normed(hidden_norm, eps),
               "projection": matrix(projection)}
    return mtp.mtp_input(embedding, hidden, weights, {"decode": True})


def moe(x, gate, bias, scale, gates_, ups, downs, shared_gate, shared_up, shared_down, normalise):
    router_ = routing(matrix(gate), bias, scale, normalise, "sigmoid", False, None)
    return _moe(x, router_, gates_, ups, downs, shared_gate, shared_up, shared_down)


def moe_of_groups(x, gate, bias, scale, gates_, ups, downs, shared_gate, shared_up, shared_down, factor):
    router_ = routing(matrix(gate), bias, scale, False, "softmax", True, factor)
    return _moe(x, router_, gates_, ups, downs, shared_gate, shared_up, shared_down)


def _moe(x, router_, gates_, ups, downs, shared_gate, shared_up, shared_down):
    y, found = experts.moe(x, router_, matrices(gates_, ups, downs), matrices(shared_gate, shared_up, shared_down),
                           True)
    return y, found["ids"], found["weights"]
