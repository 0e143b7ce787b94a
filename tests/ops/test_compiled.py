"""Each compiled operator against the formula it replaces: results, gradients, lengths that change after compiling."""
import inspect
import sys
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from pangu_ms import device
from pangu_ms.cache import rings
from pangu_ms.model.linear import linear
from pangu_ms.model.rope import RotaryAngles
from pangu_ms.ops import cpu
from pangu_ms.ops.cpu import library
from tests.ops import flat
from tests.ops.cells import Call, op_by_op

device.start()

if not library.available(ms.float32):
    pytest.skip("the compiled operators are not built here (python setup.py build_ext --inplace) or turned off",
                allow_module_level=True)

TOLERANCE = 1e-6  # of the largest value
GRADIENT_TOLERANCE = 1e-5  # the same formula, but what adds up to nearly zero is summed in another order
CONSTANTS = {"cos", "sin", "scale", "mask"}  # of a model: the compiled forms have no gradient for them
SIGNATURES = {name: getattr(flat, name).formula for name in ("swiglu", "masked_softmax", "short_conv", "mhc_post")}
ANY = np.random.default_rng(0)


def normal(*shape):
    return ms.Tensor(ANY.normal(size=shape).astype(np.float32))


def angles(batch, length, half):
    angle = ANY.uniform(0, 6, size=(batch, length, 1, half))
    return ms.Tensor(np.cos(angle).astype(np.float32)), ms.Tensor(np.sin(angle).astype(np.float32))


def mask(*shape):
    """Random, with the first entry of each row seen, so that no row is empty."""
    seen = ANY.uniform(size=shape) < 0.6
    seen[..., 0] = True
    return ms.Tensor(seen)


def causal(batch, length, sinks, keys, window):
    """What queries at the end of `keys` rows see: the sinks, and `window` rows up to themselves."""
    distance = np.arange(keys - length, keys)[:, None] - np.arange(keys)
    seen = np.concatenate((np.ones((length, sinks), bool), (distance >= 0) & (distance < window)), 1)
    return ms.Tensor(np.tile(seen[None, :, None], (batch, 1, 1, 1)))


def attention(batch, length, keys, per_query=False, heads=3, nope=6, rope=4, value=5, latent=21, sinks=3, window=9):
    rows = (batch, length, keys) if per_query else (batch, keys)
    seen = mask(batch, length, 1, sinks + keys) if per_query else causal(batch, length, sinks, keys, window)
    return (normal(batch, length, heads, nope + rope), normal(sinks, latent + rope) if sinks else None,
            normal(*rows, latent + rope), seen, normal(heads * (nope + value), latent), 0.3)


def grouped(batch, length, keys, heads=6, groups=2, width=8, value=8, sinks=0):
    found = (normal(batch, length, heads, width), normal(batch, keys, groups, width),
             normal(batch, keys, groups, value), causal(batch, length, sinks, keys, 99), 0.35)
    return found + ((normal(sinks, groups, width), normal(sinks, groups, value)) if sinks else ())


def streams(batch, length, n, hidden, gates):
    width = n * hidden
    return normal(batch, length, n, hidden), normal(width), normal(gates, width) * 0.1


def routing(rows, experts, choices, skewed):
    if skewed:
        ids = np.tile(np.arange(experts - choices, experts), (*rows, 1))
    else:
        ids = ANY.uniform(size=(*rows, experts)).argsort(-1)[..., :choices]
    return ms.Tensor(ids.astype(np.int32)), ms.Tensor(ANY.uniform(size=(*rows, choices)).astype(np.float32))


def experts(rows, hidden, width, count, choices, skewed=False, elsewhere=0):
    """elsewhere: as many experts before these, and as many behind them, may be chosen too."""
    ids, weights = routing(rows, count + 2 * elsewhere, choices, skewed)
    return (normal(*rows, hidden), ids - elsewhere, weights, normal(count, width, hidden),
            normal(count, width, hidden), normal(count, hidden, width))


def read(batch, length, n, hidden):
    gates = n * (n + 2)
    return *streams(batch, length, n, hidden, gates), normal(3), normal(gates), 1e-6, 20


def head(rows, hidden, words, counted=0.7):
    labels, mask = ANY.integers(0, words, rows), ANY.uniform(0.5, 2, size=rows) * (ANY.uniform(size=rows) < counted)
    return (normal(*rows, hidden), normal(words, hidden), ms.Tensor(labels.astype(np.int32)),
            ms.Tensor(mask.astype(np.float32)))


