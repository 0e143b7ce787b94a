"""Forms of single formulas, with gradients: compiled operators. Each has the name and the arguments of what it
replaces."""
from mindspore import ops

from pangu_ms.cache import rings
from pangu_ms.model import experts
from pangu_ms.model import feed_forward as dense
from pangu_ms.model import router as routing
from pangu_ms.model.linear import add_bias, without_bias
from pangu_ms.model.low_rank import dropped, has_pair, with_pair
from pangu_ms.ops.cpu.library import absent, operator
from pangu_ms.shaping import part

_choose_experts = routing.choose_experts.formula
_ring_update = rings.ring_update.formula
_experts_gathered = experts.experts_gathered.formula
_experts_grouped = experts.experts_grouped.formula
_feed_forward = dense.feed_forward.formula


def linear(x, matrix):
    if has_pair(without_bias(matrix)):
        return add_bias(with_pair(_product, x, without_bias(matrix)), matrix)
    if "bias" in matrix:
        return operator("LinearBias")(x, matrix["matrix"]["weight"], matrix["bias"])
    return operator("Linear")(x, matrix["weight"])


def _product(x, matrix):
    return operator("Linear")(x, matrix["weight"])


def _any_pair(matrices):
    return has_pair(matrices["gate"]) or has_pair(matrices["up"]) or has_pair(matrices["down"])


def rms_norm(x, norm):
    return operator("RmsNorm")(x, norm["weight"], norm["eps"])


def swiglu(gate, up):
    return operator("Swiglu")(gate, up)


def masked_softmax(score, visible, scale):
    return operator("MaskedSoftmax")(score, visible, scale)


def apply_rope(x, rope, start):
    return operator("Rotate")(x, rope["cos"], rope["sin"], start, rope["interleaved"])


def rotary_angles(coarse, fine, position):
    return operator("RotaryAngles")(position, coarse, fine)


def short_conv(x, past, conv, mask):
    return operator("ShortConv")(x, past, conv, mask)


def ring_update(ring, new, slots):
    if slots["count"] is not None:
        return _ring_update(ring, new, slots)
    return operator("Remember")(ring, new, slots["read"], slots["write"], slots["decode"])


def mhc_pre(streams, gates):
    return operator("HyperConnectionRead")(streams, gates["norm"]["weight"], gates["phi"]["weight"], gates["alpha"],
                                           gates["beta"], gates["norm"]["eps"], gates["rounds"])


def mhc_post(y, post, residual_mix, streams):
    return operator("HyperConnectionWrite")(y, post, residual_mix, streams)


def mhc_merge(streams, gates):
    return operator("HyperConnectionMerge")(streams, gates["norm"]["weight"], gates["phi"]["weight"], gates["alpha"],
                                            gates["beta"], gates["norm"]["eps"])


def latent_rows(latent, kv, norm, rope):
    return operator("LatentRows")(latent, kv, norm["weight"], rope["cos"], rope["sin"], norm["eps"],
                                  rope["interleaved"])


def expanded_attention(q, sinks, keys, visible, kv_b, scale, wants_largest):
    if has_pair(kv_b):
        sinks = None if sinks is None else _with_low(sinks, kv_b)
        keys, kv_b = _with_low(keys, kv_b), _wide(kv_b)
    sinks = absent() if sinks is None else sinks
    if wants_largest:
        return operator("ExpandedAttentionLargest")(q, sinks, keys, visible, kv_b["weight"], scale)
    return operator("ExpandedAttention")(q, sinks, keys, visible, kv_b["weight"], scale), ()


def _wide(kv_b):
    """[W | B], which of rows `_with_low` makes what the pair and W make of the rows."""
    return {"weight": ops.cat((kv_b["frozen"]["weight"], kv_b["lora_B"]["weight"]), 1)}


def _with_low(rows, kv_b):
    """Latent rows [..., D] with scale * A of their latent behind it -> [..., D + rank]."""
    width = kv_b["frozen"]["weight"].shape[1]
    latent = part(rows, -1, 0, width)
    low = _product(dropped(latent, kv_b["dropout"]), kv_b["lora_A"]) * kv_b["scale"]
    return ops.cat((latent, low, part(rows, -1, width, rows.shape[-1])), -1)


def absorbed_attention(q, sinks, keys, visible, kv_b, scale):
    sinks = absent() if sinks is None else sinks
    return operator("AbsorbedAttention")(q, sinks, keys, visible, kv_b["weight"], scale)


def grouped_attention(q, keys, values, visible, scale, sinks, wants_largest):
    """Keys and values [B, S, G, D], or of decoding as they lie in the cache, [B * S, G * D]."""
    width = q.shape[-1]
    groups, value = keys.shape[-1] // width, values.shape[-1]
    if keys.ndim == 4:
        groups = keys.shape[2]
    else:
        value = value // groups
    if sinks is None:
        sinks = {"keys": absent(0, groups, width), "values": absent(0, groups, value)}
    if wants_largest:
        return operator("GroupedAttentionLargest")(q, keys, values, sinks["keys"], sinks["values"], visible, scale)
    return operator("GroupedAttention")(q, keys, values, sinks["keys"], sinks["values"], visible, scale), ()


def choose_experts(logits, router):
    if router["kept"] is not None:
        return _choose_experts(logits, router)
    return operator("Route")(logits, router["bias"], router["scale"], router["scoring"] == "softmax",
                             router["grouped"], router["normalise"])


def experts_gathered(x, ids, weights, matrices):
    if _any_pair(matrices):
        return _experts_gathered(x, ids, weights, matrices)
    return _experts(x, ids, weights, matrices)


def experts_grouped(x, ids, weights, matrices):
    if _any_pair(matrices):
        return _experts_grouped(x, ids, weights, matrices)
    return _experts(x, ids, weights, matrices)


def _experts(x, ids, weights, matrices):
    """For any number of tokens."""
    return operator("Experts")(x, ids, weights, matrices["gate"]["weight"], matrices["up"]["weight"],
                               matrices["down"]["weight"])


def feed_forward(x, matrices):
    if _any_pair(matrices):
        return _feed_forward(x, matrices)
    return operator("FeedForward")(x, matrices["gate"]["weight"], matrices["up"]["weight"], matrices["down"]["weight"])


def cross_entropy(hidden, head, labels, mask):
    return operator("CrossEntropy")(hidden, head["weight"], labels, mask)
