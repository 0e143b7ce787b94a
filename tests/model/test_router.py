"""The choice of one expert of each group, on logits as skewed as they come."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import device
from tests.ops import flat
from tests.ops.cells import op_by_op

EXPERTS, GROUPS = 64, 8
device.start()


@pytest.mark.parametrize("skew", [0, 5])
def test_every_expert_rank_gets_the_same_number_of_rows(skew):
    """Imbalance is 0 for any number of ranks that have whole groups: no token can lean towards one of them."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 50, EXPERTS)) + skew * draw.normal(size=EXPERTS)
    ids, weights = (found.asnumpy() for found in op_by_op(
        flat.choose_experts, ms.Tensor(logits, ms.float32), ms.Tensor(np.zeros(EXPERTS), ms.float32),
        ms.Tensor(np.ones(GROUPS), ms.float32), False, "softmax", True))
    assert np.array_equal(ids // (EXPERTS // GROUPS), np.broadcast_to(np.arange(GROUPS), ids.shape))
    for ranks in (1, 2, 4, 8):
        load = np.bincount(ids.ravel() // (EXPERTS // ranks), minlength=ranks)
        assert load.max() == load.mean() == 2 * 50 * GROUPS // ranks
    score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, score.reshape(2, 50, GROUPS, -1).max(-1), rtol=1e-6)


def test_the_most_voted_experts_of_a_group_are_kept():
    """Then the tokens of a step share them; with as many as a group has, nothing changes."""
    draw = np.random.default_rng(1)
    logits = draw.normal(size=(6, 1, EXPERTS)) + draw.normal(size=EXPERTS)
    size = EXPERTS // GROUPS

    def chosen(kept):
        return [found.asnumpy() for found in op_by_op(
            flat.choose_most_voted, ms.Tensor(logits, ms.float32), ms.Tensor(np.zeros(EXPERTS), ms.float32),
            ms.Tensor(np.ones(GROUPS), ms.float32), False, "softmax", kept)]

    all_ids, all_weights = chosen(None)
    for found, wanted in zip(chosen(size), (all_ids, all_weights)):
        assert np.array_equal(found, wanted)
    ids, weights = chosen(2)
    score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for group in range(GROUPS):
        votes = np.bincount(all_ids[:, 0, group] - group * size, minlength=size)
        kept = group * size + np.argsort(-votes, kind="stable")[:2]
        wanted = kept[score[:, 0, kept].argmax(-1)]
        assert np.array_equal(ids[:, 0, group], wanted)
        np.testing.assert_allclose(weights[:, 0, group], score[np.arange(6), 0, wanted], rtol=1e-6)
    assert (ids != all_ids).any()
