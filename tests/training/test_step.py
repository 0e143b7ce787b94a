"""`TrainStep`: accumulation, clipping, and the experts' selection bias."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from pangu_ms import PanguForCausalLM
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.step import TrainStep, Update

TRAINED = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_b_proj.weight",
           "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj.weight")  # of each kind one
BIASES = ("model.layers.0.mlp.e_score_correction_bias", "model.layers.1.mlp.e_score_correction_bias")


class Keep(nn.Cell):
    """An optimizer that writes gradients into its parameters."""

    def __init__(self, parameters):
        super().__init__(auto_prefix=False)
        self.parameters, self.each = ms.ParameterTuple(parameters), ops.Map()
        self.global_step = ms.Parameter(ms.Tensor([0], ms.int32), "global_step")

    def construct(self, gradients):
        return ops.depend(self.each(ops.assign, self.parameters, gradients), ops.assign_add(self.global_step, 1))


@pytest.fixture(scope="module")
def model(small):
    model = PanguForCausalLM(small(initializer_range=0.1, num_hidden_layers=1, first_k_dense_replace=0, swa_layers=[1],
                                   sliding_window_list=[7], block_post_layernorm_idx=[]))
    initialize(model, 0, TrainingSettings(moe_init_std=0.1))
    return model


def update(model, gradients, load, max_norm, bias_rate):
    """-> the norm, the gradients that the optimizer gets, the biases, the gradients' squares, all as arrays."""
    kept = [ms.Parameter(ops.zeros_like(ms.Tensor(g)), f"g{i}") for i, g in enumerate(gradients)]
    cell = Update(Pretraining(model, TrainingSettings()), Keep(kept), max_norm, bias_rate)
    norm, squares = cell(tuple(ms.Tensor(g) for g in gradients), ms.Tensor(load))
    biases = [model.parameters_dict()[name] for name in BIASES]
    found = [bias.asnumpy().copy() for bias in biases]
    for bias in biases:
        bias.set_data(ops.zeros_like(bias))
    return norm.asnumpy().item(), [p.asnumpy() for p in kept], found, squares.asnumpy()


GRADIENTS = [np.float32([[3, 0], [0, 0]]), np.float32([0, -4])]  # of norm 5
LOAD = np.float32([[0, 6, 3, 3, 3, 3, 3, 3], [10, 0, 0, 0, 0, 0, 7, 7]])  # means of 3


@pytest.mark.parametrize("max_norm, share", [(1.0, 0.2), (4.9, 0.98), (5.1, 1.0), (None, 1.0)])
def test_clipping(model, max_norm, share):
    norm, found, _, squares = update(model, GRADIENTS, LOAD, max_norm, 0.0)
    assert norm == pytest.approx(5) and squares.tolist() == [9, 16]
    for gradient, wanted in zip(found, GRADIENTS):
        np.testing.assert_allclose(gradient, share * wanted, rtol=1e-6)


def test_half_precision_gradients_have_a_float32_norm(model):
    """Their squares would overflow."""
    norm, found, *_ = update(model, [np.full(100, 300, np.float16)], LOAD, 1.0, 0.0)
    assert norm == pytest.approx(3000) and found[0].dtype == np.float16
    assert found[0][0] == pytest.approx(0.1, rel=2e-3)


