"""Attention and DSA's selection on fused CANN operators.

The operators take 16 bits and certain widths; everything else goes to the formula. Which of the two is decided by
shapes and dtypes alone, when the graph is compiled.
"""
import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import FlashAttentionScore

from pangu_ms.model import grouped_query_attention, indexer, latent_attention
from pangu_ms.model.latent_attention import by_head
from pangu_ms.model.linear import dense_weight, linear
from pangu_ms.model.sinks import behind_sinks

INDEX_HEADS = 64                # lightning_indexer takes so many, of width 128, and selects at most 2048 rows
SPARSE_ROWS = 2048              # sparse_flash_attention takes so many for a query, of width 512 + 64,
SPARSE_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)            # for one of these numbers of heads


_expanded_attention = latent_attention.expanded_attention.formula
_grouped_attention = grouped_query_attention.grouped_attention.formula
_sparse_attention = latent_attention.sparse_attention.formula
_topk_indices = indexer.topk_indices.formula


def gathers_no_rows(plan):
    """Whether a prefill in which DSA selects needs no copies of what is selected, and no scores of all rows."""
    attention = next(layer.attention for layer in plan.layers if layer.attention.indexer)
    dtype, found = getattr(ms, plan.dtype), attention.indexer
    return (_sparse_takes(attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim, found.topk, dtype)
            and _index_takes(found.num_heads, found.head_dim, found.topk, dtype))


def expanded_attention(q, sinks, keys, visible, kv_b, scale, wants_largest):
    """By FlashAttentionScore; the sinks are keys like any other."""
    batch, _, heads, width = q.shape
    up = dense_weight(kv_b)
    latent = up.shape[1]
    nope = width - (keys.shape[-1] - latent)
    value = up.shape[0] // heads - nope
    if not _flash_takes(width, value, q.dtype):
        return _expanded_attention(q, sinks, keys, visible, kv_b, scale, wants_largest)
    keys = behind_sinks(sinks, keys)                                        # [B, S0 + S, D]
    kv = ops.reshape(linear(keys[..., :latent], kv_b), (batch, -1, heads, nope + value))
    k_pe = ops.tile(ops.expand_dims(keys[..., latent:], 2), (1, 1, heads, 1))
    key = ops.cat((kv[..., :nope], k_pe), -1)                               # [B, S0 + S, heads, nope + rope]
    out, largest = _flash(q, key, kv[..., nope:], visible, scale, wants_largest)
    return ops.reshape(out, (batch, -1, heads * value)), largest


def grouped_attention(q, keys, values, visible, scale, sinks, wants_largest):
    """By FlashAttentionScore, which takes fewer heads of keys than of queries."""
    batch, value = q.shape[0], values.shape[3]
    if not _flash_takes(q.shape[3], value, q.dtype):
        return _grouped_attention(q, keys, values, visible, scale, sinks, wants_largest)
    if sinks is not None:
        keys, values = behind_sinks(sinks["keys"], keys), behind_sinks(sinks["values"], values)
    out, largest = _flash(q, keys, values, visible, scale, wants_largest)
    return ops.reshape(out, (batch, -1, q.shape[2] * value)), largest


def _flash(q, keys, values, visible, scale, wants_largest):
    """q and keys [B, .., heads, D], values [B, S, heads, Dv], visible bool [B, T, 1, S] -> [B, T, heads, Dv], and the
    largest logits [heads], or ().

    The operator's heads have one width: values are made as wide as keys with zeros. What is visible is given whole, so
    windows and documents save no work here.
    """
    width, value = q.shape[3], values.shape[3]
    if value < width:
        values = ops.cat((values, ops.zeros(values.shape[:3] + (width - value,), values.dtype)), -1)
    hidden = ops.logical_not(ops.transpose(visible, (0, 2, 1, 3)))          # [B, 1, T, S], True: not seen
    peaks, out = flash_attention_score(q, keys, values, hidden, q.shape[2], scale)
    largest = ops.ReduceMax()(peaks, (0, 2, 3)) if wants_largest else ()
    return out[..., :value] if value < width else out, largest


def flash_attention_score(query, key, value, attn_mask, head_num, scale):
    """The operator itself, of which `ops.flash_attention_score` gives only the last output -> its softmax_max, the
    largest scaled score of each query, float32 [B, heads, T, 8], eight times the same; and attention_out.
    """
    peaks, _, _, out = FlashAttentionScore(head_num, scale_value=scale, input_layout="BSND")(
        query, key, value, None, None, None, attn_mask)
    return peaks, out


