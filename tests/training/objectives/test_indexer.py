"""The indexer's loss against numpy in float64, and what the two stages of its training do."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from pangu_ms import PanguForCausalLM
from pangu_ms.model.latent_attention import attention_mass, sink_rows
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives import indexer
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.step import TrainStep

LENGTH = 13
POSITION = [[*range(LENGTH)], [*range(10), 0, 1, 2]]  # past index_topk of 8; the second row holds two documents


class Losses(nn.Cell):
    """Both losses of one attention layer, and what it hands out for them."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.attention, self.step_info = causal_lm.model.layers[0].self_attn, causal_lm.step_info
        self.dense, self.sparse = (indexer.IndexerLoss(self.attention, sparse) for sparse in (False, True))

    def construct(self, x, position):
        step = self.step_info(position, None, False, True)
        _, index, _ = self.attention(x, step, None)
        weight = ops.ones(position.shape, ms.float32) / position.size
        dense, sparse = self.dense(index, step, weight), self.sparse(index, step, weight)
        q = ops.reshape(index["q"], position.shape + (self.attention.heads, -1))
        return dense + sparse, dense, sparse, (index["q_latent"], q, index["rows"])


@pytest.fixture(scope="module")
def model(small):
    model = PanguForCausalLM(small(initializer_range=0.3))
    initialize(model, 0)
    return model


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 48)).astype(np.float32)
    return ms.Tensor(x), ms.Tensor(POSITION, ms.int32)


@pytest.fixture(scope="module")
def computed(model, inputs):
    """For queries in blocks of 5, then all at once: (dense, sparse), gradients by name, what the layer hands out."""
    found = {}
    weights = ms.ParameterTuple(model.model.layers[0].self_attn.trainable_params())
    with pytest.MonkeyPatch.context() as patch:
        for block in (5, 128):
            patch.setattr(indexer, "QUERIES", block)
            (_, dense, sparse, given), gradients = ms.value_and_grad(Losses(model), None, weights, True)(*inputs)
            named = {parameter.name: gradient.asnumpy() for parameter, gradient in zip(weights, gradients)}
            found[block] = (dense.asnumpy(), sparse.asnumpy()), named, [t.asnumpy().astype(float) for t in given]
    return found


@pytest.mark.parametrize("block", [5, 128])
def test_against_numpy(model, inputs, computed, block):
    wanted = reference(model, inputs[0].asnumpy().astype(float), *computed[block][2])
    assert wanted[0] > wanted[1] > 0.05
    np.testing.assert_allclose(computed[block][0], wanted, rtol=1e-5)


