"""The two forms of the experts' product, against a loop in numpy, for even and for skewed routing."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import device
from tests.ops import flat
from tests.ops.cells import Call

HIDDEN, WIDTH, EXPERTS, CHOICES = 12, 7, 6, 3
device.start()


@pytest.mark.parametrize("name, tokens", [("experts_gathered", 1), ("experts_gathered", 4),
                                          ("experts_grouped", 1), ("experts_grouped", 150)])
@pytest.mark.parametrize("routing", ["random", "skewed", "elsewhere"])
def test_against_a_loop(name, tokens, routing, monkeypatch):
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")                            # tests/ops has the compiled one
    rng = np.random.default_rng(tokens)
    x, gate, up, down = (rng.normal(size=shape).astype(np.float32) for shape in (
        (tokens, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)))
    weights = rng.uniform(size=(tokens, CHOICES)).astype(np.float32)
    if routing == "random":
        ids = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)]).astype(np.int32)
    elif routing == "elsewhere":  # experts of other ranks, which add nothing
        ids = np.stack([rng.permutation(2 * EXPERTS)[:CHOICES] for _ in range(tokens)]).astype(np.int32) - EXPERTS // 2
    else:  # the last experts get every token, the first none
        ids = np.tile(np.arange(EXPERTS - CHOICES, EXPERTS, dtype=np.int32), (tokens, 1))
    found = Call(getattr(flat, name))(*(ms.Tensor(a) for a in (x, ids, weights, gate, up, down))).asnumpy()
    wanted = np.zeros_like(x)
    for n in range(tokens):
        for k in range(CHOICES):
            e = ids[n, k]
            if not 0 <= e < EXPERTS:
                continue
            g = gate[e] @ x[n]
            wanted[n] += weights[n, k] * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x[n])))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
