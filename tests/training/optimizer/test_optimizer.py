"""Muon and AdamW against numpy in float64, and the grouping of every parameter of the released model."""
import re

import mindspore as ms
import numpy as np
import pytest

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.tensors import parameters
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.optimizer.adamw import AdamW
from pangu_ms.training.optimizer.groups import decays
from pangu_ms.training.optimizer.muon import orthogonalise
from pangu_ms.training.optimizer.pangu_muon import NS_COEFFICIENTS, PanguMuon

FLASH = PanguConfig.flash_92b()
# Flash's parameters, in layers of every kind. Muon's: how many periods of which rows make one matrix each.
MUON = {
    "self_attn.q_a_proj.weight": (1, (1024,)),
    "self_attn.q_b_proj.weight": (48, (128, 64)),
    "self_attn.kv_a_proj_with_mqa.weight": (1, (512, 64)),
    "self_attn.kv_b_proj.weight": (48, (128, 128)),
    "self_attn.o_proj.weight": (1, (2560,)),
    "self_attn.indexer.wq_b.weight": (1, (3072,)),
    "self_attn.indexer.wk.weight": (1, (128,)),
    "self_attn.indexer.weights_proj.weight": (1, (24,)),
    "mlp.gate_proj.weight": (1, (9216,)),
    "mlp.up_proj.weight": (1, (9216,)),
    "mlp.down_proj.weight": (1, (2560,)),
    "mlp.shared_experts.gate_proj.weight": (1, (1024,)),
    "mlp.shared_experts.up_proj.weight": (1, (1024,)),
    "mlp.shared_experts.down_proj.weight": (1, (2560,)),
    "mlp.experts.gate_proj.weight": (1, (1024,)),
    "mlp.experts.up_proj.weight": (1, (1024,)),
    "mlp.experts.down_proj.weight": (1, (2560,)),
    "eh_proj.weight": (1, (2560,)),
}
# AdamW's, and whether they decay.
ADAMW = {
    "model.embed_tokens.weight": True,
    "lm_head.weight": True,
    "mlp.gate.weight": True,
    "attn_mhc_module.phi.weight": True,
    "mlp_mhc_module.phi.weight": True,
    "model.merge_mhc_module.phi.weight": True,
    "model.merge_mhc_module.norm_gamma": False,
    "model.merge_mhc_module.branch_alpha_pre": False,
    "model.merge_mhc_module.branch_beta_pre": False,
    "model.norm.weight": False,
    "self_attn.qa_conv.weight": False,
    "self_attn.compresskv_conv.weight": False,
    "self_attn.o_conv.weight": False,
    "self_attn.param_sink_compressed_kv": False,
    "self_attn.param_sink_k_pe": False,
    "self_attn.q_a_layernorm.weight": False,
    "self_attn.kv_a_layernorm.weight": False,
    "self_attn.indexer.k_norm.weight": False,
    "input_layernorm.weight": False,
    "post_attention_layernorm.weight": False,
    "pre_mlp_layernorm.weight": False,
    "post_mlp_layernorm.weight": False,
    "block_post_layernorm.weight": False,
    "attn_mhc_module.norm_gamma": False,
    "attn_mhc_module.branch_alpha": False,
    "attn_mhc_module.branch_beta": False,
    "mlp_mhc_module.norm_gamma": False,
    "mlp_mhc_module.branch_alpha": False,
    "mlp_mhc_module.branch_beta": False,
    "enorm.weight": False,
    "hnorm.weight": False,
    "shared_head.norm.weight": False,
}
BY_COUNT = {"mlp.e_score_correction_bias"}  # trained by no optimizer


def test_every_parameter_of_flash_has_its_place():
    names = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in parameters(FLASH)}
    assert names == {*MUON, *ADAMW, *BY_COUNT}
    for name, parameter in parameters(FLASH).items():
        kind = re.sub(r"^model\.layers\.\d+\.", "", name)
        wanted = MUON.get(kind)
        if kind == "mlp.gate_proj.weight" or kind == "mlp.up_proj.weight":
            assert not parameter.layer.moe
        assert parameter.is_matrix == (kind in MUON), name
        if wanted:
            assert parameter.row_pattern == wanted and wanted[0] * sum(wanted[1]) == parameter.rows
        assert decays(parameter) == (True if wanted else ADAMW.get(kind, False)), name


