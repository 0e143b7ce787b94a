"""The config of openPangu Pro MoE: what it takes, what it refuses, how many parameters it says there are."""
import numpy as np
import pytest

from pangu_ms.architectures import config_from_dict, read_config
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe import PanguProMoEConfig
from pangu_ms.architectures.tensors import check_ranks, parameters
from pangu_ms.checkpoint.layout import released, stacked
from pangu_ms.checkpoint.source import open_source
from pangu_ms.errors import CheckpointError, ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.optimizer.groups import decays
from tests.checkpoint import generate

RELEASED = {  # section 3 of the family
    "architectures": ["PanguProMoEForCausalLM"], "model_type": "PanguProMoE", "vocab_size": 153376,
    "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "rope_theta": 16000000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 1344,
    "shared_expert_intermediate_size": 5376, "router_aux_loss_coef": 1e-3, "bos_token_id": 1, "eos_token_id": 45892,
    "output_router_logits": False, "torch_dtype": "bfloat16",
}


def test_released_size():
    config = PanguProMoEConfig.pro_moe_72b()
    count = config.parameter_count()
    assert count["trunk"] == 71_988_781_056 == count["trunk_and_mtp"] and len(released(config)) == 9_939
    assert count["active"]["with_head_and_embedding"] == 16_498_139_136


def test_the_released_file_is_the_preset():
    config = config_from_dict(RELEASED)
    assert config.plan == PanguProMoEConfig.pro_moe_72b().plan and config.extra == {"output_router_logits": False}
    assert config.to_dict() == RELEASED | {"dtype": "bfloat16"}
    layer = config.plan.layers[0]
    assert layer.attention == PanguEmbeddedConfig.embedded_7b(
        hidden_size=5120, num_attention_heads=40).plan.layers[0].attention
    assert (layer.feed_forward.groups, layer.feed_forward.balance_loss_coeff) == (8, 1e-3)


def test_some_layers_may_be_dense():
    config = config_from_dict(RELEASED | {"mlp_only_layers": [0, 47], "intermediate_size": 12800})
    assert [layer.index for layer in config.plan.layers if not layer.moe] == [0, 47]
    assert parameters(config)["model.layers.47.mlp.up_proj.weight"].shape == (12800, 5120)
    assert "model.layers.0.mlp.gate.weight" not in parameters(config)
    assert config.cut(40, 47, False).mlp_only_layers == (7,)


@pytest.mark.parametrize("change, message", [
    ({"num_experts": 60}, "num_experts: found 60, wanted a multiple of num_experts_per_tok = 8"),
    ({"mlp_only_layers": [0]}, "intermediate_size: found None, wanted the width of the dense layers"),
    ({"mlp_only_layers": [48], "intermediate_size": 9}, "mlp_only_layers: found 48, wanted 0 to 47"),
    ({"param_sink_number": 128, "norm_topk_prob": True}, "param_sink_number, norm_topk_prob: found in a config.json "
     "of PanguProMoEForCausalLM, but of PanguProMoEV2ForCausalLM"),
    ({"bias": False}, "bias: found False, wanted True: nothing else is implemented"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: found True, wanted False"),
    ({"decoding_experts_per_group": 9}, "decoding_experts_per_group: found 9, wanted 1 to 8, as many as a group has"),
    ({"decoding_experts_per_group": 0}, "decoding_experts_per_group: found 0, wanted"),
    ({"num_key_value_heads": 7}, "num_attention_heads: found 40, wanted a multiple of num_key_value_heads = 7"),
])
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(RELEASED | change)


def test_expert_ranks_have_whole_groups():
    config = PanguProMoEConfig.pro_moe_72b(num_hidden_layers=1)
    for ranks in (2, 4, 8):
        check_ranks(config, Ranks(expert=ranks))
        shapes = {tensor.name: tensor.shape for tensor in stacked(config, Ranks(2, ranks, rank=1))}
        assert shapes["model.layers.0.mlp.experts.gate_proj.weight"] == (64 // ranks, 672, 5120)
        assert shapes["model.layers.0.mlp.router_scale"] == (1, 64)
    with pytest.raises(ConfigError, match=r"expert parallel 16 does not divide 8 groups \(mlp.experts.gate_proj.*: "
                                          "take one of 1, 2, 4, 8"):
        check_ranks(config, Ranks(expert=16))


def test_muon_takes_projections_alone():
    """The router and its factors are left to AdamW; the factors, which are one by expert, do not decay to nothing."""
    found = parameters(PanguProMoEConfig.pro_moe_72b(num_hidden_layers=1))
    matrices = {name.removeprefix("model.layers.0.") for name, p in found.items() if p.is_matrix}
    assert len(matrices) == 4 + 3 + 3 and all(name.endswith("_proj.weight") for name in matrices)
    assert not decays(found["model.layers.0.mlp.router_scale"]) and decays(found["model.layers.0.mlp.gate.weight"])


def test_a_quantised_release_is_refused(data, tmp_path):
    config = read_config(data / "pro_moe")
    scale = {"model.layers.0.self_attn.k_proj.kv_cache_scale": np.ones(20, "float32")}
    source = generate.write(tmp_path, config, generate.tensors(config) | scale)
    with pytest.raises(CheckpointError, match="1 unexpected:\n.*kv_cache_scale\nSome belong to a quantised release, "
                                              "which is not supported; fetch the bfloat16 one"):
        open_source(source)
