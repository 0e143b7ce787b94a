"""What the Ascend forms put around a fused operator, in numbers: in its place stands what its documentation says.

Layouts, masks, sinks and merges would else be wrong in silence. The stand-ins compute in float32 on the CPU; each
refuses what the documentation of its operator refuses.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, ops

from pangu_ms import device
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.model import (
    cross_entropy, elementary, experts, grouped_query_attention, indexer, latent_attention, rope,
)
from pangu_ms.ops.ascend import attention as ascend_attention
from pangu_ms.ops.ascend import elementary as ascend
from pangu_ms.ops.ascend import experts as ascend_experts
from tests.ops.cells import Call, op_by_op

device.start()
ANY = np.random.default_rng(0)
TOLERANCE = 2e-6
BATCH, LENGTH, HEADS, NOPE, ROPE, VALUE, LATENT, SINKS = 2, 5, 3, 6, 4, 5, 8, 4
PLACES, K = 11, 6
SCALE = (NOPE + ROPE) ** -0.5


@pytest.fixture(autouse=True)
def formulas_alone(monkeypatch):
    """Around the fused operators stand formulas, as on a device."""
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")


def attends(attention):
    """An attention as a function of tensors alone; the largest logits come with it."""
    def call(q, sinks, keys, visible, kv_b, scale):
        return attention(q, sinks, keys, visible, {"weight": kv_b}, scale, True)
    return call


def attends_sparsely(attention):
    def call(q, sinks, keys, indices, position, kv_b, scale):
        return attention(q, sinks, keys, indices, position, {"weight": kv_b}, scale)
    return call


def groups(product):
    def call(x, ids, weights, gate, up, down):
        return product(x, ids, weights, {"gate": {"weight": gate}, "up": {"weight": up}, "down": {"weight": down}})
    return call


def loses(cross_entropy):
    def call(hidden, head, labels, mask):
        return cross_entropy(hidden, {"weight": head}, labels, mask)
    return call


def agree(fused, formula, arguments, constants=(), gradient=False):
    cells = [Call(form, *constants) for form in (fused, formula)]
    if gradient:
        cells = [ops.GradOperation(get_all=True)(cell) for cell in cells]
    found, wanted = cells[0](*arguments), op_by_op(cells[1], *arguments)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, wanted))):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=TOLERANCE * np.abs(other.asnumpy()).max())


def normal(*shape):
    return ms.Tensor(ANY.normal(size=shape).astype(np.float32))


def integers(low, high, *shape):
    return ms.Tensor(ANY.integers(low, high, shape).astype(np.int32))


def takes_three(a, b, c):
    """In place of what an operator takes on the device: everything."""
    return True


def takes_four(a, b, c, d):
    return True


def takes_five(a, b, c, d, e):
    return True


# ---------------------------------------------------------------- attention

def flash_attention_score(query, key, value, attn_mask, head_num, scale):
    """BSND: all of one width; attn_mask [B, 1, S1, S2], True is discarded. Fewer heads of keys serve groups. The first
    output is softmax_max [B, N1, S1, 8]."""
    assert key.shape == value.shape and query.shape[2:] == (head_num, key.shape[3])
    key, value = (ops.repeat_interleave(each, head_num // each.shape[2], 2) for each in (key, value))
    assert attn_mask.shape == (query.shape[0], 1, query.shape[1], key.shape[1])
    query, key, value = (ops.transpose(each, (0, 2, 1, 3)) for each in (query, key, value))
    score = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) * scale
    score = ops.masked_fill(score, attn_mask, -1e30)
    largest = ops.tile(ops.stop_gradient(ops.ReduceMax(True)(score, -1)), (1, 1, 1, 8))
    return largest, ops.transpose(ops.matmul(ops.softmax(score, -1), value), (0, 2, 1, 3))


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(ascend_attention, "flash_attention_score", flash_attention_score)
    monkeypatch.setattr(ascend_attention, "_flash_takes", takes_three)


@pytest.mark.parametrize("value", [VALUE, NOPE + ROPE])
@pytest.mark.parametrize("gradient", [False, True])
def test_expanded_attention(flash, value, gradient):
    visible = ANY.integers(0, 2, (BATCH, LENGTH, 1, SINKS + PLACES)).astype(bool)
    visible[..., :SINKS] = True
    arguments = (normal(BATCH, LENGTH, HEADS, NOPE + ROPE), normal(SINKS, LATENT + ROPE),
                 normal(BATCH, PLACES, LATENT + ROPE), ms.Tensor(visible), normal(HEADS * (NOPE + value), LATENT))
    agree(attends(ascend_attention.expanded_attention), attends(latent_attention.expanded_attention.formula), arguments,
          (SCALE,), gradient)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("sinks, value", [(0, 6), (3, 4)])
def test_grouped_attention(flash, gradient, sinks, value):
    """Values as wide as keys, and narrower ones behind sinks."""
    def without(attention):
        return lambda q, keys, values, visible, scale: attention(q, keys, values, visible, scale, None, True)

    def behind(attention):
        return lambda q, keys, values, visible, sink_keys, sink_values, scale: attention(
            q, keys, values, visible, scale, {"keys": sink_keys, "values": sink_values}, True)

    call = behind if sinks else without
    visible = ANY.integers(0, 2, (BATCH, LENGTH, 1, sinks + PLACES)).astype(bool)
    visible[..., 0] = True
    keys, values = normal(BATCH, PLACES, 2, 6), normal(BATCH, PLACES, 2, value)
    own = (normal(sinks, 2, 6), normal(sinks, 2, value)) if sinks else ()
    agree(call(ascend_attention.grouped_attention), call(grouped_query_attention.grouped_attention.formula),
          (normal(BATCH, LENGTH, 4, 6), keys, values, ms.Tensor(visible), *own), (SCALE,), gradient)


def sparse_flash_attention(query, key, value, sparse_indices, scale_value, actual_seq_lengths_query=None,
                           actual_seq_lengths_kv=None, query_rope=None, key_rope=None, attention_mode=0,
                           return_softmax_lse=False):
    """BSND, one head of keys, sparse_mode 3: query i sees index s <= kv length - q length + i, and nothing below 0.

    -> out [B, S1, N1, D]; largest score and sum of the others' exp over it [B, 1, S1, N1], float32.
    """
    assert attention_mode == 2 and return_softmax_lse and key.shape == value.shape
    batch, length, heads, latent = query.shape
    assert heads in (1, 2, 4, 8, 16, 32, 64, 128) and key.shape == (batch, key.shape[1], 1, latent)
    assert query_rope.shape[:3] == query.shape[:3] and key_rope.shape[:3] == key.shape[:3]
    assert sparse_indices.shape[:3] == (batch, length, 1)
    rows = ops.reshape(ops.maximum(sparse_indices, 0), (batch, -1, 1))          # [B, S1 * K, 1]
    keys = ops.cat((key, key_rope), -1)[:, :, 0]
    keys = ops.gather_elements(keys, 1, ops.tile(rows, (1, 1, keys.shape[2])))
    keys = ops.reshape(keys, (batch, length, -1, keys.shape[2]))                # [B, S1, K, D + D_rope]
    score = ops.matmul(ops.cat((query, query_rope), -1), ops.transpose(keys, (0, 1, 3, 2))) * scale_value
    last = ops.reshape(actual_seq_lengths_kv - actual_seq_lengths_query, (-1, 1)) + ops.arange(length)
    index = sparse_indices[:, :, 0]
    seen = ops.logical_and(index >= 0, index <= ops.expand_dims(last, 2))
    score = ops.masked_fill(score, ops.expand_dims(ops.logical_not(seen), 2), -1e30)
    top = ops.ReduceMax(True)(score, -1)
    weight = ops.exp(score - top)
    total = ops.sum(weight, -1, keepdim=True)
    out = ops.matmul(weight, keys[..., :latent]) / total
    return out, ops.transpose(top, (0, 3, 1, 2)), ops.transpose(total, (0, 3, 1, 2))


@pytest.fixture
def sparse(monkeypatch):
    monkeypatch.setattr(ops, "sparse_flash_attention", sparse_flash_attention)
    monkeypatch.setattr(ascend_attention, "_sparse_takes", takes_five)


@pytest.mark.parametrize("heads", [HEADS, 4])
def test_sparse_attention(sparse, heads):
    """Queries with fewer earlier rows than K, with places that are filled up behind them or by -1."""
    first = np.array([[0], [5]])
    position = (first + np.arange(LENGTH)).astype(np.int32)
    chosen = np.stack([[np.concatenate((ANY.permutation(p + 1), p + 1 + ANY.permutation(PLACES - p - 1)))[:K]
                        for p in row] for row in position]).astype(np.int32)
    chosen[1, 0, -1] = chosen[0, 3, -2:] = -1
    arguments = (normal(BATCH, LENGTH, heads, NOPE + ROPE), normal(SINKS, LATENT + ROPE),
                 normal(BATCH, PLACES, LATENT + ROPE), ms.Tensor(chosen), ms.Tensor(position),
                 normal(heads * (NOPE + VALUE), LATENT))
    agree(attends_sparsely(ascend_attention.sparse_attention),
          attends_sparsely(latent_attention.sparse_attention.formula), arguments, (SCALE,))


def test_few_queries_gather_their_rows(sparse, monkeypatch):
    """As in decoding: the fused operator would copy the whole cache."""
    monkeypatch.setattr(ops, "sparse_flash_attention", None)
    arguments = (normal(1, 1, HEADS, NOPE + ROPE), normal(SINKS, LATENT + ROPE), normal(1, PLACES, LATENT + ROPE),
                 integers(0, PLACES, 1, 1, K), integers(6, 7, 1, 1), normal(HEADS * (NOPE + VALUE), LATENT))
    agree(attends_sparsely(ascend_attention.sparse_attention),
          attends_sparsely(latent_attention.sparse_attention.formula), arguments, (SCALE,))


def lightning_indexer(query, key, weights, actual_seq_lengths_query=None, actual_seq_lengths_key=None,
                      sparse_count=2048):
    """BSND, sparse_mode 3: the rows with the largest sum over heads of weight * relu(q . k), -1 for what is missing."""
    assert query.shape[2] == 64 and key.shape[2] == 1 and weights.shape == query.shape[:3]
    assert weights.dtype == query.dtype
    each = ops.relu(ops.matmul(query, ops.expand_dims(ops.transpose(key[:, :, 0], (0, 2, 1)), 1)))
    score = ops.sum(each * ops.expand_dims(weights, 3), 2)                      # [B, S1, S2]
    last = ops.reshape(actual_seq_lengths_key - actual_seq_lengths_query, (-1, 1)) + ops.arange(query.shape[1])
    ahead = ops.arange(key.shape[1]) > ops.expand_dims(last, 2)
    values, chosen = ops.topk(ops.masked_fill(score, ahead, -1e30), sparse_count)
    return ops.expand_dims(ops.masked_fill(chosen, values < -1e29, -1), 2), values


def test_topk_indices(monkeypatch):
    monkeypatch.setattr(ops, "lightning_indexer", lightning_indexer)
    monkeypatch.setattr(ascend_attention, "_index_takes", takes_four)
    position = np.array([[0], [5]]) + np.arange(LENGTH)
    arguments = (normal(BATCH, LENGTH, HEADS, 4), normal(BATCH, PLACES, 4), normal(BATCH, LENGTH, HEADS),
                 ms.Tensor(position.astype(np.int32)))
    found, wanted = (Call(form, K)(*arguments).asnumpy()
                     for form in (ascend_attention.topk_indices, indexer.topk_indices.formula))
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    for b, t in np.ndindex(*position.shape):
        seen = {row for row in wanted[b, t].tolist() if row <= position[b, t]}
        assert len(seen) == min(K, position[b, t] + 1)
        assert {row for row in found[b, t].tolist() if row >= 0} == seen


# ---------------------------------------------------------------- experts

def moe_token_permute(tokens, indices):
    """Tokens with the same index next to each other, and where each pair of token and choice went, int32 [N * K]."""
    flat = ops.reshape(indices, (-1,))
    pair, mine, others = ops.arange(flat.shape[0]), ops.expand_dims(flat, 1), ops.expand_dims(flat, 0)
    before = others < mine
    same = ops.logical_and(others == mine, ops.expand_dims(pair, 0) < ops.expand_dims(pair, 1))
    place = ops.cast(ops.sum(ops.cast(ops.logical_or(before, same), ms.float32), 1), ms.int32)
    token = ops.cast(pair // indices.shape[1], ms.int32)
    order = ops.tensor_scatter_update(ops.zeros_like(flat), ops.expand_dims(place, 1), token)
    return ops.gather(tokens, order, 0), place


def moe_token_unpermute(permuted_tokens, sorted_indices):
    return ops.gather(permuted_tokens, sorted_indices, 0)


def gmm(x, weight, group_list=None, group_list_type=0):
    """x [M, K], weight [E, K, N], group_list int64 [E]: sizes of the groups, in turn. Rows of none hold anything."""
    assert group_list_type == 1 and group_list.dtype == ms.int64 and group_list.shape == weight[0].shape[:1]
    end = ops.cumsum(ops.cast(group_list, ms.int32), 0)
    at = ops.expand_dims(ops.arange(x[0].shape[0]), 1)
    mine = ops.logical_and(at < end, at >= end - ops.cast(group_list, ms.int32))            # [M, E]
    y = ops.transpose(ops.matmul(x[0], weight[0]), (1, 0, 2))                   # [M, E, N]
    anything = ops.cast(at >= end[-1], y.dtype) * 77
    return (ops.sum(y * ops.expand_dims(ops.cast(mine, y.dtype), 2), 1) + anything,)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape, elsewhere", [((7,), 0), ((2, 3), 0), ((9,), 2)])
def test_experts_grouped(monkeypatch, gradient, shape, elsewhere):
    """One expert has no token; choices of experts that other ranks have add nothing."""
    monkeypatch.setattr(ops, "moe_token_permute", moe_token_permute)
    monkeypatch.setattr(ops, "moe_token_unpermute", moe_token_unpermute)
    monkeypatch.setattr(ops.function.math_func, "gmm", gmm)
    ids = np.stack([ANY.choice(4 + 2 * elsewhere, 2, replace=False) for _ in range(np.prod(shape))]) - elsewhere
    ids = ids.reshape(*shape, 2)
    arguments = (normal(*shape, 6), ms.Tensor(ids.astype(np.int32)), normal(*shape, 2), normal(5, 3, 6),
                 normal(5, 3, 6), normal(5, 6, 3))
    agree(groups(ascend_experts.experts_grouped), groups(experts.experts_grouped.formula), arguments, (), gradient)


# ---------------------------------------------------------------- small ones

def turns(apply_rope):
    def call(x, cos, sin, start, interleaved):
        return apply_rope(x, {"cos": cos, "sin": sin, "interleaved": interleaved}, start)
    return call


def rotary_position_embedding(x, cos, sin, mode):
    """BSND, all of one dtype. x * cos + y * sin: mode 0, y is [-second half, first half]; mode 1, the same in pairs."""
    assert mode in (0, 1) and x.dtype == cos.dtype == sin.dtype and cos.shape == (x.shape[0], x.shape[1], 1, x.shape[3])
    half = x.shape[3] // 2
    if mode == 1:
        return x * cos + ops.reshape(ops.stack((-x[..., 1::2], x[..., ::2]), -1), x.shape) * sin
    return x * cos + ops.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("start, width, interleaved", [(0, 4, False), (0, 7, True), (3, 7, False), (2, 9, True)])
def test_apply_rope(monkeypatch, start, width, interleaved):
    monkeypatch.setattr(ascend, "_ROTATE", rotary_position_embedding)
    angle = ANY.normal(size=(BATCH, LENGTH, 1, 2)).astype(np.float32)
    arguments = normal(BATCH, LENGTH, HEADS, width), ms.Tensor(np.cos(angle)), ms.Tensor(np.sin(angle))
    for gradient in (False, True):
        agree(turns(ascend.apply_rope), turns(rope.apply_rope.formula), arguments, (start, interleaved), gradient)


def swiglu(x, dim):
    first, second = ops.split(x, x.shape[dim] // 2, dim)
    return first * ops.sigmoid(first) * second


def test_swiglu(monkeypatch):
    monkeypatch.setattr(ops, "swiglu", swiglu)
    agree(ascend.swiglu, elementary.swiglu.formula, (normal(2, 3, 4), normal(2, 3, 4)))


@pytest.mark.parametrize("gradient", [False, True])
def test_cross_entropy(monkeypatch, gradient):
    """In pieces of 4, 4 and 2 rows."""
    monkeypatch.setattr(cross_entropy, "ROWS", 4)
    mask = ms.Tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.5, 1.0, 1.0, 1.0, 1.0]], ms.float32)
    arguments = normal(2, 5, 4) * 5, normal(9, 4), integers(0, 9, 2, 5)
    agree(loses(cross_entropy.streamed_cross_entropy), loses(cross_entropy.cross_entropy.formula), arguments, (mask,),
          gradient)


def topk_ext(x, k, dim):
    values, indices = ops.topk(x, k, dim)
    return values, ops.cast(indices, ms.int64)


def test_top_k(monkeypatch):
    monkeypatch.setattr(mint, "topk", topk_ext)
    agree(ascend.top_k, elementary.top_k.formula, (normal(3, 9),), (4,))


# ---------------------------------------------------------------- what the operators take

@pytest.mark.parametrize("fields, takes", [
    ({}, True), ({"num_attention_heads": 64}, True), ({"num_attention_heads": 129}, False),
    ({"index_topk": 1024}, False), ({"kv_lora_rank": 256}, False), ({"qk_rope_head_dim": 32}, False),
    ({"index_head_dim": 64}, False), ({"index_n_heads": 65}, False), ({"compute_dtype": "float32"}, False),
    ({"compute_dtype": "float16"}, True)])
def test_which_models_select_without_copies(fields, takes):
    plan = PanguConfig.flash_92b(**{"compute_dtype": "bfloat16"} | fields).plan
    assert ascend_attention.gathers_no_rows(plan) is takes