def test_blocks_have_the_same_gradient_and_it_stays_in_the_indexer(computed):
    _, blocks, _ = computed[5]
    for name, wanted in computed[128][1].items():
        assert wanted.any() == (".indexer." in name), name
        np.testing.assert_allclose(blocks[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def reference(model, x, q_latent, q, keys):
    """(dense, sparse) as the sections 5, 6 and 11 write them down, one query at a time."""
    config, attention = model.config, model.model.layers[0].self_attn
    heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    weight = {parameter.name.split("self_attn.")[1]: parameter.asnumpy().astype(float)
              for parameter in attention.get_parameters()}
    kv_b = weight["kv_b_proj.weight"].reshape(heads, -1, latent)[:, :nope]
    sinks = norm(weight["param_sink_compressed_kv"], weight["kv_a_layernorm.weight"]), weight["param_sink_k_pe"]
    totals = np.zeros(2)
    for b, position in enumerate(POSITION):
        wide = np.concatenate((sinks[0], keys[b][:, :latent])), np.concatenate((sinks[1], keys[b][:, latent:]))
        index_keys = turned(norm(x[b] @ weight["indexer.wk.weight"].T, weight["indexer.k_norm.weight"])[:, None],
                            position)[:, 0]
        index_q = (q_latent[b] @ weight["indexer.wq_b.weight"].T).reshape(LENGTH, config.index_n_heads, -1)
        index_q, share = turned(index_q, position), x[b] @ weight["indexer.weights_proj.weight"].T
        for t in range(LENGTH):
            earlier = np.arange(t - position[t], t + 1)
            each = np.maximum(index_q[t] @ index_keys[earlier].T, 0)
            score = share[t] @ each * config.index_n_heads ** -0.5 * config.index_head_dim ** -0.5
            best = np.sort(np.argsort(-score)[:config.index_topk])
            for i, seen in enumerate((np.arange(len(earlier)), best)):
                rows = np.concatenate((np.arange(len(sinks[0])), len(sinks[0]) + earlier[seen]))
                logits = np.einsum("hd,hdl,sl->hs", q[b, t, :, :nope], kv_b, wide[0][rows]) \
                    + q[b, t, :, nope:] @ wide[1][rows].T
                attended = softmax(logits * q.shape[-1] ** -0.5)[:, len(sinks[0]):].sum(0)
                target = attended / attended.sum()
                totals[i] += (target * (np.log(target) - np.log(softmax(score[seen])))).sum()
    return totals / (len(POSITION) * LENGTH)


def norm(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def turned(x, position):
    """x [T, heads, D], its first 8 dimensions by half-split rotary embedding of base 10000."""
    angle = np.array(position)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    first, second = x[..., :4], x[..., 4:8]
    return np.concatenate((first * np.cos(angle) - second * np.sin(angle),
                           second * np.cos(angle) + first * np.sin(angle), x[..., 8:]), -1)


class Look(nn.Cell):
    """ids, position -> for each DSA layer: where dense attention looks, the indexer's scores, float32 [B, T, T]."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.causal_lm = causal_lm
        layers = causal_lm.model.layers                                         # a slice of it would rename them
        self.layers = nn.CellList([layers[i].self_attn for i in range(2)], auto_prefix=False)

    def construct(self, ids, position):
        step = self.causal_lm.whole(position, False)
        _, layers = self.causal_lm.model(ids, step, None)
        found = ()
        for i, attention in enumerate(self.layers):
            index, weights = layers[i][1]["index"], attention.output_weights
            q = ops.reshape(index["q"], position.shape + (attention.heads, -1))
            mass = attention_mass(q, sink_rows(attention.sink_weights), index["rows"], step["visible"][0],
                                  weights["kv_b"], weights["scale"])
            found = found + ((mass, index["scores"]),)
        return found


def recall(look, batch, topk):
    """By layer: the share of attention that the best rows hold, and the indexer's; of queries that see more rows."""
    found = []
    for attended, scores in look(batch[0], batch[3]):
        attended, scores = attended.asnumpy()[:, topk:], scores.asnumpy()[:, topk:]
        attended = attended / attended.sum(-1, keepdims=True)
        best = np.sort(attended, -1)[..., -topk:].sum(-1)
        chosen = np.take_along_axis(attended, np.argsort(-scores, -1)[..., :topk], -1).sum(-1)
        found.append((best.mean(), chosen.mean()))
    return np.array(found).T


@pytest.mark.slow
def test_the_warm_up_teaches_the_indexer_where_attention_looks(small):
    """Then the sparse stage, among what the indexer selects, unlearns none of it.

    A random model's attention is too even for any 16 of 64 rows to hold most of it (they hold 0.52 at best), so its
    projections are made larger, until they can hold more than 0.97.
    """
    model = PanguForCausalLM(small(num_nextn_predict_layers=0, dsa_layers=[0, 1], swa_layers=[],
                                   sliding_window_list=[], index_topk=16))
    initialize(model, 0, TrainingSettings(moe_init_std=0.1))
    for name, parameter in model.parameters_dict().items():
        if any(kind in name for kind in ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj")):
            parameter.set_data(parameter * (100 if "q_b_proj" in name else 5))
    draw = np.random.default_rng(0)
    batch = [ms.Tensor(column) for column in (
        *draw.integers(0, 199, (2, 4, 64)).astype(np.int32), np.ones((4, 64), np.float32),
        np.tile(np.arange(64, dtype=np.int32), (4, 1)))]
    look = Look(model)
    ceiling, start = recall(look, batch, 16)
    assert (ceiling > 0.97).all() and (start < 0.6).all()

    before = {name: parameter.asnumpy().copy() for name, parameter in model.parameters_dict().items()}
    divergence = train(model, "dense", batch, 150, 1e-2)
    assert divergence[-1] < divergence[0] / 5
    assert (recall(look, batch, 16)[1] > 0.9).all()
    for name, parameter in model.parameters_dict().items():
        assert (parameter.asnumpy() != before[name]).any() == (".indexer." in name), name

    divergence = train(model, "sparse", batch, 30, 1e-2)
    assert max(divergence) < 2 * divergence[0] and divergence[-1] < divergence[0]
    assert (recall(look, batch, 16)[1] > 0.9).all()


def train(model, stage, batch, steps, rate):
    """Trains the indexers; -> their loss at each step."""
    forward = Pretraining(model, TrainingSettings(indexer_loss=stage))
    indexers = [parameter for parameter in forward.trained_parameters() if ".indexer." in parameter.name]
    step = TrainStep(forward, PanguMuon(indexers, model.config, rate, 0.0))
    place = forward.part_names.index("indexer_kl")
    return [step(*batch)[1][place].asnumpy().item() for _ in range(steps)]
