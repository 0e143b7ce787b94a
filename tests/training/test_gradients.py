"""Gradients of every part of the loss against those of an independent float64 implementation (tests/data).

`gradients.npz`: ids [2, 21]; the value of each loss; the gradients of `total` (lm + the mean of mtp_1 to mtp_3) and
of the indexer's losses, by tensor, under the names of the checkpoint. No tensor has a gradient of both.
"""
import re

import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.step import Gradients

TOLERANCE = 1e-4  # of the largest gradient of a tensor
RUNS = {"sparse": (TrainingSettings(indexer_loss="sparse"), "indexer_kl"),
        "dense": (TrainingSettings(indexer_loss="dense"), "indexer_kl_dense")}


def batch(ids):
    length = ids.shape[1] - 1
    position = np.tile(np.arange(length, dtype=np.int32), (len(ids), 1))
    return [ms.Tensor(array) for array in
            (ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones(position.shape, np.float32), position)]


@pytest.fixture(scope="module")
def gold(data):
    with np.load(data / "tiny" / "gradients.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=RUNS)
def computed(request, data, gold):
    """-> the golden name of the indexer's loss, parts by name, gradients by our parameter names."""
    settings, indexer_loss = RUNS[request.param]
    forward = Pretraining(PanguForCausalLM.from_pretrained(data / "tiny"), settings)
    weights = ms.ParameterTuple(forward.trained_parameters())
    _, parts, _, gradients = Gradients(forward, weights)(*batch(gold["ids"]))
    return (indexer_loss, dict(zip(forward.part_names, parts.asnumpy())),
            dict(zip([p.name for p in weights], [g.asnumpy() for g in gradients])))


def test_values(computed, gold):
    indexer_loss, parts, _ = computed
    for name, value in parts.items():
        assert value == pytest.approx(gold[indexer_loss if name == "indexer_kl" else name], rel=2e-5), name


def test_gradients(computed, gold):
    indexer_loss, parts, gradients = computed
    compared = {key.split("/")[1]: value for key, value in gold.items()
                if key.startswith(f"{indexer_loss}/") or "lm" in parts and key.startswith("total/")}
    assert len(compared) == (8 if indexer_loss == "indexer_kl_dense" else 86)
    off = {}
    for name, value in compared.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        found = gradients[re.sub(r"\.experts\.\d+\.", ".experts.", name)]
        found = found[int(expert[1])] if expert else found
        off[name] = abs(found - value).max() / abs(value).max()
    worst = max(off, key=off.get)
    assert off[worst] < TOLERANCE, f"{worst}: {off[worst]:.2e}"


def test_the_warm_up_trains_the_indexers_alone(computed):
    indexer_loss, _, gradients = computed
    indexers = [".indexer." in name for name in gradients]
    assert any(indexers) and all(gradient.any() for gradient in gradients.values())
    assert all(indexers) == (indexer_loss == "indexer_kl_dense")
