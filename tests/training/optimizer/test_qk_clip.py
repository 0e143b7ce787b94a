"""QK-clip: logits by hand, what is scaled, and that logits are where they should be afterwards."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from pangu_ms import PanguForCausalLM, device
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.errors import ConfigError
from pangu_ms.model.grouped_query_attention import grouped_attention
from pangu_ms.model.latent_attention import expanded_attention
from pangu_ms.model.plan import GroupedQueryAttention
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.optimizer.qk_clip import ALL, ROOT, STAYS, QKClip, clipped_rows
from pangu_ms.training.step import TrainStep
from tests.ops.cells import op_by_op

EMBEDDED = PanguEmbeddedConfig(
    vocab_size=8, hidden_size=7, intermediate_size=4, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, tie_word_embeddings=False)
FUSED = PanguProMoEV2Config(
    vocab_size=8, hidden_size=7, intermediate_size=4, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
    qk_nope_dim=5, qk_rope_dim=4, v_channels=3, param_sink_number=2, mlp_only_layers=(0,), num_mtp_layers=0,
    max_position_embeddings=64, rope_theta=100.0, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LENGTH = 9


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def tensors(*arrays):
    return [ms.Tensor(array) for array in arrays]


@pytest.fixture(scope="module")
def visible():
    """bool [2, 5, 1, 3 + 5]: the sinks, and all rows but those behind a query."""
    seen = np.tril(np.ones((5, 8), bool), 3)
    return np.tile(seen[None, :, None], (2, 1, 1, 1))


def test_largest_logits_of_latent_attention_by_hand(visible):
    """Two sequences; heads are 4 + 2 wide, values 3, latent rows 7 + 2."""
    q, sinks, keys, kv_b = normal(2, 5, 3, 6), normal(3, 9), normal(2, 5, 9), normal(3 * (4 + 3), 7)
    _, found = op_by_op(expanded_attention, *tensors(q, sinks, keys, visible), {"weight": ms.Tensor(kv_b)}, 0.3, True)
    rows = np.concatenate((np.tile(sinks, (2, 1, 1)), keys), 1)
    own = np.einsum("bsl,hnl->bshn", rows[..., :7], kv_b.reshape(3, 7, 7)[:, :4])
    logits = np.einsum("bthn,bshn->bhts", q[..., :4], own) + np.einsum("bthr,bsr->bhts", q[..., 4:], rows[..., 7:])
    wanted = np.where(visible.transpose(0, 2, 1, 3), 0.3 * logits, -np.inf).max((0, 2, 3))
    assert found.shape == (3,) and found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=1e-5)


def test_largest_logits_of_grouped_queries_by_hand(visible):
    q, keys, values, sinks = normal(2, 5, 6, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 3), normal(3, 2, 4)
    handle = {"keys": ms.Tensor(sinks), "values": ms.Tensor(normal(3, 2, 3))}
    _, found = op_by_op(grouped_attention, *tensors(q, keys, values, visible), 0.3, handle, True)
    rows = np.repeat(np.concatenate((np.tile(sinks, (2, 1, 1, 1)), keys), 1), 3, 2)
    logits = 0.3 * np.einsum("bthn,bshn->bhts", q, rows)
    np.testing.assert_allclose(found.asnumpy(), np.where(visible.transpose(0, 2, 1, 3), logits, -np.inf).max((0, 2, 3)),
                               rtol=1e-5)


def test_rows_of_latent_attention(small):
    """openPangu's: 16 + 8 wide, values 12; the second of three ranks."""
    attention = small().plan.layers[0].attention
    found = clipped_rows(attention, Ranks(tensor=3, rank=1))
    assert attention.num_heads == 3 and found.keys() == {"self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight"}
    for name, kinds in (("q_b", [ROOT] * 16 + [ALL] * 8), ("kv_b", [ROOT] * 16 + [STAYS] * 12)):
        heads, rows = found[f"self_attn.{name}_proj.weight"]
        assert rows.tolist() == kinds and set(heads) == {1}


