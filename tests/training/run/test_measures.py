"""Gradient norms by part, load by layer, operations a second: from the tables of real configs; nothing is compiled."""
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from pangu_ms.architectures.tensors import has_gradient, parameters
from pangu_ms.errors import PanguError
from pangu_ms.estimate.phases import flops_per_token
from pangu_ms.estimate.work import Case, Work
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run.measures import Measures, peak

LENGTH = 32


@pytest.fixture
def step(small):
    """What `Measures` reads of a `TrainStep`: all gradients are of the norm 2."""
    config = small()
    names = [name for name in parameters(config) if has_gradient(name)]

    def make(names=names, indexed=True, ranks=Ranks()):
        return SimpleNamespace(
            causal_lm=SimpleNamespace(config=config, plan=config.plan, ranks=ranks),
            objective=SimpleNamespace(moe_layers=(1, 2), indexed=indexed),
            optimizer=SimpleNamespace(parameters=[SimpleNamespace(name=name) for name in names]))
    return make


def outputs(step):
    squares = np.full(len(step.optimizer.parameters), 4.0)
    return tuple(ms.Tensor(np.array(value, np.float32)) for value in (0, [0], 0, [[1, 3], [2, 2]], squares))


def test_norms_by_part_and_load_by_layer(step):
    step = step()
    found = Measures(step)(outputs(step), LENGTH, 1e6)
    names = [parameter.name for parameter in step.optimizer.parameters]
    norms = {name.partition("/")[2]: value for name, value in found.items() if name.startswith("grad_norm/")}
    assert norms.keys() == {"embedding", "head", "attention", "indexer", "dense_mlp", "shared_expert", "expert",
                            "router", "mtp", "other"}
    assert sum(value ** 2 for value in norms.values()) == pytest.approx(4 * len(names))
    assert norms["mtp"] ** 2 == 4 * sum(".layers.2." in name for name in names)
    assert norms["indexer"] ** 2 == 4 * sum(".indexer." in name for name in names)
    assert norms["router"] == norms["embedding"] == norms["head"] == 2
    assert (found["expert_balance/layer_1"], found["expert_balance/layer_2"]) == (1.5, 1.0)


@pytest.mark.parametrize("indexed", [True, False])
def test_operations_are_those_of_the_estimate(step, indexed):
    step = step(indexed=indexed, ranks=Ranks(1, 1, 2))
    config = step.causal_lm.config
    of_token = flops_per_token(Case(config, Ranks(batch_sharded=True), Work("train", LENGTH, 1, "float32", fused=True)))
    of_token = sum(value for name, value in of_token["step"].items() if indexed or name != "indexer_loss")
    found = Measures(step, "910B-64GB")(outputs(step), LENGTH, 1e6)
    assert found["tflops"] == pytest.approx(of_token * 1e6 / 2 / 1e12)         # of each of two devices
    assert found["mfu"] == pytest.approx(found["tflops"] / 78)                 # in float32
    assert "mfu" not in Measures(step)(outputs(step), LENGTH, 1e6)


def test_nothing_is_said_of_operations_while_a_part_is_frozen(step):
    frozen = step(["model.layers.0.self_attn.indexer.wk.weight"])
    assert "tflops" not in Measures(frozen)(outputs(frozen), LENGTH, 1e6)


def test_a_device_is_in_the_table():
    assert peak(None, "bfloat16") is None and peak("910B-64GB", "bfloat16") == 313
    with pytest.raises(PanguError, match="PanguMonitor.device: found 'H100', wanted 910B-64GB or"):
        peak("H100", "bfloat16")
