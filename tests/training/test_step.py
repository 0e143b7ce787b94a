"""The end of a training step: clipping, and the experts' selection bias."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from pangu_ms import PanguForCausalLM
from pangu_ms.training.forward import TrainingForward
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.settings import TrainingSettings
from pangu_ms.training.step import Update

BIASES = ("model.layers.1.mlp.e_score_correction_bias", "model.layers.2.mlp.e_score_correction_bias")


class Keep(nn.Cell):
    """An optimizer that writes gradients into its parameters."""

    def __init__(self, parameters):
        super().__init__(auto_prefix=False)
        self.parameters, self.each = ms.ParameterTuple(parameters), ops.Map()

    def construct(self, gradients):
        return self.each(ops.assign, self.parameters, gradients)


@pytest.fixture(scope="module")
def model(small):
    model = PanguForCausalLM(small(initializer_range=0.1))
    initialize(model, 0, TrainingSettings(moe_init_std=0.1))
    return model


def update(model, gradients, load, max_norm, bias_rate):
    """-> the norm, the gradients that the optimizer gets, the biases, all as arrays."""
    kept = [ms.Parameter(ops.zeros_like(ms.Tensor(g)), f"g{i}") for i, g in enumerate(gradients)]
    cell = Update(TrainingForward(model, TrainingSettings()), Keep(kept), max_norm, bias_rate)
    norm = cell(tuple(ms.Tensor(g) for g in gradients), ms.Tensor(load)).asnumpy()
    biases = [model.parameters_dict()[name] for name in BIASES]
    found = [bias.asnumpy().copy() for bias in biases]
    for bias in biases:
        bias.set_data(ops.zeros_like(bias))
    return norm.item(), [p.asnumpy() for p in kept], found


GRADIENTS = [np.float32([[3, 0], [0, 0]]), np.float32([0, -4])]  # of norm 5
LOAD = np.float32([[0, 6, 3, 3, 3, 3, 3, 3], [10, 0, 0, 0, 0, 0, 7, 7]])  # means of 3


@pytest.mark.parametrize("max_norm, share", [(1.0, 0.2), (4.9, 0.98), (5.1, 1.0), (None, 1.0)])
def test_clipping(model, max_norm, share):
    norm, found, _ = update(model, GRADIENTS, LOAD, max_norm, 0.0)
    assert norm == pytest.approx(5)
    for gradient, wanted in zip(found, GRADIENTS):
        np.testing.assert_allclose(gradient, share * wanted, rtol=1e-6)


def test_half_precision_gradients_have_a_float32_norm(model):
    """Their squares would overflow."""
    norm, found, _ = update(model, [np.full(100, 300, np.float16)], LOAD, 1.0, 0.0)
    assert norm == pytest.approx(3000) and found[0].dtype == np.float16
    assert found[0][0] == pytest.approx(0.1, rel=2e-3)


def test_biases_move_towards_an_even_load(model):
    """Up for experts below the mean of their layer, down for those above, by the rate; layers in order."""
    _, _, biases = update(model, GRADIENTS, LOAD, None, 0.01)
    np.testing.assert_allclose(biases[0], 0.01 * np.float32([1, -1, 0, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose(biases[1], 0.01 * np.float32([-1, 1, 1, 1, 1, 1, -1, -1]))


def test_without_a_rate_biases_stay(model):
    _, _, biases = update(model, GRADIENTS, LOAD, None, 0.0)
    assert not np.any(biases)