def conv(batch, length, channels, past, width, shared=False):
    open_ = ms.Tensor(ANY.uniform(size=(1 if shared else batch, length, 1)) < 0.7)
    return normal(batch, length, channels), normal(batch, past, channels), normal(channels, 1, width), open_


CASES = [
    *[("linear", lambda m=m, k=k, n=n: (normal(*m, k), normal(n, k)))
      for m, k, n in [((1, 1), 64, 48), ((1, 2), 77, 13), ((3,), 512, 300), ((2, 9), 33, 17), ((1, 150), 64, 100)]],
    *[("linear_bias", lambda m=m: (normal(*m, 33), normal(17, 33), normal(17))) for m in [(1, 1), (2, 70)]],
    *[("rms_norm", lambda m=m, d=d: (normal(*m, d), normal(d), 1e-5)) for m, d in [((1, 1), 512), ((2, 70), 77)]],
    *[("swiglu", lambda m=m: (normal(*m) * 20, normal(*m))) for m in [(1, 1, 7), (2, 300, 64)]],
    *[("apply_rope", lambda b=b, t=t, s=s, i=i: (normal(b, t, 3, 24), *angles(b, t, 4), s, i))
      for b, t, s, i in [(1, 1, 0, False), (2, 5, 16, True), (2, 70, 7, False), (2, 9, 0, True)]],
    *[("short_conv", lambda a=a: conv(*a))
      for a in [(1, 1, 7, 2, 3), (2, 2, 33, 4, 3), (3, 70, 64, 2, 3), (2, 5, 8, 3, 2)]],
    *[("latent_rows", lambda b=b, t=t, i=i: (normal(b, t, 21), normal(b, t, 27), normal(21), *angles(b, t, 3), 1e-5, i))
      for b, t, i in [(1, 1, False), (2, 70, False), (2, 5, True)]],
    *[("mhc_pre", lambda a=a: read(*a))
      for a in [(1, 1, 4, 64), (2, 3, 4, 33), (1, 70, 4, 16), (2, 2, 2, 9)]],
    *[("mhc_post", lambda b=b, t=t: (normal(b, t, 33), normal(b, t, 4, 1), normal(b, t, 4, 4),
                                                  normal(b, t, 4, 33))) for b, t in [(1, 1), (2, 70)]],
    *[("mhc_merge", lambda b=b, t=t: (*streams(b, t, 4, 33, 4), normal(1), normal(4), 1e-5))
      for b, t in [(1, 1), (2, 35)]],
    *[("choose_experts", lambda r=r, e=e, kind=kind: (normal(*r, e) * 3, normal(e) * 0.1,
                                                      ms.Tensor([2.5] * 4, ms.float32), *kind))
      for r, e, *kind in [((1, 1), 19, True, "sigmoid", False), ((2, 70), 19, True, "sigmoid", False),
                          ((2, 3), 19, False, "sigmoid", False), ((2, 70), 20, False, "softmax", True),
                          ((3,), 20, True, "softmax", False)]],
    *[(form, lambda a=a: experts(*a)) for form, a in [
        ("experts_gathered", ((1, 1), 64, 32, 8, 2)), ("experts_gathered", ((4,), 33, 7, 6, 3)),
        ("experts_grouped", ((2, 75), 33, 17, 6, 3)), ("experts_grouped", ((2, 75), 16, 32, 6, 3, True)),
        ("experts_grouped", ((1, 1), 33, 7, 6, 3)), ("experts_grouped", ((2, 75), 33, 17, 4, 3, False, 2))]],
    *[("feed_forward", lambda m=m: (normal(*m, 33), normal(17, 33), normal(17, 33), normal(33, 17)))
      for m in [(1, 1), (2, 1), (2, 70)]],
    *[("cross_entropy", lambda a=a: head(*a))
      for a in [((1, 1), 33, 7, 1), ((2, 75), 16, 100), ((3, 40), 8, 70000), ((2, 3), 16, 9, 0)]],
    *[("masked_softmax", lambda s=s, v=v: (normal(*s) * 30, mask(*v), 0.7))
      for s, v in [((2, 3, 5, 19), (2, 1, 5, 19)), ((1, 1, 4, 300), (1, 1, 1, 300)), ((2, 1, 3, 8), (1, 1, 1, 8))]],
    *[("grouped_attention", lambda a=a: grouped(*a))                            # few queries, and more of them
      for a in [(1, 1, 1), (2, 5, 30, 4, 4), (1, 8, 8, 6, 1), (1, 2, 2500)]],
    ("grouped_attention_and_largest", lambda: grouped(2, 150, 420, 4, 2, 17, 17)),
    *[(f"grouped_attention_with_sinks{largest}", lambda t=t: grouped(2, t, 90, width=12, value=5, sinks=3))
      for t, largest in ((1, ""), (70, "_and_largest"))],
    *[("absorbed_attention", lambda a=a, k=k: attention(*a, **k)) for a, k in [
        ((1, 1, 40), {}), ((2, 1, 7), {}), ((2, 5, 30), {}), ((2, 5, 12), {"per_query": True}),
        ((1, 3, 20), {"heads": 19, "latent": 32}), ((2, 3, 20), {"sinks": 0})]],
    *[("expanded_attention", lambda a=a, k=k: attention(*a, **k)) for a, k in [
        ((1, 1, 1), {}), ((2, 5, 9), {}), ((2, 70, 70), {"window": 99, "sinks": 16}),
        ((1, 80, 80), {"value": 20, "sinks": 17, "window": 20})]],
    *[("expanded_attention_and_largest", lambda a=a, k=k: attention(*a, **k)) for a, k in [
        ((1, 150, 170), {}), ((2, 70, 70), {"sinks": 0})]],
]


