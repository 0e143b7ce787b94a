"""What a step takes from a checkpoint, in a run that goes on and in one that is another stage."""
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run.restore import begin_stage, restore
from pangu_ms.training.run.schedules import check_load_optimizer
from pangu_ms.training.run.state import RunState, save_checkpoint
from tests.checkpoint import generate

NORM = "model.norm.weight"
STATES = {f"adam_m.{NORM}": 0.5, f"adam_v.{NORM}": 0.25, f"master.{NORM}": 3.0, "adam_beta1_power": 0.125}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, data):
    """A checkpoint of step 7."""
    config = generate.config(data, **generate.SMALL)
    weights = {name: np.full(p.shape, 2, np.float32) for name, p in parameters(config).items()}
    states = {name: np.full(weights[NORM].shape if NORM in name else (), value, np.float32)
              for name, value in STATES.items()} | {"global_step": np.array([7], np.int32)}
    return save_checkpoint(str(tmp_path_factory.mktemp("run")), config, weights, states, RunState(7, 28, 5, {}), 1)


def new_step(directory, **states):
    """A step whose parameters are those of the checkpoint and zero; `states` more, or without those that are None."""
    known = parameters(read_config(directory))
    weights = [ms.Parameter(ms.ops.zeros(p.shape, ms.float32), name) for name, p in known.items()]
    size = known[NORM].shape
    named = {name: ms.Parameter(ms.ops.zeros(size if NORM in name else (), ms.float32), name)
             for name in {**STATES, **states} if states.get(name, True)}
    count = ms.Parameter(ms.Tensor([0], ms.int32), "global_step")
    sums = [ms.Parameter(ms.ops.ones(size, ms.float32), f"accumulated.{NORM}")]
    optimizer = SimpleNamespace(global_step=count)
    causal_lm = SimpleNamespace(get_parameters=lambda: weights, config=read_config(directory), adapter=None)
    return SimpleNamespace(causal_lm=causal_lm, optimizer=optimizer, sums=sums,
                           get_parameters=lambda: [*weights, *named.values(), count, *sums]), named


@pytest.mark.parametrize("take, count", [(restore, 7), (begin_stage, 0)])
def test_everything_comes_back_and_a_stage_counts_its_own_steps(directory, take, count):
    """Weights, moments, master copies and powers; sums of gradients stay as they are."""
    step, states = new_step(directory)
    take(step, directory, Ranks())
    assert all((weight.asnumpy() == 2).all() for weight in step.causal_lm.get_parameters())
    for name, value in STATES.items():
        assert (states[name].asnumpy() == value).all(), name
    assert step.optimizer.global_step.asnumpy().tolist() == [count]
    assert (step.sums[0].asnumpy() == 1).all()


@pytest.mark.parametrize("take, states, message", [
    (restore, {"adam_m.x": True}, "step_000007: adam_m.x is not there; another version of this package wrote it"),
    (begin_stage, {"adam_m.x": True}, "adam_m.x is not there; its run trained other parameters, .* leave out"),
    (begin_stage, {f"master.{NORM}": None}, f"master.{NORM} is only there; its run trained other parameters"),
])
def test_other_states_are_one_line_and_nothing_is_changed(directory, take, states, message):
    step, _ = new_step(directory, **states)
    with pytest.raises(ConfigError, match=message) as raised:
        take(step, directory, Ranks())
    assert "\n" not in str(raised.value)
    assert not any(weight.asnumpy().any() for weight in step.causal_lm.get_parameters())


def test_load_optimizer_wants_states(directory, data):
    fields = {"load_checkpoint": directory, "load_optimizer": True, "optimizer": {"type": "PanguMuon"}}
    check_load_optimizer(fields)
    check_load_optimizer({"load_optimizer": False})
    for change, message in (({"load_checkpoint": ""}, "load_optimizer: found True without load_checkpoint"),
                            ({"load_checkpoint": str(data / "tiny")}, "tiny holds no training/optimizer.safetensors"),
                            ({"optimizer": {"type": "AdamW"}}, "optimizer.type AdamW, wanted PanguMuon")):
        with pytest.raises(ConfigError, match=message):
            check_load_optimizer(fields | change)
