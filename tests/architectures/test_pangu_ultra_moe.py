"""The config of openPangu Ultra MoE: what it takes, what it refuses, how many parameters it says there are."""
import re

import pytest

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_ultra_moe import PanguUltraMoEConfig
from pangu_ms.architectures.tensors import parameters
from pangu_ms.cache.sizes import cache_bytes
from pangu_ms.checkpoint.layout import released
from pangu_ms.errors import ConfigError
from pangu_ms.training.optimizer.groups import decays

RELEASED = {  # section 5 of the family
    "architectures": ["PanguUltraMoEForCausalLM"], "model_type": "pangu_ultra_moe", "vocab_size": 153600,
    "hidden_size": 7680, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "attention_q_lora_dim": 1536, "attention_kv_lora_dim": 512,
    "attention_qk_dim": 128, "attention_qk_rope_dim": 64, "attention_v_dim": 128, "num_routed_experts": 256,
    "num_shared_experts": 1, "num_dense_layers": 3, "num_mtp_layers": 1, "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5, "sandwich_norm": True, "rms_norm_eps": 1e-5, "rope_theta": 25600000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}


def test_released_sizes():
    config = PanguUltraMoEConfig.ultra_moe_718b()
    count = config.parameter_count()
    assert (count["trunk"], count["mtp"]) == (719_093_767_680, 12_443_343_360)
    assert count["active"]["with_head_and_embedding"] == 40_371_494_400
    assert round(count["active"]["with_head"] / 1e9, 2) == 39.19
    mtp = [tensor.name.startswith("model.layers.61.") for tensor in released(config, copies=False)]
    assert (len(mtp) - sum(mtp), sum(mtp)) == (45_459, 787)


def test_a_token_leaves_one_latent_row_in_each_layer():
    plan = PanguUltraMoEConfig.ultra_moe_718b(compute_dtype="bfloat16").plan
    assert {name for layer in plan.layers for name in layer.attention.cache_tensors} == {"latent"}
    assert cache_bytes(plan, 4096) == {"per_token": 62 * 576 * 2, "fixed": 0, "total": 4096 * 62 * 576 * 2}


def test_the_released_fields_are_the_preset():
    config = config_from_dict(RELEASED)
    assert config.plan == PanguUltraMoEConfig.ultra_moe_718b().plan and config.extra == {"use_cache": True}
    assert config.to_dict() == RELEASED | {"dtype": "bfloat16"}
    assert (config.bos_token_id, config.eos_token_id, config.plan.mtp_hidden) == (None, None, "final")
    assert [layer.moe for layer in config.plan.layers] == [False] * 3 + [True] * 59


def test_layers_are_cut():
    config = config_from_dict(RELEASED).cut(2, 4, mtp=True)
    assert [(layer.moe, layer.mtp_depth) for layer in config.plan.layers] == [
        (False, 0), (True, 0), (True, 0), (True, 1)]
    assert not config.cut(1, 2, mtp=False).plan.mtp_layers


@pytest.mark.parametrize("change, message", [
    ({"n_routed_experts": 128}, "num_routed_experts: found 256, but n_routed_experts says 128; keep the right one"),
    ({"num_nextn_predict_layers": 3}, "num_mtp_layers: found 1, but num_nextn_predict_layers says 3"),
    ({"sandwich_norm": False}, "sandwich_norm: found False, wanted True: nothing else is implemented"),
    ({"router_enable_expert_bias": True}, "router_enable_expert_bias: found True, wanted False"),
    ({"n_group": 8}, "n_group: found 8, wanted 1"),
    ({"param_sink_number": 128}, "param_sink_number: found 128, wanted 0"),
    ({"rope_interleaved": False}, "rope_interleave: found False, wanted True"),
    ({"attention_qk_rope_dim": 63}, "attention_qk_rope_dim: found 63, wanted an even number"),
    ({"num_experts_per_tok": 300}, "num_routed_experts: found 256, wanted at least num_experts_per_tok = 300"),
    ({"num_dense_layers": 62}, "num_hidden_layers: found 61, wanted at least num_dense_layers = 62"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: found rope type 'yarn'"),
])
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(RELEASED | change)


def test_what_decides_the_model_has_no_default():
    for name in ("rope_theta", "sandwich_norm", "attention_kv_lora_dim", "num_mtp_layers"):
        with pytest.raises(ConfigError, match=f"the configuration lacks {name}; add"):
            config_from_dict({key: value for key, value in RELEASED.items() if key != name})


def test_muon_takes_what_it_takes_of_the_same_projections():
    """As openPangu-2.0 has them: parts of a projection apart, experts one by one."""
    found, known = (
        {re.sub(r"^model\.layers\.\d+\.", "", name): (p.is_matrix, p.row_pattern, decays(p))
         for name, p in parameters(config).items()}
        for config in (PanguUltraMoEConfig.ultra_moe_718b(num_attention_heads=48, attention_q_lora_dim=1024,
                                                          hidden_size=2560, intermediate_size=9216,
                                                          moe_intermediate_size=1024, vocab_size=151552),
                       PanguConfig.flash_92b()))
    assert found.items() <= known.items() and sum(matrix for matrix, _, _ in found.values()) == 15