def sparse_attention(q, sinks, keys, indices, position, kv_b, scale):
    """By sparse_flash_attention, which knows no sinks: their part of the softmax is computed here and merged.

    For the merge the operator gives the largest score and the sum over the others. MindSpore's documentation says
    that it does so in training and not in graph mode; MindFormers' own DSA asks for it in a graph, as here. No
    gradient: of those two outputs the operator has none.

    The operator wants the latent and the rotary part of the cache each by itself, a copy of all of it. Where the
    selected rows are fewer, as in decoding, gathering them moves less, and the plain form does that.
    """
    length, heads, width = q.shape[1:]
    batch, places, row = keys.shape
    weight = dense_weight(kv_b)
    latent = weight.shape[1]
    few_rows, topk = length * indices.shape[2] <= places, indices.shape[2]
    if sinks is None or few_rows or not _sparse_takes(heads, latent, row - latent, topk, q.dtype):
        return _sparse_attention(q, sinks, keys, indices, position, kv_b, scale)
    nope = width - (row - latent)
    up = ops.reshape(weight, (heads, -1, latent))                             # [heads, nope + value, latent]
    q_latent, q_pe = by_head(ops.matmul, q[..., :nope], up[:, :nope]), q[..., nope:]
    spare = [count for count in SPARSE_HEADS if count >= heads][0] - heads
    key = ops.expand_dims(keys[..., :latent], 2)
    out, peak, mass = ops.sparse_flash_attention(
        _more_heads(q_latent, spare), key, key, ops.expand_dims(indices, 2), scale,
        actual_seq_lengths_query=ops.full((batch,), length, dtype=ms.int32),
        actual_seq_lengths_kv=position[:, -1] + 1,                          # the last row of q is the last key
        query_rope=_more_heads(q_pe, spare), key_rope=ops.expand_dims(keys[..., latent:], 2),
        attention_mode=2, return_softmax_lse=True)
    out = ops.cast(out[:, :, :heads], ms.float32)                           # [B, T, heads, latent]
    peak, mass = (ops.transpose(each[..., :heads], (0, 2, 3, 1)) for each in (peak, mass))  # [B, T, heads, 1]
    score = ops.matmul(ops.cat((q_latent, q_pe), -1), ops.transpose(sinks, (1, 0)))
    score = ops.cast(score, ms.float32) * scale                             # [B, T, heads, S0]
    top = ops.maximum(peak, ops.ReduceMax(True)(score, -1))
    mass, share = mass * ops.exp(peak - top), ops.exp(score - top)
    out = out * mass + ops.matmul(share, ops.cast(sinks[:, :latent], ms.float32))
    out = ops.cast(out / (mass + ops.sum(share, -1, keepdim=True)), q.dtype)
    out = by_head(ops.BatchMatMul(transpose_b=True), out, up[:, nope:])     # [B, T, heads, value]
    return ops.reshape(out, (batch, -1, heads * out.shape[-1]))


def topk_indices(q, keys, weight, position, k):
    """By lightning_indexer, with heads of weight 0 up to the number that it takes; -1 where a query has fewer rows.

    It ranks in 16 bits, weights included: of rows that score nearly the same another may be taken.
    """
    batch, length, heads, dim = q.shape
    if not _index_takes(heads, dim, k, q.dtype):
        return _topk_indices(q, keys, weight, position, k)
    spare = INDEX_HEADS - heads
    weight = ops.expand_dims(ops.cast(weight, q.dtype), 3)
    chosen = ops.lightning_indexer(
        _more_heads(q, spare), ops.expand_dims(keys, 2), ops.squeeze(_more_heads(weight, spare), 3),
        actual_seq_lengths_query=ops.full((batch,), length, dtype=ms.int32),
        actual_seq_lengths_key=position[:, -1] + 1, sparse_count=k)[0]
    return ops.squeeze(chosen, 2)


def _more_heads(x, spare):
    """x [B, T, heads, D] -> [B, T, heads + spare, D], with zeros."""
    if spare == 0:
        return x
    return ops.cat((x, ops.zeros(x.shape[:2] + (spare, x.shape[3]), x.dtype)), 2)


def _flash_takes(width, value, dtype):
    return dtype in (ms.float16, ms.bfloat16) and width % 16 == 0 and value <= width <= 512


def _sparse_takes(heads, latent, rope, k, dtype):
    return (dtype in (ms.float16, ms.bfloat16) and latent == 512 and rope == 64 and k == SPARSE_ROWS
            and heads <= SPARSE_HEADS[-1])


def _index_takes(heads, dim, k, dtype):
    return dtype in (ms.float16, ms.bfloat16) and dim == 128 and heads <= INDEX_HEADS and k <= SPARSE_ROWS
