"""Frozen matrices with low-rank pairs: as if merged, and what pairs drop in training."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from pangu_ms import PanguForCausalLM
from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.adapters import Adapter, adapter_tensors
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.model.adapters import attach
from pangu_ms.model.low_rank import dropped
from pangu_ms.ops.cpu import decoding
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.settings import TrainingSettings


@pytest.mark.parametrize("name, pattern", [
    ("one_layer", r".*\.0\.(self_attn\.\w+_proj\w*|mlp\.(shared_experts|experts\.\d+)\.\w+)"),  # latent attention
    ("pro_moe_v2", r".*(self_attn\.(qkv|o)_proj|\.0\.mlp\.\w+_proj)"),           # grouped queries, a fused projection
])
def test_a_model_with_pairs_is_the_merged_one(data, one_layer, name, pattern):
    config = config_from_dict(one_layer) if name == "one_layer" else read_config(data / name).cut(0, 0, False)
    adapter = Adapter(3, 6.0, 0.0, pattern)
    tensors, draw = adapter_tensors(config, adapter), np.random.default_rng(0)
    model, merged = PanguForCausalLM(config), PanguForCausalLM(config)
    for each in (model, merged):
        initialize(each, 0, TrainingSettings(moe_init_std=0.05))
    ids = draw.integers(0, config.vocab_size, (2, 9))
    before = merged(ids).asnumpy()
    attach(model, {name: p.shape for name, p in tensors.items()}, adapter.scale, 0.0, 0)
    with_pairs, plain = model.parameters_dict(), merged.parameters_dict()
    assert with_pairs.keys() == plain.keys() | tensors.keys()
    for name in [name for name in tensors if ".lora_A." in name]:
        down, up, weight = name, name.replace("lora_A", "lora_B"), name.replace("lora_A.", "")
        assert not with_pairs[up].asnumpy().any()
        bound = with_pairs[down].shape[-1] ** -0.5                              # uniform, as by PEFT
        assert 0.8 * bound < np.abs(with_pairs[down].asnumpy()).max() <= bound
        with_pairs[up].set_data(ms.Tensor(draw.normal(0, 0.1, tensors[up].shape), ms.float32))
        pair = with_pairs[up].asnumpy() @ with_pairs[down].asnumpy()
        plain[weight].set_data(ms.Tensor(plain[weight].asnumpy() + np.float32(2) * pair))
    wanted = merged(ids).asnumpy()
    largest = np.abs(wanted).max()
    assert np.abs(wanted - before).max() > 1e-2 * largest
    np.testing.assert_allclose(model(ids).asnumpy(), wanted, rtol=0, atol=2e-5 * largest)


class Dropped(nn.Cell):
    def __init__(self, rate):
        super().__init__()
        self.call = ms.Parameter(ms.Tensor([1], ms.int32), "call", requires_grad=False)
        self.first, self.second = ({"rate": rate, "call": self.call, "salt": salt} for salt in (0, 1))

    def construct(self, x):
        return dropped(x, self.first), dropped(x, self.second)


def test_dropout_follows_from_the_number_of_the_step():
    cell, x = Dropped(0.25), ms.Tensor(np.full((30, 1000), 3.0), ms.float32)

    def at(call):
        cell.call.set_data(ms.Tensor([call], ms.int32))
        return [y.asnumpy() for y in cell(x)]

    masks = [y for call in (1, 2, 1000) for y in at(call)]
    for y in masks:
        assert set(np.unique(y)) == {0.0, 4.0} and abs(np.mean(y == 0) - 0.25) < 0.01
        zeros = (y.ravel() == 0) - 0.25                                         # neighbours are dropped independently
        assert all(abs(np.mean(zeros[:-shift] * zeros[shift:])) < 5e-3 for shift in (1, 2, 1000))
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(np.mean((one == 0) & (other == 0)) - 0.25 ** 2) < 5e-3
    np.testing.assert_array_equal(at(1)[0], masks[0])
    assert all(np.all(y == 3) for call in (0, -1) for y in at(call))            # outside of training


@pytest.mark.parametrize("step", [
    lambda pair: decoding.moe(None, {"bias": np.zeros(2), "factor": np.ones(2), "gate": {"weight": 0}, "scale": 0,
                                     "scoring": "softmax", "grouped": False, "normalise": True, "kept": None},
                              {"gate": pair, "up": pair, "down": pair}, {}, True),
    lambda pair: decoding.mtp_input(None, None, {"embedding_norm": {"weight": 0}, "hidden_norm": {"weight": 0},
                                                 "projection": pair}, {"decode": True}),
])
def test_a_step_of_decoding_does_not_pass_over_a_pair(step):
    with pytest.raises(KeyError, match="weight"):
        step({"frozen": {"weight": 0}, "lora_A": {"weight": 0}, "lora_B": {"weight": 0}, "scale": 1.0, "dropout": None})
