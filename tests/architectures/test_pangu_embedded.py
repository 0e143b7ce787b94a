"""The config of openPangu Embedded: what it takes, what it refuses, how many parameters it says there are."""
import pytest

from pangu_ms.architectures import config_from_dict, openpangu_v2
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.tensors import computed_tensors, parameters
from pangu_ms.errors import ConfigError
from pangu_ms.training.optimizer.groups import decays

RELEASED = {  # section 2 of the family: the 7B
    "architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "vocab_size": 153376,
    "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 34, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rope_theta": 16000000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 45892, "pad_token_id": 0, "use_cache": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("config, total, tensors", [
    (PanguEmbeddedConfig.embedded_7b(), 8_030_887_936, 445), (PanguEmbeddedConfig.embedded_1b(), 1_155_912_192, 340)])
def test_released_sizes(config, total, tensors):
    assert config.parameter_count()["trunk"] == total == config.parameter_count()["trunk_and_mtp"]
    assert len(parameters(config)) == tensors and len(computed_tensors(config)) == config.num_hidden_layers


def test_a_tied_head_is_no_tensor_and_used_once():
    config = PanguEmbeddedConfig.embedded_1b()
    assert "lm_head.weight" not in parameters(config)
    assert config.parameter_count()["active"]["with_head"] == 1_155_912_192


def test_the_architecture_decides_and_not_the_model_type():
    config = config_from_dict(RELEASED | {"model_type": "of no effect"})
    assert isinstance(config, PanguEmbeddedConfig) and config.extra == {"use_cache": True}
    assert config.plan == PanguEmbeddedConfig.embedded_7b().plan
    assert isinstance(config_from_dict(openpangu_v2.PanguConfig.flash_92b().to_dict()), openpangu_v2.PanguConfig)
    assert config_from_dict(RELEASED).to_dict() == RELEASED | {"dtype": "bfloat16"}


def test_projections_have_biases_unless_the_file_says_otherwise():
    assert config_from_dict(RELEASED).plan.layers[0].attention.bias
    without = config_from_dict(RELEASED | {"bias": False})
    assert not [name for name in parameters(without) if name.endswith(".bias")]


@pytest.mark.parametrize("change, message", [
    ({"layer_types": ["full_attention"] * 34}, "layer_types: found in a config.json .* openPangu-R-7B"),
    ({"param_sink_number": 128}, "param_sink_number: found in .* no public source describes"),
    ({"num_key_value_heads": 5}, "num_attention_heads: found 32, wanted a multiple of num_key_value_heads = 5"),
    ({"hidden_size": 4100}, "hidden_size: found 4100, wanted a multiple of num_attention_heads = 32"),
    ({"head_dim": 127}, "head_dim: found 127, wanted an even number"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', wanted 'silu': nothing else is implemented"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: found rope type 'yarn'"),
    ({"bias": None}, "bias: found None, wanted bool"),
])
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(RELEASED | change)


def test_what_decides_the_model_has_no_default():
    for name in ("tie_word_embeddings", "rope_theta", "num_key_value_heads"):
        with pytest.raises(ConfigError, match=f"the configuration lacks {name}; add"):
            config_from_dict({key: value for key, value in RELEASED.items() if key != name})


def test_muon_takes_projections_alone():
    """Each projection is one linear map; biases, norms and both tables are left to AdamW, and biases do not decay."""
    config = PanguEmbeddedConfig.embedded_7b(num_hidden_layers=1)
    found = parameters(config)
    matrices = {name.split(".")[-2] for name, p in found.items() if p.is_matrix}
    assert matrices == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(p.row_pattern == (1, (p.rows,)) for p in found.values() if p.is_matrix)
    assert not any(decays(p) for name, p in found.items() if name.endswith((".bias", "norm.weight")))