@pytest.mark.parametrize("fields, wanted", [
    ({}, {"q": [ALL] * 8}),
    ({"num_kv_heads": 4}, {"q": [ROOT] * 8, "k": [ROOT] * 8}),
    ({"num_kv_heads": 4, "key_norm": True}, {"q": [ALL] * 8}),
    ({"num_kv_heads": 4, "sinks": 1}, {"q": [ALL] * 8}),
    ({"fused": True}, {"qkv": [ALL] * 8 + [STAYS] * 2 + [STAYS] * 3}),
    ({"fused": True, "num_kv_heads": 4}, {"qkv": [ROOT] * 16 + [STAYS] * 12})])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_grouped_queries(fields, wanted, bias):
    """Four heads of width 2, values 3."""
    record = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 2, "v_head_dim": 3, "bias": bias}
    found = clipped_rows(GroupedQueryAttention(**record | fields), Ranks())
    ends = ("weight", "bias") if bias else ("weight",)
    assert found.keys() == {f"self_attn.{name}_proj.{end}" for name in wanted for end in ends}
    for name, kinds in wanted.items():
        for end in ends:
            heads, rows = found[f"self_attn.{name}_proj.{end}"]
            assert rows.tolist() == kinds and heads[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


class Largest(nn.Cell):
    """x [1, T, H] -> the largest logits of a model's first layer."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.attention, self.step_info = causal_lm.model.layers[0].self_attn, causal_lm.step_info

    def construct(self, x, position):
        return self.attention(x, self.step_info(position, None, False, False, None, True), None)[2]


@pytest.mark.parametrize("kind", ["latent", "grouped", "fused"])
def test_clipped_heads_reach_the_threshold_and_others_stay(small, kind):
    """Of latent attention with sinks and convolutions; of groups with biases; behind a norm of keys, with sinks."""
    device.start()
    config = {"latent": small(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, swa_layers=[],
                              sliding_window_list=[], block_post_layernorm_idx=[]),
              "grouped": EMBEDDED, "fused": FUSED}[kind]
    model, draw = PanguForCausalLM(config), np.random.default_rng(0)
    attention = model.model.layers[0].self_attn
    for name, parameter in attention.parameters_and_names():
        parameter.set_data(ms.Tensor(draw.normal("norm" in name, 0.5, parameter.shape).astype(np.float32)))
    inputs = tensors(draw.normal(size=(1, LENGTH, config.hidden_size)).astype(np.float32),
                     np.arange(LENGTH, dtype=np.int32)[None])
    largest = Largest(model)
    before = largest(*inputs)
    optimizer = PanguMuon(list(attention.get_parameters()), config)
    threshold = float(np.median(before.asnumpy()))
    QKClip(threshold, model.plan.layers, optimizer, Ranks())(ms.ops.expand_dims(before, 0))
    after, before = largest(*inputs).asnumpy(), before.asnumpy()
    clipped = before > threshold
    assert clipped.sum() == len(before) // 2 and before.min() > 0
    np.testing.assert_allclose(after[clipped], threshold, rtol=1e-5)
    np.testing.assert_array_equal(after[~clipped], before[~clipped])
    if kind != "latent":                                                        # in one group there is one of each
        assert any(0 < group.sum() < len(group) for group in clipped.reshape(2, -1))


@pytest.mark.parametrize("sharded", [False, True])
def test_copies_of_the_parameters_are_scaled_and_moments_are_not(small, monkeypatch, sharded):
    """Masters of float16 parameters; where two ranks share them, the second's half of the two layers' matrices.

    41 times its reciprocal is not 1 in float32: what is not clipped must not move by that.
    """
    monkeypatch.setattr(collectives, "all_gather", lambda ranks, dimension: ms.nn.Identity())    # one process
    config, ranks = small(), Ranks(data=2, rank=1) if sharded else Ranks()
    shapes = {"q_b_proj": (72, 32), "kv_b_proj": (84, 24)}
    params = [ms.Parameter(ms.Tensor(normal(*shape)).astype(ms.float16), f"model.layers.{i}.self_attn.{name}.weight")
              for i in (0, 1) for name, shape in shapes.items()]
    optimizer = PanguMuon(params, config, ranks=ranks, shard_states=sharded)
    states = {parameter.name: parameter for parameter in optimizer.get_parameters()}
    before = {name: state.asnumpy().copy() for name, state in states.items()}
    largest = np.float32([[1, 80, 160], [320, 20, 41]])
    QKClip(41.0, config.plan.layers[:2], optimizer, Ranks())(ms.Tensor(largest))
    gamma = np.minimum(1, 41 / largest)
    for i, of_heads in enumerate(gamma):
        for name, (second, power) in {"q_b_proj": (8, 1), "kv_b_proj": (12, 0)}.items():
            factor = np.concatenate([[g ** 0.5] * 16 + [g ** power] * second for g in of_heads])[:, None]
            name = f"model.layers.{i}.self_attn.{name}.weight"
            if sharded:                                                         # the first layer's are the other rank's
                master, now = (arrays[f"part.{name.replace('.1.', '.0.')}"][0] if i == 1 else None
                               for arrays in (before, {n: s.asnumpy() for n, s in states.items()}))
            else:
                master, now = before[f"master.{name}"], states[f"master.{name}"].asnumpy()
                assert np.array_equal(states[name].asnumpy(), now.astype(np.float16))
            if master is not None:
                np.testing.assert_allclose(now, master * factor, rtol=1e-6)
                stays = factor[:, 0] == 1
                np.testing.assert_array_equal(now[stays], master[stays])
            np.testing.assert_allclose(states[name].asnumpy(), before[name] * factor, rtol=2e-3)
    moments = [name for name in states if name.startswith("muon.")]
    assert moments and not any(states[name].asnumpy().any() for name in moments)


def test_what_would_not_be_clipped_is_refused(small):
    config = small()
    weights = [ms.Parameter(ms.ops.zeros((72, 32)), "model.layers.0.self_attn.q_b_proj.weight")]
    for optimizer, message in (
            (nn.SGD(weights), "qk_clip_threshold: found 9.0 with the optimizer SGD, which may keep copies .* or 0"),
            (PanguMuon(weights, config), "found 9.0, but model.layers.0.self_attn.kv_b_proj.weight is not trained, .*"
                                         "take 0")):
        with pytest.raises(ConfigError, match=message):
            QKClip(9.0, config.plan.layers[:1], optimizer, Ranks())


@pytest.mark.slow
def test_steps_clip_by_the_largest_of_all_that_was_accumulated(one_layer):
    """Nothing else changes at a rate of 0, so that the next step's logits are where the clip has put them."""
    model = PanguForCausalLM(PanguConfig.from_dict(one_layer | {"initializer_range": 0.3}))
    initialize(model, 0)
    objective = Pretraining(model, TrainingSettings(qk_clip_threshold=8.5))
    step = TrainStep(objective, PanguMuon(objective.trained_parameters(), model.config, 0.0), accumulation=2)
    ids = np.random.default_rng(0).integers(0, 268, (2, 1, 16)).astype(np.int32)
    position = np.arange(16, dtype=np.int32)[None]
    batches = [tensors(each, np.roll(each, -1), np.ones((1, 16), np.float32), position) for each in ids]

    def weights():
        return [layer.self_attn.q_b_proj.weight.asnumpy().copy() for layer in model.model.layers]

    found, values = [], [weights()]
    for _ in range(2):
        found.append(np.stack([step(*batch)[5].asnumpy() for batch in batches]))                # [2, L, heads]
        values.append(weights())
    (first, then), gamma = found, np.minimum(1, 8.5 / found[0].max(0))
    assert gamma.shape == (2, 4) and all(0 < count < 4 for count in (gamma < 1).sum(1))
    assert (first[0] > first[1]).any() and (first[0] < first[1]).any()
    for place, of_heads in enumerate(gamma):
        factor = np.concatenate([[g ** 0.5] * 16 + [g] * 8 for g in of_heads])[:, None]
        np.testing.assert_allclose(values[1][place], values[0][place] * factor, rtol=1e-6)
    np.testing.assert_allclose(then.max(0)[0], gamma[0] * first.max(0)[0], rtol=1e-5)
    np.testing.assert_array_equal(then[:, 0, gamma[0] == 1], first[:, 0, gamma[0] == 1])
    np.testing.assert_allclose(values[2][0], values[1][0], rtol=1e-5)           # the first step's maxima are forgotten
