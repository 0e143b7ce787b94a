"""The steps of a layer in decoding, each compiled whole: for few tokens a launch costs more than most of what it does.

Each has the name and the arguments of the step it replaces, and gives other calls to that formula. The operators find
rows of the cache by position, and read and write them where they lie.
"""
import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops.primitive import constexpr

from pangu_ms.model import experts, grouped_query_attention, indexer, latent_attention, mtp, residual
from pangu_ms.model.linear import without_bias
from pangu_ms.ops.cpu.library import absent, operator

_latent_query = latent_attention.latent_query.formula
_latent_keys = latent_attention.latent_keys.formula
_attention_output = latent_attention.attention_output.formula
_grouped_rows = grouped_query_attention.grouped_rows.formula
_append_index_rows = indexer.append_index_rows.formula
_select_rows = indexer.select_rows.formula
_residual_pre = residual.residual_pre.formula
_residual_post = residual.residual_post.formula
_residual_post_pre = residual.residual_post_pre.formula
_mtp_input = mtp.mtp_input.formula
_moe = experts.moe.formula


def latent_query(x, weights, taps, step, nope, copy):
    if not step["decode"]:
        return _latent_query(x, weights, taps, step, nope, copy)
    norm, rope, (taps, conv) = weights["norm"], step["rope"], _convolution(taps, weights)
    return operator("DecodingQuery")(x, weights["down"]["weight"], taps, conv, norm["weight"], weights["up"]["weight"],
                                     step["position"], rope["cos"], rope["sin"], nope, norm["eps"], rope["interleaved"])


def latent_keys(x, weights, taps, kept, step, window):
    """Decoding: the cache's tensor as it lies, [B * rows, D], with the new rows in it."""
    if not step["decode"]:
        return _latent_keys(x, weights, taps, kept, step, window)
    norm, rope, (taps, conv) = weights["norm"], step["rope"], _convolution(taps, weights)
    rows = operator("DecodingRow")(x, weights["down"]["weight"], taps, conv, norm["weight"], kept, step["position"],
                                   rope["cos"], rope["sin"], norm["eps"], rope["interleaved"])
    return ops.depend(kept, rows)


def attention_output(q, sinks, keys, seen, weights, taps, step):
    """Decoding: keys as `latent_keys` of this file gives them."""
    if not step["decode"]:
        return _attention_output(q, sinks, keys, seen, weights, taps, step)
    kv_b, out, (taps, conv) = weights["kv_b"]["weight"], weights["out"]["weight"], _convolution(taps, weights)
    latent, k_pe, norm, eps = absent(), absent(), absent(), 1.0
    if sinks is not None:
        latent, k_pe, norm, eps = sinks["latent"], sinks["k_pe"], sinks["norm"]["weight"], sinks["norm"]["eps"]
    if "indices" in seen:
        return operator("DecodingChosen")(q, latent, k_pe, norm, keys, kv_b, taps, conv, out, step["position"],
                                          seen["indices"], weights["scale"], eps), ()
    return operator("DecodingAttention")(q, latent, k_pe, norm, keys, kv_b, taps, conv, out, step["position"],
                                         seen["window"], weights["scale"], eps), ()


def _convolution(taps, weights):
    """The ring and the weight of a site, or of neither anything."""
    if weights["conv"] is None:
        return absent(), absent()
    return taps, weights["conv"]["weight"]


def grouped_rows(x, weights, key_norm, cache, step):
    """Decoding: the cache's tensors as they lie, [B * rows, G * D or Dv], with the new rows in them."""
    if not step["decode"]:
        return _grouped_rows(x, weights, key_norm, cache, step)
    if "fused" in weights:
        fused = weights["fused"]
        matrices = (without_bias(fused)["weight"], _bias(fused), absent(), absent(), absent(), absent())
    else:
        query, key, value = weights["query"], weights["key"], weights["value"]
        matrices = (without_bias(query)["weight"], _bias(query), without_bias(key)["weight"], _bias(key),
                    without_bias(value)["weight"], _bias(value))
    norm, eps = (absent(), 1.0) if key_norm is None else (key_norm["weight"], key_norm["eps"])
    keys, values, rope = cache["keys"], cache["values"], step["rope"]
    q = operator("DecodingGroupedRows")(x, *matrices, norm, keys, values, step["position"], rope["cos"], rope["sin"],
                                        _as_shape(weights["width"]), eps, rope["interleaved"])
    return q, ops.depend(keys, q), ops.depend(values, q)


