"""Each compiled operator of a decoding step against its plain form: what it returns and what it leaves in the cache."""
import mindspore as ms
import numpy as np
import pytest

import pangu_ms.model  # noqa: F401  turns graph mode on
from pangu_ms import ops as operators
from pangu_ms.ops import compiled

if not compiled.available():
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


def row(batch, length, start, half=4, hidden=33, latent=21, ring=5, width=3, places=12):
    whole = latent + 2 * half
    return (normal(batch, length, hidden), normal(whole, hidden), normal(batch * ring, latent),
            normal(latent, 1, width), normal(latent), normal(batch * places, whole), positions(batch, length, start),
            *angles(batch, length, half), 1e-5)


def attention(batch, length, start, window, heads=3, nope=6, rope=4, value=5, latent=21, sinks=3, places=30, hidden=33):
    return (normal(batch, length, heads * (nope + rope)), normal(sinks, latent), normal(sinks, rope), normal(latent),
            normal(batch * places, latent + rope), normal(heads * (nope + value), latent),
            normal(batch * 8, heads * value), normal(heads * value, 1, 4), normal(hidden, heads * value),
            positions(batch, length, start), window, 0.3, 1e-5)


def output(batch, length, start):
    return (normal(batch, length, 21), normal(batch * 8, 21), normal(21, 1, 4), normal(33, 21),
            positions(batch, length, start))


def streams(batch, length, n=4, hidden=9):
    return normal(batch, length, n, hidden)


def read_by(n=4, hidden=9):
    return (normal(hidden), normal(n * hidden), normal(n * (n + 2), n * hidden) * 0.1, normal(3),
            normal(n * (n + 2)), 1e-6, 5, 1e-5)


def write_by(batch, length, n=4, hidden=9):
    return (normal(batch, length, hidden), normal(hidden), normal(batch, length, n, 1),
            normal(batch, length, n, n), streams(batch, length, n, hidden))


def experts(batch, length, hidden=33, count=7, width=17, shared=20, k=3):
    return (normal(batch, length, hidden), normal(count, hidden), normal(count) * 0.1, np.full(k, 2.5, np.float32),
            True, normal(count, width, hidden), normal(count, width, hidden), normal(count, hidden, width),
            normal(shared, hidden), normal(shared, hidden), normal(hidden, shared))


TOKENS = [(1, 1, 0), (1, 1, 40), (1, 4, 1), (2, 3, 11), (3, 5, 40)]
CASES = [
    *[("query", lambda t=t: query(*t)) for t in [*TOKENS, (1, 4, -2)]],
    *[("query", lambda: query(1, 2, 9, width=5, ring=7))],
    *[("row", lambda t=t: row(*t)) for t in [(1, 1, 0), (1, 4, 1), (2, 3, 30), (1, 5, -3)]],
    *[("attention", lambda t=t, w=w: attention(*t, w)) for t, w in
      [((1, 1, 0), 0), ((1, 1, 29), 0), ((2, 3, 11), 0), ((1, 1, 3), 6), ((1, 4, 100), 26), ((3, 5, 40), 9),
       ((1, 4, -2), 9)]],
    *[("attention", lambda: attention(2, 3, 50, 20, heads=19, latent=32))],
    *[("output", lambda t=t: output(*t)) for t in TOKENS],
    *[("read", lambda t=t: (streams(*t), *read_by())) for t in [(1, 1), (2, 4)]],
    *[("write", lambda t=t: (*write_by(*t), 1e-5)) for t in [(1, 1), (2, 4)]],
    *[("turn", lambda t=t: (*write_by(*t), *read_by())) for t in [(1, 1), (2, 4)]],
    *[("experts", lambda t=t: experts(*t)) for t in [(1, 1), (1, 4), (2, 9)]],
]


@pytest.mark.parametrize("name, make", CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_equals_the_plain_form(name, make, monkeypatch):
    arguments = make()
    fast = operators.operator("decoding_" + name, "float32")
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    plain = operators.operator("decoding_" + name, "float32")
    assert isinstance(fast, ms.ops.Custom) and not isinstance(plain, ms.ops.Custom)
    (found, found_state), (wanted, wanted_state) = (run(form, arguments) for form in (fast, plain))
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    for one, other, before in zip(found_state, wanted_state, arguments, strict=True):
        if isinstance(other, np.ndarray) and other.dtype == np.float32:
            close(one, other)
    changed = [not np.array_equal(one, before) for one, before in zip(found_state, arguments)]
    assert sum(changed) == {"query": 1, "row": 2, "attention": 1, "output": 1}.get(name, 0)


def run(form, arguments):
    """The outputs, and what the arguments hold afterwards."""
    given = [ms.Tensor(argument.copy()) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    outputs = Form(form)(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return ([output.asnumpy() for output in outputs],
            [one.asnumpy() if isinstance(one, ms.Tensor) else one for one in given])


def close(found, wanted):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * max(np.abs(wanted).max(), 1e-30))


class Form(ms.nn.Cell):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def construct(self, *arguments):
        return self.form(*arguments)
