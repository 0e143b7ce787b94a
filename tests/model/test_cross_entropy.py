"""The head's cross entropy, compiled and not, against numpy in float64."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import device
from tests.ops import flat
from tests.ops.cells import Call

device.start()


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_against_numpy(compiled, monkeypatch):
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", compiled)
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(2, 5, 12)).astype(np.float32), rng.normal(size=(30, 12)).astype(np.float32) * 3
    labels, mask = rng.integers(0, 30, (2, 5)).astype(np.int32), (rng.uniform(size=(2, 5)) < 0.6).astype(np.float32)
    found = Call(flat.cross_entropy)(*(ms.Tensor(a) for a in (hidden, weight, labels, mask))).asnumpy()
    logits = hidden.astype(np.float64) @ weight.T.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    wanted = (np.log(np.exp(logits).sum(-1)) - chosen) * mask
    assert mask.sum() not in (0, mask.size)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
