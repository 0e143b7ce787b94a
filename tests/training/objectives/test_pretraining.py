"""Packed documents: in one row they give what they give alone, losses, gradients, logits and loads."""
import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM
from pangu_ms.errors import ConfigError
from pangu_ms.model.trace import _mtp_depths
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.step import Gradients

LENGTHS = (11, 1, 9, 2, 3)  # past the window of 7 and index_topk of 8; shorter than the convolutions, than two depths
ROW = 28


def batch(rows):
    """Columns [B, ROW]: in each row documents one behind the other, then padding, every row of it a document."""
    ids, labels, position = np.zeros((3, len(rows), ROW), np.int32)
    loss_mask = np.zeros((len(rows), ROW), np.float32)
    for row, documents in enumerate(rows):
        first = 0
        for document in documents:
            place = slice(first, first := first + len(document))
            ids[row, place], position[row, place] = document, np.arange(len(document))
            labels[row, place] = [*document[1:], 0]
            loss_mask[row, place] = [1] * (len(document) - 1) + [0]
    return [ms.Tensor(column) for column in (ids, labels, loss_mask, position)]


class Logits(ms.nn.Cell):
    """-> logits [B, T, V] of the trunk, then of each depth for the rows that have a token to read."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.causal_lm, self.depths = causal_lm, len(causal_lm.plan.mtp_layers)

    def construct(self, ids, position):
        step = self.causal_lm.whole(position, True)
        merged, _ = self.causal_lm.model(ids, step, None)
        found = (self.causal_lm.logits(merged),)
        for _, logits, _ in _mtp_depths(self.causal_lm, self.depths, ids, merged, step):
            found = found + (logits,)
        return found


@pytest.fixture(scope="module")
def layouts():
    """The same documents, each alone in a row; and all in one row, the others being padding."""
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 199, length) for length in LENGTHS]
    return batch([[document] for document in documents]), batch([documents] + [[]] * (len(documents) - 1))


@pytest.fixture(scope="module")
def forward(small):
    """Weights large enough for attention, indexer and router to have opinions; convolutions that are not zero.

    Without the losses of the router, which know sequences and not documents.
    """
    model = PanguForCausalLM(small(num_nextn_predict_layers=2, swa_layers=[1, 2, 3], sliding_window_list=[7, 7, 7],
                                   initializer_range=0.3))
    settings = TrainingSettings(indexer_loss="sparse", mtp_loss_weight=0.4, moe_init_std=0.3)
    initialize(model, 0, settings)
    draw = np.random.default_rng(2)
    for name, parameter in model.parameters_and_names():
        if name.endswith("conv.weight"):
            parameter.set_data(ms.Tensor(draw.normal(size=parameter.shape) * 0.3, ms.float32))
    return Pretraining(model, settings)


def test_losses_do_not_depend_on_the_layout(forward, layouts):
    (total, alone, load), (packed_total, packed, packed_load) = (forward(*columns) for columns in layouts)
    assert forward.part_names == ("lm", "mtp_1", "mtp_2", "indexer_kl")
    np.testing.assert_allclose(packed.asnumpy(), alone.asnumpy(), rtol=1e-5)
    assert (alone.asnumpy() > 0.05).all()
    for found in (total, packed_total):
        assert found.asnumpy() == pytest.approx(alone.asnumpy() @ [1, 0.2, 0.2, 1], rel=1e-5)
    np.testing.assert_array_equal(load[0].asnumpy(), packed_load[0].asnumpy())
    assert load.shape == (3, 8) and (load.asnumpy().sum(1) == sum(n for n in LENGTHS if n > 1) * 3).all()


def test_logits_do_not_depend_on_the_layout(forward, layouts):
    """A depth that would read beyond the document has no label there, so such rows are left out."""
    logits = Logits(forward.causal_lm)
    alone, packed = ([each.asnumpy() for each in logits(columns[0], columns[3])] for columns in layouts)
    first = 0
    for row, length in enumerate(LENGTHS):
        for depth in range(3):
            rows = max(length - depth, 0)
            wanted, found = alone[depth][row, :rows], packed[depth][0, first:first + rows]
            assert np.abs(found - wanted).max(initial=0) <= 1e-5 * np.abs(wanted).max(initial=0), (length, depth)
        first += length


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_layout(forward, layouts):
    weights = ms.ParameterTuple(forward.trained_parameters())
    gradients = Gradients(forward, weights)
    alone, packed = ([gradient.asnumpy() for gradient in gradients(*columns)[3]] for columns in layouts)
    assert all(wanted.any() for wanted in alone)
    for parameter, wanted, found in zip(weights, alone, packed, strict=True):
        # The streams are much alike at the end, so that the gradients of the merge's gates cancel but for a rest.
        tolerance = 1e-3 if "merge_mhc_module" in parameter.name else 1e-5
        off = abs(found - wanted).max() / abs(wanted).max()
        assert off < tolerance, f"{parameter.name}: {off:.2e}"


def test_no_bias_follows_the_load_where_there_is_none(model):
    forward = Pretraining(model("ultra_moe"), TrainingSettings())
    assert forward.part_names == ("lm", "mtp_1") and not forward.biased and forward.moe_layers == (1, 2, 3, 4)
    with pytest.raises(ConfigError, match="router_bias_update_rate: found 0.1, but no router .* take 0"):
        Pretraining(model("ultra_moe"), TrainingSettings(router_bias_update_rate=0.1))


def test_settings_decide_what_is_computed(small):
    settings = {
        ("lm", "mtp_1"): {},
        ("lm", "mtp_1", "balance", "z"): {"balance_loss_coeff": 0.1, "z_loss_coeff": 0.1},
        ("lm", "mtp_1", "indexer_kl"): {"indexer_loss": "sparse"},
        ("indexer_kl",): {"indexer_loss": "dense", "balance_loss_coeff": 0.1, "z_loss_coeff": 0.1},
    }
    model = PanguForCausalLM(small())
    for names, given in settings.items():
        forward = Pretraining(model, TrainingSettings(**given))
        assert forward.part_names == names
        trained = {parameter.name for parameter in forward.trained_parameters()}
        assert all(".indexer." in name for name in trained) == (len(names) == 1) and trained
        assert not any(name.endswith("e_score_correction_bias") for name in trained)
    assert all(parameter.requires_grad for parameter in model.get_parameters()), "the caller's model is left as it was"


def test_config_decides_the_weight_of_the_balance_loss_where_no_setting_does(model):
    network = model("pro_moe")
    for settings, wanted in ((TrainingSettings(), 1e-3), (TrainingSettings(balance_loss_coeff=0.2), 0.2)):
        forward = Pretraining(network, settings)
        assert forward.part_names == ("lm", "balance")
        np.testing.assert_allclose(forward.weights.asnumpy(), [1, wanted], rtol=1e-6)
    assert Pretraining(network, TrainingSettings(balance_loss_coeff=0)).part_names == ("lm",)


def test_a_rate_of_biases_that_are_not_there_is_refused(model):
    with pytest.raises(ConfigError, match="router_bias_update_rate: found 0.01, but no router of the model has a "
                                          "selection bias; take 0"):
        Pretraining(model("pro_moe"), TrainingSettings(router_bias_update_rate=0.01))

