"""Training steps of an adapter: its pairs alone change."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM
from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.adapters import Adapter, is_adapter
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.adamw import AdamW
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.adapters import add_adapter
from pangu_ms.training.run.callbacks import split_parameters
from pangu_ms.training.step import TrainStep

ADAPTER = Adapter(2, 4.0, 0.2, r".*\.(self_attn\.(q_b|kv_b)_proj|mlp\.experts\.\d+\.down_proj|eh_proj)")


@pytest.fixture(scope="module")
def trained(one_layer):
    """A step, and the values before and after two of them."""
    model = PanguForCausalLM(config_from_dict(one_layer))
    initialize(model, 0, TrainingSettings(moe_init_std=0.05))
    add_adapter(model, ADAPTER, "base", 0)
    objective = Pretraining(model, TrainingSettings())
    step = TrainStep(objective, PanguMuon(objective.trained_parameters(), model.config, 1e-2))
    draw = np.random.default_rng(0)
    batch = (ms.Tensor(draw.integers(0, 268, (2, 8)), ms.int32), ms.Tensor(draw.integers(0, 268, (2, 8)), ms.int32),
             ms.Tensor(np.ones((2, 8)), ms.float32), ms.Tensor(np.tile(np.arange(8), (2, 1)), ms.int32))
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    losses = [step(*batch)[0].asnumpy().item() for _ in range(6)]
    return step, before, {p.name: p.asnumpy() for p in model.get_parameters()}, losses


def test_the_base_stays_bit_by_bit_and_all_pairs_change(trained):
    step, before, after, losses = trained
    pairs = {name for name in before if is_adapter(name)}
    assert len(pairs) == 2 * 7 and {p.name for p in step.optimizer.parameters} == pairs
    for name, values in before.items():
        if name != "lora_dropout_call":
            assert (values.tobytes() == after[name].tobytes()) == (name not in pairs), name
    assert losses[-1] < losses[0]


def test_pairs_are_for_adamw(trained):
    """Muon would take A and B for maps between hidden vectors and give both singular values of one size."""
    assert [type(group) for group in trained[0].optimizer.groups] == [AdamW]


def test_a_checkpoint_has_the_pairs_and_what_a_resumed_run_needs(trained):
    step, before, after, losses = trained
    weights, others = split_parameters(step)
    assert weights.keys() == {name for name in before if is_adapter(name)}
    assert others["lora_dropout_call"].asnumpy().tolist() == [-len(losses)]     # of the last step
    assert not others.keys() & (before.keys() - {"lora_dropout_call"})
    assert {name.split(".")[0] for name in others if is_adapter(name)} == {"adam_m", "adam_v"}