SHAPES = {  # of the tiny model: a wide matrix, tall ones of stacked experts, rows of two kinds; then AdamW's
    "model.layers.0.self_attn.q_a_proj.weight": (32, 48),
    "model.layers.1.self_attn.q_a_proj.weight": (32, 48),
    "model.layers.0.self_attn.q_b_proj.weight": (72, 32),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (32, 48),
    "model.layers.0.self_attn.kv_b_proj.weight": (84, 24),
    "model.layers.1.mlp.experts.down_proj.weight": (8, 48, 20),
    "model.layers.2.mlp.experts.down_proj.weight": (8, 48, 20),
    "model.embed_tokens.weight": (199, 48),
    "model.layers.1.mlp.gate.weight": (8, 48),
    "model.layers.0.self_attn.param_sink_k_pe": (5, 8),
    "model.layers.0.self_attn.o_conv.weight": (36, 1, 3),
    "model.norm.weight": (48,),
}
RATE, DECAY = 0.02, 0.1
DECAYED = [name for name in SHAPES if ".norm" not in name and "sink" not in name and "conv" not in name]


def made(draw, names=SHAPES, dtype=ms.float32):
    return [ms.Parameter(ms.Tensor(draw.normal(size=SHAPES[name]), ms.float32).astype(dtype), name) for name in names]


def matrices(name, array, tiny):
    """The matrices of a parameter as Muon sees them, each [rows, columns], in another way than the optimizer."""
    if array.ndim == 3:
        return list(array)
    heads = {"q_b_proj": (16, 8), "kv_b_proj": (16, 12)}
    for kind, (first, second) in heads.items():
        if kind in name:
            by_head = array.reshape(tiny.num_attention_heads, first + second, -1)
            return [by_head[:, :first].reshape(-1, array.shape[1]), by_head[:, first:].reshape(-1, array.shape[1])]
    return [array[:24], array[24:]] if "kv_a_proj" in name else [array]


@pytest.fixture(scope="module")
def tiny(data):
    return PanguConfig.from_pretrained(data / "tiny")


def is_matrix(config, name):
    return parameters(config)[name].is_matrix


class Steps:
    """Three steps of the optimizer, the learning rate falling, on random gradients; everything in numpy."""

    def __init__(self, config, names=SHAPES, dtype=ms.float32):
        draw = np.random.default_rng(0)
        self.parameters = made(draw, names, dtype)
        self.rates = [RATE, RATE / 2, RATE / 4]
        optimizer = PanguMuon(self.parameters, config, _Falling(RATE), DECAY)
        assert len(optimizer.parameters) == len(self.parameters)
        self.states = {parameter.name: parameter for parameter in optimizer.get_parameters()}
        self.values, self.gradients = [self._values()], []
        for _ in self.rates:
            self.gradients.append({name: draw.normal(size=SHAPES[name]).astype(np.float32) for name in names})
            optimizer(tuple(ms.Tensor(self.gradients[-1][p.name]).astype(dtype) for p in optimizer.parameters))
            self.values.append(self._values())
        self.global_step = optimizer.global_step.asnumpy().item()

    def _values(self):
        return {p.name: p.asnumpy().astype(np.float64) for p in self.parameters}


