"""The config of openPangu R-72B-2512: what it takes, what it refuses, how many parameters it says there are."""
import pytest

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.architectures.tensors import mtp_copies, parameters
from pangu_ms.cache.sizes import cache_bytes
from pangu_ms.checkpoint.layout import released
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.optimizer.groups import decays, group_parameters

RELEASED = {  # section 4 of the family
    "architectures": ["PanguProMoEV2ForCausalLM"], "model_type": "PanguProMoE", "vocab_size": 153600,
    "hidden_size": 4608, "intermediate_size": 10240, "num_hidden_layers": 50, "num_attention_heads": 64,
    "num_key_value_heads": 4, "qk_nope_dim": 128, "qk_rope_dim": 64, "v_channels": 128, "param_sink_number": 128,
    "param_sink_with_value": True, "rope_theta": 25600000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "mlp_only_layers": [0, 1, 2, 3], "num_experts": 80, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1280, "shared_expert_intermediate_size": 2560, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "router_enable_expert_bias": True, "sandwich_norm": True, "num_mtp_layers": 1,
    "bos_token_id": 1, "eos_token_id": 45892, "use_cache": True, "torch_dtype": "bfloat16",
}


def test_released_sizes():
    config = PanguProMoEV2Config.r_72b()
    count, stored = config.parameter_count(), released(config)
    assert (count["trunk"], count["mtp"]) == (73_765_885_408, 1_594_269_456)
    assert count["active"]["with_head_and_embedding"] == 15_160_972_768
    mtp = [tensor for tensor in stored if tensor.name.startswith("model.layers.50.")]
    assert len(mtp_copies(config)) == 2 and (len(stored) - len(mtp), len(mtp)) == (11_735, 258 + 2)
    assert cache_bytes(config.plan, 1)["per_token"] == 51 * 1280 * 4


def test_the_architecture_decides_and_not_the_model_type():
    config = config_from_dict(RELEASED)
    assert isinstance(config, PanguProMoEV2Config) and config.extra == {"use_cache": True}
    assert config.plan == PanguProMoEV2Config.r_72b().plan
    assert config.to_dict() == RELEASED | {"dtype": "bfloat16"}


def test_sinks_have_values_where_the_file_says_so():
    names = {name.rpartition(".")[2] for name in parameters(config_from_dict(RELEASED))}
    assert {"param_sink_key", "param_sink_value"} <= names
    without = config_from_dict({key: value for key, value in RELEASED.items() if key != "param_sink_with_value"})
    assert names - {name.rpartition(".")[2] for name in parameters(without)} == {"param_sink_value"}


@pytest.mark.parametrize("change, message", [
    ({"interleaved_sliding_window": 512}, "interleaved_sliding_window: found in a config.json of PanguProMoEV2"),
    ({"interleaved_sliding_window": [7, None], "bias": True}, "interleaved_sliding_window, bias: .* wanted null"),
    ({"param_sink_scalar": 0.5}, "param_sink_scalar: found in .* it is not implemented"),
    ({"param_sink_of_head_num": True}, "param_sink_of_head_num: found in"),
    ({"attention_bias": True}, "attention_bias: found in"),
    ({"qkv_bias": True}, "qkv_bias: found in"),
    ({"sandwich_norm": False}, "sandwich_norm: found False, wanted True: nothing else is implemented"),
    ({"router_enable_expert_bias": False}, "router_enable_expert_bias: found False, wanted True"),
    ({"num_key_value_heads": 5}, "num_attention_heads: found 64, wanted a multiple of num_key_value_heads = 5"),
    ({"qk_rope_dim": 63}, "qk_rope_dim: found 63, wanted an even number"),
    ({"num_experts": 7}, "num_experts: found 7, wanted at least num_experts_per_tok = 8"),
    ({"mlp_only_layers": [0, 50]}, "mlp_only_layers: found 50, wanted 0 to 49"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: found rope type 'yarn'"),
    ({"n_routed_experts": 64}, "num_experts: found 80, but n_routed_experts says 64"),
    ({"num_nextn_predict_layers": 2}, "num_mtp_layers: found 1, but num_nextn_predict_layers says 2"),
    ({"n_shared_experts": 1}, "n_shared_experts: found 1, wanted 2 by the release's own fields"),
    ({"first_k_dense_replace": 3}, "first_k_dense_replace: found 3, wanted 4 by the release's own fields"),
])
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(RELEASED | change)


def test_what_serving_code_adds_may_stand_there():
    added = {"n_routed_experts": 80, "n_shared_experts": 2, "first_k_dense_replace": 4, "num_nextn_predict_layers": 1,
             "attention_bias": False, "interleaved_sliding_window": None}
    assert config_from_dict(RELEASED | added).plan == config_from_dict(RELEASED).plan


def test_what_decides_the_model_has_no_default():
    for name in ("mlp_only_layers", "rope_theta", "param_sink_number", "routed_scaling_factor", "num_mtp_layers"):
        with pytest.raises(ConfigError, match=f"the configuration lacks {name}; add"):
            config_from_dict({key: value for key, value in RELEASED.items() if key != name})


def test_muon_takes_queries_keys_and_values_apart():
    """Of two tensor ranks, which bring their rows together, each has half of the heads of each kind."""
    config = PanguProMoEV2Config.r_72b(num_hidden_layers=1, mlp_only_layers=())
    found = parameters(config)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    for ranks, pattern in ((1, (1, (12288, 768, 512))), (2, (2, (6144, 384, 256)))):
        group, = group_parameters({name: found[name].local_shape(Ranks(ranks))}, {name: None}, found, Ranks(ranks),
                                  True, False)
        assert group.matrix == ((13568 // ranks, 4608), pattern, "rows" if ranks > 1 else None)
    matrices = {name.split(".")[-2] for name, p in found.items() if p.is_matrix}
    assert matrices == {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "eh_proj"}
    assert not any(decays(p) for name, p in found.items() if "sink" in name or name.endswith("norm.weight"))
