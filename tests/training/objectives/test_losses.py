"""The parts of the loss by hand, or by numpy in float64. `IndexerLoss` has a file of its own."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms.model.trace import tokens_ahead
from pangu_ms.training.objectives.balance import balance_loss, expert_load, z_loss
from pangu_ms.training.objectives.masks import mtp_mask, real_rows


def test_ahead_looks_into_the_row_and_no_further():
    values = ms.Tensor([[1, 2, 3, 4], [5, 6, 7, 8]], ms.int32)
    assert tokens_ahead(values, 1).asnumpy().tolist() == [[2, 3, 4, 0], [6, 7, 8, 0]]
    assert tokens_ahead(values, 3).asnumpy().tolist() == [[4, 0, 0, 0], [8, 0, 0, 0]]


# Documents of 4, 1 and 2 tokens, then one of padding. The last row of each predicts nothing.
POSITION = [0, 1, 2, 3, 0, 0, 1, 0]
LABELLED = [1, 1, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("position, labelled, depth, wanted", [
    (POSITION, LABELLED, 1, [1, 1, 0, 0, 0, 0, 0, 0]),
    (POSITION, LABELLED, 2, [1, 0, 0, 0, 0, 0, 0, 0]),
    (POSITION, LABELLED, 3, [0, 0, 0, 0, 0, 0, 0, 0]),
    ([0, 1, 0, 1], [1, 1, 1, 1], 1, [1, 0, 1, 0]),      # a cut document: its last row has a label all the same
    ([0, 1, 2, 3], [1, 0, 1, 1], 1, [0, 1, 1, 0]),      # a label inside that does not count, as in a user's turn
    ([0, 1, 0, 1, 2], [1, 1, 1, 1, 1], 2, [0, 0, 1, 0, 0]),  # two rows on lies another document, further on its row
])
def test_mtp_mask(position, labelled, depth, wanted):
    found = mtp_mask(ms.Tensor([labelled], ms.float32), ms.Tensor([position], ms.int32), depth)
    assert found.asnumpy().tolist() == [wanted]


@pytest.mark.parametrize("position, labelled, wanted", [
    (POSITION, LABELLED, [1, 1, 1, 1, 0, 1, 1, 0]),     # a document of one token predicts nothing
    ([0, 1, 2, 3], [0, 0, 1, 0], [1, 1, 1, 1]),         # a user's turn belongs to its chat
    ([0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]),
    ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
])
def test_real_rows(position, labelled, wanted):
    found = real_rows(ms.Tensor([labelled], ms.float32), ms.Tensor([position], ms.int32))
    assert found.asnumpy().tolist() == [wanted]


def test_expert_load_counts_tokens_by_sequence():
    ids = ms.Tensor([[[0, 3], [3, 1], [3, 0]], [[2, 1], [1, 2], [0, 1]]], ms.int32)
    assert expert_load(ids, 5, ms.ops.ones((2, 3))).asnumpy().tolist() == [[2, 1, 0, 3, 0], [1, 3, 2, 0, 0]]
    assert expert_load(ids, 5, ms.Tensor([[1.0, 0, 1], [0, 0, 0]])).asnumpy().tolist() == [[2, 0, 0, 2, 0], [0] * 5]


def routed(logits, k):
    """ids int32 [B, T, k] of the largest logits."""
    return ms.Tensor(np.argsort(-logits, -1)[..., :k].astype(np.int32))


def balance(logits, k, real=None):
    real = ms.Tensor(np.ones(logits.shape[:2]) if real is None else real, ms.float32)
    return balance_loss(expert_load(routed(logits, k), logits.shape[-1], real), ms.Tensor(logits, ms.float32),
                        real).asnumpy()


def test_even_routing_has_a_balance_loss_of_one():
    turn = np.stack([np.roll(np.linspace(-2, 2, 6), i) for i in range(12)])[None]
    assert balance(turn, 2) == pytest.approx(1, abs=1e-6)


def test_balance_loss_grows_with_skew():
    draw = np.random.default_rng(0).normal(size=(2, 60, 6))
    losses = [balance(draw + skew * np.array([1, 1, -1, -1, -1, -1]), 2).item() for skew in (0, 0.5, 1, 2, 4)]
    assert losses == sorted(losses) and losses[0] == pytest.approx(1, abs=0.1)
    # All tokens to two experts of six, which are nearly all of the score.
    assert losses[-1] == pytest.approx(6 / 2, rel=0.25)


def test_balance_loss_is_a_mean_over_sequences():
    draw = np.random.default_rng(0).normal(size=(2, 20, 6))
    one, other = balance(draw[:1], 2), balance(draw[1:], 2)
    assert balance(draw, 2) == pytest.approx((one + other) / 2, rel=1e-5) and abs(one - other) > 1e-3


def test_padding_has_no_part_in_the_balance_loss():
    draw = np.random.default_rng(0).normal(size=(2, 20, 6))
    real = np.ones((2, 20))
    real[0, 15:] = 0
    assert balance(draw, 2, real) == pytest.approx((balance(draw[:1, :15], 2) + balance(draw[1:], 2)) / 2, rel=1e-5)
    real[1] = 0
    assert balance(draw, 2, real) == pytest.approx(balance(draw[:1, :15], 2) / 2, rel=1e-5)


def test_gradient_of_the_balance_loss():
    """Against differences in float64, with the counts held fast: they are no part of it."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 7, 5)) + np.array([2, 1, 0, 0, 0])
    real = ms.ops.ones((2, 7))
    load = expert_load(routed(logits, 2), 5, real)
    found = ms.grad(balance_loss, 1)(load, ms.Tensor(logits, ms.float32), real).asnumpy()
    counts = load.asnumpy().astype(np.float64)

    def reference(logits):
        score = 1 / (1 + np.exp(-logits))
        share = (score / score.sum(-1, keepdims=True)).mean(1)
        return (counts / counts.sum(-1, keepdims=True) * 5 * share).sum(-1).mean()

    np.testing.assert_allclose(found, differences(reference, logits), atol=1e-6)
    assert abs(found).max() > 1e-3
    assert not ms.grad(balance_loss, 0)(load, ms.Tensor(logits, ms.float32), real).asnumpy().any()


def test_z_loss():
    logits, weight = np.random.default_rng(0).normal(size=(2, 7, 5)) * 3, np.linspace(0, 0.1, 14).reshape(2, 7)

    def reference(logits):
        return (np.log(np.exp(logits).sum(-1)) ** 2 * weight).sum()

    tensors = ms.Tensor(logits, ms.float32), ms.Tensor(weight, ms.float32)
    assert z_loss(*tensors).asnumpy() == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(ms.grad(z_loss)(*tensors).asnumpy(), differences(reference, logits), atol=1e-5)


def differences(function, at, step=1e-5):
    """The gradient of a function of an array, by central differences in float64."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        aside = np.zeros_like(at)
        aside[i] = step
        gradient[i] = (function(at + aside) - function(at - aside)) / (2 * step)
    return gradient