def _bias(matrix):
    return matrix["bias"] if "bias" in matrix else absent()


def append_index_rows(x, weights, kept, step):
    rope = step["rope"]
    if not step["decode"] or rope["interleaved"]:
        return _append_index_rows(x, weights, kept, step)
    norm = weights["key_norm"]
    return ops.depend(kept, operator("DecodingIndexRow")(x, weights["key"]["weight"], norm["weight"], kept,
                                                         step["position"], rope["cos"], rope["sin"], norm["eps"]))


def select_rows(x, q_latent, weights, kept, step):
    rope = step["rope"]
    if not step["decode"] or rope["interleaved"]:
        return _select_rows(x, q_latent, weights, kept, step)
    norm = weights["key_norm"]
    indices = operator("DecodingSelect")(
        x, weights["key"]["weight"], norm["weight"], kept, step["position"], rope["cos"], rope["sin"], q_latent,
        weights["query"]["weight"], weights["head_weights"]["weight"], _as_shape(weights["topk"]), norm["eps"])
    return indices, kept


@constexpr
def _as_shape(count):
    """A number as a shape: operators infer theirs from shapes alone."""
    return ms.Tensor(np.arange(count), ms.int32)


def residual_pre(stream, gates, norm, step):
    if gates is None or not step["decode"]:
        return _residual_pre(stream, gates, norm, step)
    x, post, mix = operator("DecodingRead")(
        stream, norm["weight"], gates["norm"]["weight"], gates["phi"]["weight"], gates["alpha"], gates["beta"],
        gates["norm"]["eps"], gates["rounds"], norm["eps"])
    return x, (post, mix)


def residual_post(y, norm, back, stream, step):
    if norm is None or not step["decode"]:
        return _residual_post(y, norm, back, stream, step)
    if len(back) == 0:
        return operator("DecodingAdd")(y, norm["weight"], stream, norm["eps"])
    return operator("DecodingWrite")(y, norm["weight"], back[0], back[1], stream, norm["eps"])


def residual_post_pre(y, norm, back, stream, next_gates, next_norm, step):
    if not step["decode"] or (norm is None and next_gates is not None):
        return _residual_post_pre(y, norm, back, stream, next_gates, next_norm, step)
    if next_gates is None:
        weight = absent() if norm is None else norm["weight"]
        stream, x = operator("DecodingResidual")(stream, y, weight, next_norm["weight"], next_norm["eps"])
        return stream, x, ()
    stream, x, post, mix = operator("DecodingTurn")(
        y, norm["weight"], back[0], back[1], stream, next_norm["weight"], next_gates["norm"]["weight"],
        next_gates["phi"]["weight"], next_gates["alpha"], next_gates["beta"], next_gates["norm"]["eps"],
        next_gates["rounds"], next_norm["eps"])
    return stream, x, (post, mix)


def mtp_input(embedding, hidden, weights, step):
    if not step["decode"]:
        return _mtp_input(embedding, hidden, weights, step)
    first, second = weights["embedding_norm"], weights["hidden_norm"]
    return operator("DecodingJoin")(embedding, first["weight"], hidden, second["weight"],
                                    weights["projection"]["weight"], first["eps"])


def moe(x, router, experts, shared, decode):
    """Decoding: without the router's logits. What the tokens of a step choose together is left to the formula."""
    if not decode or router["kept"] is not None:
        return _moe(x, router, experts, shared, decode)
    factor = _ones(router["bias"].shape[0]) if router["factor"] is None else router["factor"]
    y, ids, weights = operator("DecodingExperts")(
        x, router["gate"]["weight"], router["bias"], router["scale"], factor, experts["gate"]["weight"],
        experts["up"]["weight"], experts["down"]["weight"], shared["gate"]["weight"], shared["up"]["weight"],
        shared["down"]["weight"], router["scoring"] == "softmax", router["grouped"], router["normalise"])
    return y, {"ids": ids, "weights": weights}


@constexpr
def _ones(count):
    """The factors of experts that have none."""
    return ms.Tensor(np.ones((1, count)), ms.float32)