@pytest.mark.parametrize("name, make", CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_equals_the_formula(name, make):
    arguments, formula = make(), compiled(name)
    outputs = results(op_by_op(formula, *arguments))
    for found, wanted in zip(results(Call(formula)(*arguments)), outputs, strict=True):
        close(found, wanted)
    if name == "absorbed_attention":                                            # of decoding: no gradient is compiled
        return
    given = tuple(normal(*y.shape) if y.dtype == ms.float32 else y for y in outputs)
    given = given if len(given) > 1 else given[0]
    gradient = ms.ops.GradOperation(get_all=True, sens_param=True)
    found, wanted = gradient(Call(formula))(*arguments, given), op_by_op(gradient(Call(formula)), *arguments, given)
    tensors = [parameter for parameter, argument in zip(inspect.signature(SIGNATURES.get(name, formula)).parameters,
                                                        arguments, strict=True) if isinstance(argument, ms.Tensor)]
    for parameter, a, b in zip(tensors, found, wanted, strict=True):
        if parameter not in CONSTANTS:
            close(a, b, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name, make", [("linear", lambda t: (normal(1, t, 33), normal(17, 33))),
                                        ("mhc_pre", lambda t: read(1, t, 4, 9)),
                                        ("experts_grouped", lambda t: experts((1, t), 16, 8, 5, 2)),
                                        ("expanded_attention", lambda t: attention(1, t, t)),
                                        ("grouped_attention", lambda t: grouped(1, t, t))])
def test_one_compilation_serves_every_length(name, make):
    formula = compiled(name)
    cell = Call(formula)
    open_lengths = [ms.Tensor(shape=[None if a == 50 else a for a in argument.shape], dtype=argument.dtype)
                    if isinstance(argument, ms.Tensor) else argument for argument in make(50)]
    if name.endswith("attention"):
        open_lengths[3] = ms.Tensor(shape=[1, None, 1, None], dtype=ms.bool_)
    cell.set_inputs(*open_lengths)
    for length in (50, 1, 7, 130):
        arguments = make(length)
        for found, wanted in zip(results(cell(*arguments)), results(op_by_op(formula, *arguments)), strict=True):
            close(found, wanted)


@pytest.mark.parametrize("length, kept", [(1, 1), (3, 3), (2, 5), (40, 5)])  # decoding writes the new rows, prefill all
def test_ring(length, kept):
    batch, size, dim, start = 2, 5, 7, 11
    position = ms.Tensor(np.tile(np.arange(start, start + length, dtype=np.int32), (batch, 1)))
    slots = rings.ring_slots(position, size, length == kept)
    ring, new = normal(batch * size, dim), normal(batch, length, dim)
    kept_rings = [ms.Tensor(ring.asnumpy().copy()) for _ in range(2)]
    found = Call(RingUpdate(slots))(kept_rings[0], new)
    wanted = op_by_op(RingUpdate(slots), kept_rings[1], new)
    assert np.array_equal(found.asnumpy(), wanted.asnumpy())
    assert np.array_equal(*(each.asnumpy() for each in kept_rings))
    assert not np.array_equal(kept_rings[0].asnumpy(), ring.asnumpy())


