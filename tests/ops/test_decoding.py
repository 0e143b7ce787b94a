"""Each step of a layer in decoding against its formula: what it returns and what it leaves in the cache."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import device
from pangu_ms.ops import cpu
from pangu_ms.ops.cpu import library
from tests.ops import flat
from tests.ops.cells import Call, op_by_op

device.start()

if not library.available(ms.float32):
    pytest.skip("the compiled operators are not built here (python setup.py build_ext --inplace) or turned off",
                allow_module_level=True)

TOLERANCE = 2e-6  # of the largest value
ANY = np.random.default_rng(0)


def normal(*shape):
    return ANY.normal(size=shape).astype(np.float32)


def positions(batch, length, start):
    """Sequences of different lengths."""
    return (start + 3 * np.arange(batch)[:, None] + np.arange(length)).astype(np.int32)


def angles(batch, length, half):
    angle = ANY.uniform(0, 6, size=(batch, length, 1, half))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def query(batch, length, start, heads=3, nope=6, half=4, hidden=33, rank=21, ring=5, width=3):
    return (normal(batch, length, hidden), normal(rank, hidden), normal(batch * ring, rank), normal(rank, 1, width),
            normal(rank), normal(heads * (nope + 2 * half), rank), positions(batch, length, start),
            *angles(batch, length, half), nope, 1e-5)


def attention(batch, length, start, window, heads=3, nope=6, half=2, value=5, latent=21, sinks=3, places=110,
              hidden=33):
    """Rows in a window, whose ring has room for `length` more, or growing ones."""
    rows, whole = window + length if window else places, latent + 2 * half
    return (normal(batch, length, hidden), normal(whole, hidden), normal(batch * 6, latent), normal(latent, 1, 3),
            normal(latent), normal(batch * rows, whole), positions(batch, length, start),
            *angles(batch, length, half), normal(batch, length, heads * (nope + 2 * half)), normal(sinks, latent),
            normal(sinks, 2 * half), normal(heads * (nope + value), latent), normal(batch * 8, heads * value),
            normal(heads * value, 1, 3), normal(hidden, heads * value), heads, window, 0.3, 1e-5)


def without(arguments, *places):
    """A layer that has no convolutions and no sinks."""
    return tuple(None if i in places else argument for i, argument in enumerate(arguments))


def sparse(batch, length, start, k, **shape):
    """Of each token some positions, in no order, the last ones behind its own."""
    *arguments, heads, _, scale, eps = attention(batch, length, start, 0, places=150, **shape)
    last = arguments[6].max() + 2
    indices = np.stack([ANY.permutation(last)[:k] for _ in range(batch * length)]).astype(np.int32)
    return (*arguments, indices.reshape(batch, length, k), heads, scale, eps)


def grouped(batch, length, start, heads=6, groups=2, width=8, value=8, places=110, hidden=33, bias=True, fused=False):
    """The whole head is turned, or where values are of another width a part of it."""
    rows = heads * width, groups * width, groups * value
    matrices = [(normal(n, hidden), normal(n) if bias else None) for n in ((sum(rows),) if fused else rows)]
    half = width // 2 if value == width else 2
    return (normal(batch, length, hidden), *sum(matrices, ()), *[None] * (4 * fused), normal(batch * places, rows[1]),
            normal(batch * places, rows[2]), positions(batch, length, start), *angles(batch, length, half), width,
            value, 0.02)


def of_normed_keys(*shape, width=10, **sizes):
    return (*grouped(*shape, width=width, value=7, **sizes), True, normal(width))


def index_row(batch, length, start, half=4, hidden=33, dim=14, places=60):
    return (normal(batch, length, hidden), normal(dim, hidden), normal(dim), normal(batch * places, dim),
            positions(batch, length, start), *angles(batch, length, half), 1e-5)


def select(batch, length, start, k, heads=3, rank=21, **shape):
    *row_arguments, eps = index_row(batch, length, start, **shape)
    hidden, dim = row_arguments[0].shape[-1], row_arguments[1].shape[0]
    return (*row_arguments, normal(batch, length, rank), normal(heads * dim, rank), normal(heads, hidden),
            np.arange(k, dtype=np.int32), eps)


def streams(batch, length, n=4, hidden=9):
    return normal(batch, length, n, hidden)


def read_by(n=4, hidden=9):
    return (normal(hidden), normal(n * hidden), normal(n * (n + 2), n * hidden) * 0.1, normal(3),
            normal(n * (n + 2)), 1e-6, 5, 1e-5)


def write_by(batch, length, n=4, hidden=9):
    return (normal(batch, length, hidden), normal(hidden), normal(batch, length, n, 1),
            normal(batch, length, n, n), streams(batch, length, n, hidden))


def join(batch, length, hidden=33):
    return (normal(batch, length, hidden), normal(hidden), normal(batch, length, hidden), normal(hidden),
            normal(hidden, 2 * hidden), 1e-5)


def plain_post(batch, length, hidden=33):
    return normal(batch, length, hidden), normal(hidden), normal(batch, length, hidden), 1e-5


def plain_post_pre(batch, length, hidden=33):
    return normal(batch, length, hidden), normal(hidden), normal(batch, length, hidden), normal(hidden), 1e-5


def prenorm_post_pre(batch, length, hidden=33):
    return normal(batch, length, hidden), normal(batch, length, hidden), normal(hidden), 1e-5


def experts(batch, length, hidden=33, count=7, width=17, shared=20, k=3):
    return (normal(batch, length, hidden), normal(count, hidden), normal(count) * 0.1, np.full(k, 2.5, np.float32),
            normal(count, width, hidden), normal(count, width, hidden), normal(count, hidden, width),
            normal(shared, hidden), normal(shared, hidden), normal(hidden, shared))


TOKENS = [(1, 1, 0), (1, 1, 40), (1, 4, 1), (2, 3, 11), (3, 5, 40)]
CASES = [
    *[("latent_query", lambda t=t: query(*t)) for t in [*TOKENS, (1, 4, -2)]],
    *[("latent_query", lambda: query(1, 2, 9, width=5, ring=7))],
    *[("attend", lambda t=t, w=w: attention(*t, w)) for t, w in
      [((1, 1, 0), 0), ((1, 1, 29), 0), ((2, 3, 11), 0), ((1, 1, 3), 6), ((1, 4, 100), 26), ((3, 5, 40), 9),
       ((1, 4, -2), 9)]],
    *[("attend", lambda: attention(2, 3, 50, 20, heads=19, latent=32))],
    *[("attend_sparse", lambda t=t, k=k: sparse(*t, k)) for t, k in
      [((1, 1, 40), 9), ((1, 1, 140), 130), ((2, 3, 11), 12), ((3, 4, 100), 65)]],
    *[("attend_sparse", lambda: sparse(2, 3, 50, 20, heads=19, latent=32))],
    *[("attend_grouped", lambda t=t, k=k: grouped(*t, **k)) for t, k in
      [((1, 1, 0), {}), ((1, 4, 1), {"groups": 6}), ((2, 3, 11), {"groups": 1, "width": 14, "value": 14}),
       ((3, 5, 40), {"bias": False}), ((2, 9, 40), {"heads": 4, "width": 34, "value": 34}),
       ((1, 1, 2999), {"places": 4100}), ((2, 2, 2000), {"heads": 32, "places": 2100})]],
    *[("attend_grouped", lambda t=t, k=k: of_normed_keys(*t, **k)) for t, k in
      [((1, 1, 0), {"fused": True, "bias": False}), ((2, 9, 40), {"fused": True}), ((2, 3, 11), {})]],
    *[("append_index_rows", lambda t=t: index_row(*t)) for t in TOKENS],
    *[("residual_pre", lambda t=t: (streams(*t), *read_by())) for t in [(1, 1), (2, 4)]],
    *[("residual_post", lambda t=t: (*write_by(*t), 1e-5)) for t in [(1, 1), (2, 4)]],
    *[("residual_post_pre", lambda t=t: (*write_by(*t), *read_by())) for t in [(1, 1), (2, 4)]],
    *[(name, lambda t=t, make=make: make(*t)) for t in [(1, 1), (2, 9)]
      for name, make in [("mtp_input", join), ("plain_residual_post", plain_post),
                         ("plain_residual_post_pre", plain_post_pre),
                         ("prenorm_residual_post_pre", prenorm_post_pre)]],
    *[("moe", lambda t=t: (*experts(*t), True)) for t in [(1, 1), (1, 4), (2, 9)]],
    *[("moe_of_groups", lambda t=t: (*experts(*t, count=12), normal(1, 12))) for t in [(1, 1), (2, 9)]],
    ("latent_query", lambda: (*query(2, 3, 11), True)), ("attend", lambda: (*attention(2, 3, 11, 0), True)),
    ("attend", lambda: attention(1, 4, -2, 0)), ("attend_grouped", lambda: (*grouped(2, 3, 11), True)),
    ("latent_query", lambda: without(query(2, 3, 11), 2, 3)),
    *[("attend", lambda t=t: without(attention(*t, 0), 2, 3, 10, 11, 13, 14)) for t in [(2, 3, 11), (1, 4, -2)]],
]
# Arguments that are changed in place, and those that a layer may not have, by their places.
CHANGED = {"latent_query": 1, "attend": 3, "attend_sparse": 3, "attend_grouped": 2, "append_index_rows": 1}
TAPS = {"latent_query": (2,), "attend": (2, 13)}


@pytest.mark.parametrize("name, make", CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_equals_the_formula(name, make):
    arguments = make()
    (found, found_state), (wanted, wanted_state) = both(name, arguments)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    for one, other in zip(found_state, wanted_state, strict=True):
        if isinstance(other, np.ndarray) and other.dtype == np.float32:
            close(one, other)
    changed = [not np.array_equal(one, before) for one, before in zip(found_state, arguments)]
    taps = sum(arguments[i] is None for i in TAPS.get(name, ()))
    assert sum(changed) == CHANGED.get(name, 0) - taps


def test_every_step_of_decoding_is_here():
    """So that none of them is a formula in silence, and none goes without a comparison."""
    steps = {"latent_query", "latent_keys", "attention_output", "grouped_rows", "append_index_rows",
             "select_rows", "residual_pre", "residual_post", "residual_post_pre", "mtp_input",
             "moe"}
    assert steps == {name for name, form in vars(cpu).items() if getattr(form, "__module__", "").endswith("decoding")}


SELECTIONS = [(1, 1, 40, 9), (1, 1, 40, 41), (1, 4, 20, 22), (2, 3, 11, 14), (3, 5, 30, 8)]


@pytest.mark.parametrize("batch, length, start, k", SELECTIONS)
@pytest.mark.parametrize("shape", [{}, {"heads": 19, "dim": 32, "places": 700}], ids=["few", "many"])
def test_selects_what_the_formula_selects(batch, length, start, k, shape):
    start = start * 14 if shape else start
    arguments = select(batch, length, start, k, **shape)
    ((found,), found_state), ((wanted,), wanted_state) = both("select_rows", arguments)
    assert found.shape == wanted.shape == (batch, length, k) and found.dtype == wanted.dtype
    close(found_state[3], wanted_state[3])
    assert not np.array_equal(found_state[3], arguments[3])
    for positions_, scores in [(found, index_scores(*found_state)), (wanted, index_scores(*wanted_state))]:
        best_of(positions_, scores, arguments[4])


@pytest.mark.parametrize("k", [1, 7, 30, 99])
def test_selects_the_best_among_equal_ones(k):
    """Keys of few kinds score the same; which of them is taken does not matter."""
    arguments = list(select(1, 1, 99, k, places=100))
    arguments[3] = np.repeat(arguments[3][:5], 20, 0)
    for (found,), state in both("select_rows", arguments):
        best_of(found, index_scores(*state), arguments[4])


def index_scores(x, weight, norm, kept, position, cos, sin, q_latent, to_q, to_weight, all_, eps):
    """float64 [B, T, S] of what is kept."""
    batch, length, half = *position.shape, cos.shape[-1]
    keys = kept.reshape(batch, -1, kept.shape[1]).astype(np.float64)
    q = (q_latent @ to_q.T).reshape(batch, length, -1, keys.shape[2]).astype(np.float64)
    first, second = q[..., :half], q[..., half:2 * half]
    q = np.concatenate((first * cos - second * sin, second * cos + first * sin, q[..., 2 * half:]), -1)
    return np.einsum("bths,bth->bts", np.maximum(np.einsum("bthd,bsd->bths", q, keys), 0), x @ to_weight.T)


def best_of(found, scores, position):
    """Each query's are different rows, and up to its own position the best, or all; ties either way."""
    found, scores = (rows.reshape(-1, rows.shape[-1]) for rows in (found, scores))
    for at, one, score in zip(position.ravel(), found, scores, strict=True):
        earlier = one[one <= at]
        assert len(set(one)) == len(one) and len(earlier) == min(len(one), at + 1)
        close(np.sort(score[earlier]), np.sort(score[:at + 1])[-len(earlier):])


def both(name, arguments):
    """What the compiled step gives and leaves of the arguments, then what the formula does."""
    found = []
    for run in (lambda function, *given: Call(function)(*given), op_by_op):
        given = [ms.Tensor(argument.copy()) if isinstance(argument, np.ndarray) else argument for argument in arguments]
        outputs = run(getattr(flat, name), *given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found.append(([output.asnumpy() for output in outputs],
                      [one.asnumpy() if isinstance(one, ms.Tensor) else one for one in given]))
    return found


def close(found, wanted):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * max(np.abs(wanted).max(), 1e-30))
