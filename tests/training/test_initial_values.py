"""The values of a new model, kind by kind, as section 11 of the model description gives them."""
import re

import mindspore as ms
import numpy as np
import pytest

from pangu_ms import PanguForCausalLM
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.initial_values import initial_values, initialize
from pangu_ms.training.objectives.settings import TrainingSettings

LAYERS, HIDDEN, RANGE, MOE_STD = 6, 128, 0.02, 0.00206
OUT = (2 * LAYERS) ** -0.5
NORMAL = {  # standard deviation by the end of the name
    "q_a_proj.weight": RANGE, "q_b_proj.weight": RANGE, "kv_a_proj_with_mqa.weight": RANGE, "kv_b_proj.weight": RANGE,
    "o_proj.weight": RANGE * OUT, "indexer.wq_b.weight": RANGE, "indexer.wk.weight": RANGE,
    "indexer.weights_proj.weight": RANGE, "param_sink_compressed_kv": RANGE, "param_sink_k_pe": RANGE,
    "0.mlp.gate_proj.weight": RANGE, "0.mlp.up_proj.weight": RANGE, "0.mlp.down_proj.weight": RANGE * OUT,
    "shared_experts.gate_proj.weight": RANGE, "shared_experts.up_proj.weight": RANGE,
    "shared_experts.down_proj.weight": RANGE * OUT, "mlp.gate.weight": MOE_STD,
    ".experts.gate_proj.weight": MOE_STD, ".experts.up_proj.weight": MOE_STD,
    ".experts.down_proj.weight": MOE_STD * OUT, "phi.weight": RANGE, "eh_proj.weight": RANGE, "lm_head.weight": RANGE,
    # What cutting at two standard deviations leaves of one: sqrt(1 - 4 p(2) / (2 P(2) - 1)).
    "embed_tokens.weight": 0.8796 * HIDDEN ** -0.5,
}
CONSTANT = {
    "post_attention_layernorm.weight": 0.25, "post_mlp_layernorm.weight": 0.25, "norm_gamma": 1.0,
    "conv.weight": 0.0, "e_score_correction_bias": 0.0, "branch_alpha": 0.01, "branch_alpha_pre": 0.01,
    "branch_beta_pre": 0.0,
    **dict.fromkeys(("input_layernorm.weight", "pre_mlp_layernorm.weight", "block_post_layernorm.weight",
                     "a_layernorm.weight", "k_norm.weight", "enorm.weight", "hnorm.weight", "head.norm.weight",
                     "model.norm.weight"), 1.0),
}


@pytest.fixture(scope="module")
def config(small):
    """Every kind has 1500 numbers and more, so that a standard deviation is known to a few per cent."""
    return small(num_hidden_layers=LAYERS, hidden_size=HIDDEN, dsa_layers=[0, 3], swa_layers=[1, 2, 4, 5, 6],
                 sliding_window_list=[7] * 5, vocab_size=400, q_lora_rank=64, kv_lora_rank=64, param_sink_number=256,
                 n_routed_experts=32, index_n_heads=16)


@pytest.fixture(scope="module")
def model(config):
    return PanguForCausalLM(config)


@pytest.fixture(scope="module")
def values(model):
    initialize(model, 3, TrainingSettings(post_norm_init=0.25))
    return taken(model)


def taken(model):
    return {name: parameter.asnumpy().copy() for name, parameter in model.parameters_dict().items()}


def test_every_kind_has_its_values(values):
    seen = set()
    for name, found in values.items():
        if name.endswith(".branch_beta"):
            continue
        ends = [end for end in (*NORMAL, *CONSTANT) if name.endswith(end)]
        assert len(ends) == 1, name
        seen.update(ends)
        if ends[0] in CONSTANT:
            assert (found == np.float32(CONSTANT[ends[0]])).all(), name
        else:
            wanted = NORMAL[ends[0]]
            assert found.std() == pytest.approx(wanted, rel=0.05), (name, found.size)
            assert abs(found.mean()) < 5 * wanted / np.sqrt(found.size), name
    assert seen == {*NORMAL, *CONSTANT}


def test_the_embedding_is_cut_at_two_deviations(values):
    embedding = values["model.embed_tokens.weight"] * HIDDEN ** 0.5
    assert 1.95 < np.abs(embedding).max() <= 2 * (1 + 1e-6)
    assert (np.abs(embedding) > 1).mean() == pytest.approx((0.3173 - 0.0455) / 0.9545, rel=0.05)  # else normal
    assert np.abs(values["lm_head.weight"]).max() > 3 * RANGE                   # nothing else is cut