class _Falling(ms.nn.learning_rate_schedule.LearningRateSchedule):
    """Half of what it was at each step."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def construct(self, step):
        return self.rate * ms.ops.pow(ms.Tensor(0.5, ms.float32), ms.ops.cast(step, ms.float32))


@pytest.fixture(scope="module")
def steps(tiny):
    return Steps(tiny)


def test_muon_steps_have_even_singular_values(steps, tiny):
    """Of each matrix by itself: near 0.2 * sqrt(larger side), within the 0.68 to 1.13 where five steps leave them."""
    seen = 0
    for name in SHAPES:
        if not is_matrix(tiny, name):
            continue
        update = (steps.values[0][name] * (1 - RATE * DECAY) - steps.values[1][name]) / RATE
        for matrix in matrices(name, update, tiny):
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert 0.65 < values.min() and values.max() < 1.2, (name, matrix.shape, values)
            seen += 1
    assert seen == 2 + 2 + 2 + 2 + 2 * 8


def test_muon_against_numpy(steps, tiny):
    """All three steps: momentum, Nesterov, Newton-Schulz, decay, the schedule."""
    for name, shape in SHAPES.items():
        if not is_matrix(tiny, name):
            continue
        value, moment = steps.values[0][name], 0.0
        for step, rate in enumerate(steps.rates):
            gradient = steps.gradients[step][name].astype(np.float64)
            moment = 0.95 * moment + gradient
            parts = [_newton_schulz(m) for m in matrices(name, gradient + 0.95 * moment, tiny)]
            found = (value * (1 - rate * DECAY) - steps.values[step + 1][name]) / rate
            for part, matrix in zip(parts, matrices(name, found, tiny)):
                np.testing.assert_allclose(matrix, part, atol=1e-3, err_msg=name)
            value = steps.values[step + 1][name]


def _newton_schulz(x):
    x = x / np.linalg.norm(x)
    for a, b, c in NS_COEFFICIENTS:
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x * 0.2 * np.sqrt(max(x.shape))


def test_adamw_against_numpy(steps, tiny):
    for name, shape in SHAPES.items():
        if is_matrix(tiny, name):
            continue
        value, first, second = steps.values[0][name], 0.0, 0.0
        for step, rate in enumerate(steps.rates):
            gradient = steps.gradients[step][name].astype(np.float64)
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient ** 2
            change = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8)
            value = value * (1 - rate * DECAY * (name in DECAYED)) - rate * change
            np.testing.assert_allclose(steps.values[step + 1][name], value, atol=1e-5, err_msg=name)


def test_states_belong_to_parameters_by_name(steps, tiny):
    assert steps.global_step == 3
    for name, shape in SHAPES.items():
        kinds = ["muon"] if is_matrix(tiny, name) else ["adam_m", "adam_v"]
        assert [kind for kind in ("muon", "adam_m", "adam_v", "master") if f"{kind}.{name}" in steps.states] == kinds
        assert all(steps.states[f"{kind}.{name}"].shape == shape for kind in kinds)


@pytest.mark.slow
def test_half_precision_keeps_masters(tiny):
    """Steps that are too small for float16 add up in float32."""
    names = ("model.layers.0.self_attn.q_a_proj.weight", "model.embed_tokens.weight", "model.norm.weight")
    rounded = Steps(tiny, names, ms.float16)
    for name in names:
        master = rounded.states[f"master.{name}"]
        assert master.dtype == ms.float32 and master.shape == SHAPES[name]
        np.testing.assert_array_equal(master.asnumpy().astype(np.float16), rounded.values[-1][name].astype(np.float16))
        assert (master.asnumpy() != rounded.values[-1][name]).mean() > 0.5, name
        assert all(state.dtype == ms.float32 for key, state in rounded.states.items() if key.endswith(name)
                   and key != name)


def test_equal_parameters_are_stacked_up_to_a_size(tiny, monkeypatch):
    """As many as fit, and at least one; ranks that share them stack as many for each."""
    weights = [ms.Parameter(ms.ops.zeros((3, 4)), f"model.layers.{i}.self_attn.o_proj.weight") for i in range(5)]
    for values, ranks, wanted in ((10 ** 9, 1, [5]), (25, 1, [2, 2, 1]), (1, 1, [1] * 5), (30, 2, [2, 2, 1])):
        monkeypatch.setattr("pangu_ms.training.optimizer.groups.STACKED", values)
        monkeypatch.setattr(collectives, "all_gather", lambda ranks, dimension: ms.nn.Identity())    # one process
        optimizer = PanguMuon(weights, tiny, ranks=Ranks(data=ranks), shard_states=True)
        assert [len(group.params) for group in optimizer.groups] == wanted
        assert optimizer.ranges == [(sum(wanted[:i]), sum(wanted[:i + 1])) for i in range(len(wanted))]


def test_without_muon_everything_is_adamw(tiny):
    optimizer = PanguMuon(made(np.random.default_rng(0)), tiny, 1e-3, muon=False)
    assert [type(group) for group in optimizer.groups] == [AdamW]
    assert {p.name for p in optimizer.parameters} == {*SHAPES}
    assert sum(name.startswith("adam_m.") for name in (p.name for p in optimizer.get_parameters())) == len(SHAPES)


def test_a_zero_gradient_stays_zero():
    assert not orthogonalise(ms.ops.zeros((2, 3, 5)), NS_COEFFICIENTS).asnumpy().any()
