"""The selection bias evens out the experts' load by itself, without any gradient."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.step import Update

PLAN = ((0.01, 40), (0.002, 20))  # rates and how many updates with each: coarse, then fine


class Nothing(ms.nn.Cell):
    """An optimizer that changes nothing."""

    def construct(self, gradients):
        return gradients[0]


@pytest.mark.slow
def test_bias_updates_alone_even_out_a_skewed_load(small):
    """All embeddings have a part in common, which the rows of three experts look for: at first most tokens go there.

    The same holds for the MTP layer, whose rows nobody changed: a common part alone makes tokens alike.
    """
    model = PanguForCausalLM(small())
    initialize(model, 0, TrainingSettings(moe_init_std=0.1, post_norm_init=0.1))
    embedding, router = model.model.embed_tokens.weight, model.model.layers[1].mlp.gate.weight
    embedding.set_data(embedding + 0.3)
    rows = router.asnumpy().copy()
    rows[:3] += 0.03
    router.set_data(ms.Tensor(rows))

    forward = Pretraining(model, TrainingSettings())
    draw = np.random.default_rng(0)
    ids, labels = (ms.Tensor(draw.integers(0, 199, (4, 64)), ms.int32) for _ in range(2))
    position = ms.Tensor(np.tile(np.arange(64), (4, 1)), ms.int32)
    ratios = []
    for rate, updates in PLAN:
        update = Update(forward, Nothing(), None, rate)
        for _ in range(updates):
            _, _, load = forward(ids, labels, ms.ops.ones((4, 64)), position)
            ratios.append(load.asnumpy().max(1) / load.asnumpy().mean(1))
            update(ms.mutable((ms.ops.ones(1),)), load)             # else every tuple is a graph of its own
    assert (ratios[0] > 2).all()
    assert np.max(ratios[-10:]) < 1.3, ratios[::10]