class RingUpdate(ms.nn.Cell):
    def __init__(self, slots):
        super().__init__()
        self.read, self.write, self.decode = slots["read"], slots["write"], slots["decode"]

    def construct(self, ring, new):
        return rings.ring_update(ring, new, {"read": self.read, "write": self.write, "decode": self.decode,
                                             "count": None})


@pytest.mark.parametrize("compiled_ops", ["0", "1"])
def test_rotary_angles_far_out(compiled_ops, monkeypatch):
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", compiled_ops)
    plan = SimpleNamespace(rope_dim=10, rope_theta=10000.0, max_positions=524288)
    position = np.array([[0, 1, 1023, 1024, 70001], [524287, 524288, 5, 400000, 17]], np.int32)
    angle = position[:, :, None, None] * plan.rope_theta ** (-np.arange(5) / 5)
    cell = RotaryAngles(plan)
    for found, wanted in zip(cell(ms.Tensor(position)), (np.cos(angle), np.sin(angle)), strict=True):
        np.testing.assert_allclose(found.asnumpy(), wanted, rtol=0, atol=3e-7)
    for found, wanted in zip(cell(ms.Tensor([[-3]], ms.int32)), (1, 0), strict=True):
        assert found.shape == (1, 1, 1, 5) and (found == wanted).all()


def test_extreme_values():
    """exp at both ends: gates saturate and nothing overflows."""
    gate = ms.Tensor(np.array([-200, -100, -88, -87, -1e-8, 0, 1e-8, 87, 88, 100, 200], np.float32))
    up = ms.Tensor(np.ones(11, np.float32))
    found = Call(compiled("swiglu"))(gate, up).asnumpy()
    assert np.isfinite(found).all()
    wanted = gate.asnumpy().astype(np.float64) / (1 + np.exp(-gate.asnumpy().astype(np.float64)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-35)


def test_other_dtypes_are_refused_in_words(capfd):
    half = ms.Tensor(np.ones((2, 4), np.float16))
    with pytest.raises(RuntimeError):
        Call(library._operator("Swiglu"))(half, half).asnumpy()
    assert "pangu_ms: Swiglu was given float16 (argument 0): it takes float32" in capfd.readouterr().err


@pytest.mark.parametrize("label", [-1, 5, 10 ** 6])
def test_a_label_outside_the_vocabulary_is_refused_in_words(label, capfd):
    """Where it counts; elsewhere it may be anything."""
    operator = Call(library._operator("CrossEntropy"))
    hidden, weight, labels = normal(2, 3), normal(5, 3), ms.Tensor([label, 4], ms.int32)
    assert operator(hidden, weight, labels, ms.Tensor([0.0, 1.0], ms.float32)).asnumpy()[0] == 0
    with pytest.raises(RuntimeError):
        operator(hidden, weight, labels, ms.Tensor([1.0, 1.0], ms.float32)).asnumpy()
    assert f"CrossEntropy: label {label} of row 0 is outside the vocabulary of 5" in capfd.readouterr().err


def test_another_kind_of_matrix_is_refused():
    with pytest.raises(Exception, match="weight"):
        Call(Quantised())(normal(2, 3), normal(4, 3))


class Quantised(ms.nn.Cell):
    def construct(self, x, weight):
        return linear(x, {"int8": weight, "scale": weight})


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch):
    """Whichever tests ran before."""
    monkeypatch.setattr(sys.modules[__name__], "ANY", np.random.default_rng(0))


def compiled(name):
    """A formula as a function of tensors, for which the library has an operator."""
    assert name.removesuffix("_and_largest").removesuffix("_with_sinks").removesuffix("_bias") in vars(cpu)
    return getattr(flat, name)


def results(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def close(found, wanted, tolerance=TOLERANCE):
    found, wanted = found.asnumpy(), wanted.asnumpy()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if found.dtype == np.int32:
        assert np.array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1e-30))