def test_biases_move_towards_an_even_load(model):
    """Up for experts below the mean of their layer, down for those above, by the rate; layers in order."""
    _, _, biases, _ = update(model, GRADIENTS, LOAD, None, 0.01)
    np.testing.assert_allclose(biases[0], 0.01 * np.float32([1, -1, 0, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose(biases[1], 0.01 * np.float32([-1, 1, 1, 1, 1, 1, -1, -1]))


def test_without_a_rate_biases_stay(model):
    _, _, biases, _ = update(model, GRADIENTS, LOAD, None, 0.0)
    assert not np.any(biases)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(model):
    """Neither what the optimizer has nor the biases, whose rate goes by the count of steps."""
    kept = [ms.Parameter(ops.zeros_like(ms.Tensor(g)), f"g{i}") for i, g in enumerate(GRADIENTS)]
    optimizer, bias = Keep(kept), model.parameters_dict()[BIASES[0]]
    rates = ByStep((0, 2, 4), (0.01, 0.0, 0.03))
    cell = Update(Pretraining(model, TrainingSettings()), optimizer, None, rates, skips=True)
    signs = np.float32([1, -1, 0, 0, 0, 0, 0, 0])                               # of LOAD
    steps = ((1, 0, 0.01), (np.nan, 0, 0.01), (2, 0, 0.01), (3, -np.inf, 0.01), (4, 0, 0.04), (1e30, 0, 0.04))
    for count, (factor, loss, moved) in enumerate(steps, 1):
        gradients = tuple(ms.Tensor(np.float32(factor) * g) for g in GRADIENTS)
        norm, _ = cell(ms.mutable(gradients), ms.Tensor(LOAD), ms.Tensor(loss, ms.float32))
        np.testing.assert_allclose(norm.asnumpy(), np.inf if factor == 1e30 else 5 * factor, rtol=1e-6)
        last = max(n for n, other, _ in steps[:count] if n < 1e30 and np.isfinite(other))
        np.testing.assert_array_equal(kept[0].asnumpy(), last * GRADIENTS[0])
        np.testing.assert_allclose(bias.asnumpy(), moved * signs, rtol=1e-6)
        assert optimizer.global_step.asnumpy() == [count]
    for name in BIASES:
        model.parameters_dict()[name].set_data(ops.zeros_like(bias))


@pytest.mark.slow
def test_accumulated_halves_are_one_step(model):
    """As many labels in each half, so that the means are those of the whole batch; two steps."""
    draw = np.random.default_rng(0)
    ids, labels = draw.integers(0, 199, (2, 2, 4, 16)).astype(np.int32)
    position = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    whole_batches = [(ids[i], labels[i], np.ones((4, 16), np.float32), position) for i in range(2)]
    settings = TrainingSettings(balance_loss_coeff=0.1, z_loss_coeff=0.1, indexer_loss="sparse")
    begin = {name: parameter.asnumpy().copy() for name, parameter in model.parameters_dict().items()}

    def run(accumulation):
        """-> outputs of every call, and all parameters after it."""
        for name, parameter in model.parameters_dict().items():
            parameter.set_data(ms.Tensor(begin[name]))
        forward = Pretraining(model, settings)
        trained = [p for p in forward.trainable_params() if p.name in TRAINED]
        optimizer = PanguMuon(trained, model.config, 1e-3, adamw_eps=1e-3)  # what is nearly zero shall hardly move
        step = TrainStep(forward, optimizer, accumulation, 0.5, 0.01)
        found = []
        for batch in whole_batches:
            for part in zip(*(np.split(column, accumulation) for column in batch)):
                outputs = [output.asnumpy() for output in step(*(ms.Tensor(column) for column in part))]
                found.append((outputs, {n: p.asnumpy().copy() for n, p in model.parameters_dict().items()}))
        assert accumulation == 1 or not any(total.asnumpy().any() for total in step.sums)
        return found

    whole, halves = run(1), run(2)
    for name in begin:
        np.testing.assert_array_equal(halves[0][1][name], begin[name], err_msg=name)        # half a step is none
    for i in range(2):
        (total, parts, norm, load, squares), wanted = whole[i]
        first, second = (outputs for outputs, _ in halves[2 * i:2 * i + 2])
        assert (first[0] + second[0]) / 2 == pytest.approx(total, rel=2e-6)
        np.testing.assert_allclose((first[1] + second[1]) / 2, parts, rtol=1e-5)
        np.testing.assert_array_equal(first[3] + second[3], load)
        assert not first[4].any() and second[4] == pytest.approx(squares, rel=1e-4)
        assert first[2] == 0 and second[2] == pytest.approx(norm, rel=1e-5) and norm > 0.5  # clipped, both
        found = halves[2 * i + 1][1]
        for name in begin:
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6, err_msg=name)
            assert (wanted[name] != begin[name]).any() == (name in TRAINED + BIASES), name


@pytest.mark.parametrize("stage, part", [("dense", "indexer_kl"), ("off", "lm")])
def test_a_model_without_experts_is_trained(small, stage, part):
    """Its load has no rows; neither a balance loss nor a bias to update."""
    model = PanguForCausalLM(small(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0,
                                   swa_layers=[], sliding_window_list=[], block_post_layernorm_idx=[]))
    initialize(model, 0)
    forward = Pretraining(model, TrainingSettings(indexer_loss=stage, balance_loss_coeff=0.1, z_loss_coeff=0.1))
    step = TrainStep(forward, PanguMuon(forward.trainable_params(), model.config, 1e-2), bias_update_rate=0.01)
    ids = ms.Tensor(np.random.default_rng(0).integers(0, 199, (1, 16)), ms.int32)
    batch = ids, ids, ms.ops.ones((1, 16)), ms.Tensor(np.arange(16)[None], ms.int32)
    losses = [step(*batch)[0].asnumpy() for _ in range(3)]
    assert forward.part_names == (part,) and losses[2] < losses[0]
    assert step(*batch)[3].shape == (0, 1)