def test_hyper_connections_begin_as_a_plain_residual(values):
    """Layer l, the (l + 1)-th, reads most of stream (l + 1) mod 4; writes to all alike, keeps each in its place."""
    betas = {int(re.search(r"\.(\d+)\.", name)[1]): beta for name, beta in values.items()
             if name.endswith("attn_mhc_module.branch_beta")}
    assert sorted(betas) == list(range(LAYERS))
    for layer, stream in enumerate([1, 2, 3, 0, 1, 2]):
        assert betas[layer][:4].tolist() == [float(i == stream) for i in range(4)]
        assert not betas[layer][4:8].any()
        np.testing.assert_array_equal(betas[layer][8:].reshape(4, 4), np.eye(4))
        np.testing.assert_array_equal(values[f"model.layers.{layer}.mlp_mhc_module.branch_beta"], betas[layer])


def test_a_seed_decides_every_bit(model, values):
    settings = TrainingSettings(post_norm_init=0.25)
    initialize(model, 4, settings)
    other = taken(model)
    for name, found in values.items():
        drawn = any(name.endswith(end) for end in NORMAL)
        assert (other[name] != found).any() == drawn, name
    initialize(model, 3, settings)
    for name, found in taken(model).items():
        np.testing.assert_array_equal(found, values[name], err_msg=name)


def test_no_two_parameters_have_the_same_draw(values):
    first = [found.ravel()[:20] / found.std() for name, found in values.items()
             if any(name.endswith(end) for end in NORMAL)]
    assert len(np.unique(np.round(first, 4), axis=0)) == len(first)


def test_ranks_draw_their_parts_of_the_same_values(small):
    """Also of tiles that several ranks have something of, by rows and by columns."""
    config = small(num_attention_heads=4, num_key_value_heads=4, hidden_size=96, vocab_size=200, n_routed_experts=4,
                   moe_intermediate_size=168)
    for p in parameters(config).values():
        whole = initial_values(sliced(p), config.plan, TrainingSettings(), 3)
        for ranks in (Ranks(4, 1), Ranks(2, 2)):
            for rank in range(ranks.count):
                part = sliced(p, ranks.at(rank))
                np.testing.assert_array_equal(initial_values(part, config.plan, TrainingSettings(), 3),
                                              part.part_of(whole), err_msg=p.name)


def test_no_two_tiles_have_the_same_draw(values):
    """Of all matrices together: nor do two tiles of one, or the same tile of two experts."""
    first = [member[row, column:column + 8] / found.std() for name, found in values.items()
             if any(name.endswith(end) for end in NORMAL)
             for member in found.reshape(-1, *found.shape[-2:])
             for row in range(0, member.shape[0], 64) for column in range(0, member.shape[1] - 7, 64)]
    assert len(first) > 1000
    assert len(np.unique(np.round(first, 4), axis=0)) == len(first)


def test_settings_decide_experts_and_post_norms(small):
    model = PanguForCausalLM(small())
    initialize(model, 0, TrainingSettings(moe_init_std=0.5))
    found = taken(model)
    assert found["model.layers.1.mlp.experts.up_proj.weight"].std() == pytest.approx(0.5, rel=0.05)
    assert found["model.layers.1.mlp.experts.down_proj.weight"].std() == pytest.approx(0.25, rel=0.05)
    assert found["model.layers.1.mlp.gate.weight"].std() == pytest.approx(0.5, rel=0.15)
    assert (found["model.layers.1.post_mlp_layernorm.weight"] == 1).all()
    assert all(parameter.dtype == ms.float32 for parameter in model.get_parameters())


def test_the_recipe_of_ultra_135b(config, values):
    """Everything that else is normal has one deviation, norms behind sublayers fall with depth, all else stays."""
    model = PanguForCausalLM(config)
    initialize(model, 3, TrainingSettings(post_norm_init="depth_scaled", initializer="tiny"))
    for name, found in taken(model).items():
        if name.endswith("post_attention_layernorm.weight"):
            assert (found == np.float32(0.283 / LAYERS ** 0.5)).all(), name
        elif name.endswith("post_mlp_layernorm.weight"):
            assert (found == np.float32(0.432 / LAYERS ** 0.5)).all(), name
        elif name.endswith("embed_tokens.weight"):
            assert found.std() == pytest.approx(NORMAL["embed_tokens.weight"], rel=0.05)
        elif any(name.endswith(end) for end in NORMAL):
            assert found.std() == pytest.approx((2 * HIDDEN * LAYERS) ** -0.5, rel=0.05), (name, found.size)
        else:
            np.testing.assert_array_equal(found, values[name], err_msg=name)


def test_depth_scaled_wants_norms_behind_sublayers():
    config = PanguEmbeddedConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="^pangu_training.post_norm_init: found depth_scaled, .*without norms"):
        initialize(PanguForCausalLM(config), 0, TrainingSettings(post_norm_init="depth_scaled"))
