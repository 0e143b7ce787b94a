"""Forms of single formulas, with gradients: compiled operators, but for grouped attention, which reads the cache in its
own way. Each has the name and the arguments of what it replaces."""
from mindspore import ops
from mindspore.ops.functional import isconstant

from pangu_ms.cache import rings
from pangu_ms.model import grouped_query_attention
from pangu_ms.model.linear import add_bias, without_bias
from pangu_ms.ops.cpu.library import absent, operator
from pangu_ms.shaping import arange

FEW_ROWS = 8    # of a sequence: decoding

_grouped_attention = grouped_query_attention.grouped_attention.formula
_ring_update = rings.ring_update.formula


def linear(x, matrix):
    return add_bias(operator("Linear")(x, without_bias(matrix)["weight"]), matrix)


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


def expanded_attention(q, sinks, keys, visible, kv_b, scale):
    sinks = absent() if sinks is None else sinks
    return operator("ExpandedAttention")(q, sinks, keys, visible, kv_b["weight"], scale)


def absorbed_attention(q, sinks, keys, visible, kv_b, scale):
    sinks = absent() if sinks is None else sinks
    return operator("AbsorbedAttention")(q, sinks, keys, visible, kv_b["weight"], scale)


def grouped_attention(q, keys, values, visible, scale, sinks):
    """For few queries keys and values are read as they lie in the cache: head by head they would have to be copied.

    A query is as wide as the keys of all G heads, and zero but for those it reads. That multiplies G times as much,
    which costs less than the copies do. Sinks meet the queries in products of their own, for the same reason.
    """
    batch, length, heads, width = q.shape
    rows, groups, value = keys.shape[1], keys.shape[2], values.shape[3]
    if not isconstant(length):                                                  # in a prefill
        return _grouped_attention(q, keys, values, visible, scale, sinks)
    if length > FEW_ROWS:
        return _grouped_attention(q, keys, values, visible, scale, sinks)
    reads = ops.expand_dims(arange(heads) // (heads // groups), 1) == arange(groups)
    reads = ops.expand_dims(ops.cast(reads, q.dtype), 2)                        # [N, G, 1]
    keys = ops.reshape(keys, (batch, rows, groups * width))
    values = ops.reshape(values, (batch, rows, groups * value))
    q = ops.reshape(ops.expand_dims(q, 3) * reads, (batch, length * heads, groups * width))
    score = ops.BatchMatMul(transpose_b=True)(q, keys)                          # [B, T * N, S]
    if sinks is None:
        out = ops.BatchMatMul()(_seen(score, visible, scale), values)
    else:
        count = sinks["keys"].shape[0]
        sink_score = ops.matmul(q, ops.transpose(ops.reshape(sinks["keys"], (count, -1)), (1, 0)))
        prob = _seen(ops.cat((sink_score, score), 2), visible, scale)
        out = (ops.matmul(prob[:, :, :count], ops.reshape(sinks["values"], (count, -1)))
               + ops.BatchMatMul()(prob[:, :, count:], values))
    out = ops.reshape(out, (batch, length, heads, groups, value))
    return ops.reshape(ops.sum(out * reads, 3), (batch, length, heads * value))


def _seen(score, visible, scale):
    """Scores [B, T * N, S] -> probabilities of what is visible, bool [B, T, 1, S]."""
    batch, pairs, length = score.shape[0], score.shape[1], visible.shape[1]
    prob = masked_softmax(ops.reshape(score, (batch, length, pairs // length, -1)), visible, scale)
    return ops.reshape(prob, (batch, pairs, -1))


def choose_experts(logits, router):
    return operator("Route")(logits, router["bias"], router["scale"], router["scoring"] == "softmax",
                             router["grouped"], router["normalise"])


def experts_gathered(x, ids, weights, matrices):
    return operator("Experts")(x, ids, weights, matrices["gate"]["weight"], matrices["up"]["weight"],
                               matrices["down"]["weight"])


experts_grouped = experts_gathered  # one operator for any number of tokens


def feed_forward(x, matrices):
    return operator("FeedForward")(x, matrices["gate"]["weight"], matrices["up"]["weight"], matrices["down"]["weight"])


def cross_entropy(hidden, head, labels, mask):
    return operator("CrossEntropy")(hidden, head["weight"], labels, mask)
