import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import pangu_ms
from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.openpangu_v2 import UNPUBLISHED, PanguConfig
from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.model.plan import FeedForward, HyperConnection, Indexer, LatentAttention, Layer, MoE

GOLDEN = ("tiny", "tiny_full", "odd", "eps")


@pytest.fixture
def fields(data):
    """The contents of the tiny checkpoint's config.json, free to be changed."""
    return json.loads((data / "tiny" / "config.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_config_json_comes_back_as_it_was(data, tmp_path, name):
    PanguConfig.from_pretrained(data / name).save_pretrained(tmp_path)
    fields = json.loads((data / name / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == fields | {"dtype": fields["torch_dtype"]}


def test_unknown_fields_and_changes_are_written(fields):
    fields |= {"some_future_field": {"a": [1]}, "mtp_hidden": "merged"}
    config = dataclasses.replace(PanguConfig.from_dict(fields), mhc_norm_eps=1e-5, index_topk=4)
    assert config.extra == {"some_future_field": {"a": [1]}, "use_cache": True}
    assert config.to_dict() == fields | {"mhc_norm_eps": 1e-5, "index_topk": 4, "dtype": "float32"}
    assert PanguConfig.from_dict(config.to_dict()) == config


def test_a_config_made_from_keywords_comes_back_too(tmp_path):
    config = PanguConfig.flash_92b(eos_token_id=[148900, 148902], compute_dtype="bfloat16")
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert PanguConfig.from_pretrained(tmp_path) == config
    assert fields["compute_dtype"] == "bfloat16" and fields["eos_token_id"] == [148900, 148902]
    assert not {"mtp_hidden", "mhc_norm_eps", "rope_scaling", "extra", "implied"} & fields.keys()


def test_layers_of_a_model_with_every_kind(data):
    layers = PanguConfig.from_pretrained(data / "tiny_full").plan.layers
    assert [(p.index, p.attention.kind, p.attention.window) for p in layers] == [
        (0, "dsa", None), (1, "swa", 6), (2, "swa", 11), (3, "swa", 4), (4, "full", None), (5, "dsa", None),
        (6, "swa", 4), (7, "swa", 4), (8, "swa", 4)]
    assert [p.moe for p in layers] == [False, False] + [True] * 7
    assert [p.index for p in layers if p.block_norm] == [0, 4]
    assert [p.mtp_depth for p in layers] == [0] * 6 + [1, 2, 3]


def test_layers_of_flash():
    plan = PanguConfig.flash_92b().plan
    dense, last, mtp = plan.layers[0], plan.layers[45], plan.layers[48]
    attention = LatentAttention(48, 1024, 512, 128, 64, 128, window=None, sinks=128, conv_width=3,
                                indexer=Indexer(24, 128, 2048))
    experts = MoE(256, 8, 1024, 1024, normalise=True, scale=2.5)
    assert dense == Layer(0, attention, FeedForward(9216), HyperConnection(4, 20, 1e-6), block_norm=True)
    assert last == Layer(45, attention, experts, HyperConnection(4, 20, 1e-6))
    assert mtp == Layer(48, replace(attention, window=2048, indexer=None), experts, None, mtp_depth=3)
    assert [sum(p.attention.kind == kind for p in plan.layers) for kind in ("dsa", "swa", "full")] == [16, 33, 0]
    assert sum(p.attention.window == 512 for p in plan.layers) == 30 and sum(p.block_norm for p in plan.layers) == 9
    assert (len(plan.trunk), len(plan.mtp_layers), plan.indexer) == (46, 3, attention.indexer)


def test_windows_without_a_list(fields):
    fields["sliding_window_list"] = None
    assert windows(fields) == [None, 7, 7, None, 7, 7, 7]
    fields |= {"swa_layers": [2, 1, 5], "sliding_window_list": [3, 4, 9]}
    assert windows(fields) == [None, 4, 3, None, 9, 9, 9]


def windows(fields):
    return [layer.attention.window for layer in PanguConfig.from_dict(fields).plan.layers]


@pytest.mark.parametrize("swa_layers, given", [
    ([1, 2, 4, 5, 6], [7, 7, 9, 9, 9]), ([1, 2, 4, 5, 6], [7, 7, 9]), ([1, 2, 4], [7, 7, 9]), ([1, 2], [7, 7, 9])])
def test_lists_may_name_each_mtp_layer_or_one_window_for_all(fields, swa_layers, given):
    assert windows(fields | {"swa_layers": swa_layers, "sliding_window_list": given}) == [None, 7, 7, None, 9, 9, 9]


def test_a_window_may_leave_out_the_own_row(fields):
    fields["swa_window_includes_self"] = False
    assert windows(fields) == [None, 8, 8, None, 8, 8, 8]
    cut = PanguConfig.from_dict(fields).cut(1, 2, True)
    assert [layer.attention.window for layer in cut.plan.layers] == [8, 8, 8, 8, 8]


def test_spellings_of_other_files(fields):
    fields |= {"model_type": "pangu_v2_moe", "architectures": ["PanguV2MoEForCausalLM"], "dtype": "float32",
               "rope_interleaved": fields.pop("rope_interleave")}
    del fields["torch_dtype"]
    config = config_from_dict(fields)
    assert config.to_dict() == fields | {"torch_dtype": "float32", "rope_interleave": False}
    with pytest.raises(ConfigError, match="rope_interleave: found False, but rope_interleaved says True; keep the"):
        PanguConfig.from_dict(fields | {"rope_interleave": False, "rope_interleaved": True})
    with pytest.raises(ConfigError, match="architectures: found .'LlamaForCausalLM'., wanted one of OpenPanguV2"):
        config_from_dict(fields | {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("change, names", [
    ({"swa_layers": [0, 1]}, "dsa_layers, swa_layers: found 0 in both"),
    ({"sliding_window_list": [7]}, "sliding_window_list: found 1 entries, wanted one for each of the 2"),
    ({"sliding_window_list": [7, 0]}, "sliding_window_list: found 0"),
    ({"dsa_layers": [0, 4]}, "dsa_layers: found 4, wanted 0 to 3"),
    ({"dsa_layers": [-1]}, "dsa_layers: found -1"),
    ({"dsa_layers": [0, 0, 3]}, "dsa_layers: found 0 twice"),
    ({"swa_layers": [1, 7]}, "swa_layers: found 7, wanted 0 to 6"),
    ({"block_post_layernorm_idx": [4]}, "block_post_layernorm_idx: found 4, wanted 0 to 3"),
    ({"index_topk": 0}, "index_topk: found 0"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', wanted 'silu'"),
    ({"model_type": "llama"}, "model_type: found 'llama'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 10000.0}}, "rope_parameters: found rope"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: found rope type 'linear'"),
    ({"rope_theta": 5.0}, "rope_theta: found 5.0, but rope_parameters says 10000.0"),
    ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta: found -1.0"),
    ({"rope_interleave": True}, "rope_interleave: found True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
    ({"use_mhc": False}, "use_mhc: found False"),
    ({"sandwich_norm": False}, "sandwich_norm: found False"),
    ({"use_mome": False}, "use_mome: found False"),
    ({"mhc_use_gamma": False}, "mhc_use_gamma: found False"),
    ({"router_enable_expert_bias": False}, "router_enable_expert_bias: found False"),
    ({"param_sink_with_value": False}, "param_sink_with_value: found False"),
    ({"param_sink_number": 0}, "param_sink_number: found 0"),
    ({"n_group": 2}, "n_group: found 2"),
    ({"topk_group": 2}, "topk_group: found 2"),
    ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
    ({"num_experts_per_tok": 9}, "n_routed_experts: found 8, wanted at least num_experts_per_tok = 9"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: found 7, wanted an even number"),
    ({"index_head_dim": 6}, "index_head_dim: found 6, wanted at least qk_rope_head_dim = 8"),
    ({"first_k_dense_replace": 5}, "num_hidden_layers: found 4, wanted at least first_k_dense_replace = 5"),
    ({"hidden_size": 0}, "hidden_size: found 0, wanted more than 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, wanted at most 1000"),
    ({"hidden_size": "48"}, "hidden_size: found '48', wanted int"),
    ({"hidden_size": 48.0}, "hidden_size: found 48.0, wanted int"),
    ({"hidden_size": True}, "hidden_size: found True, wanted int"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found nan"),
    ({"dsa_layers": 0}, "dsa_layers: found 0, wanted list[int]"),
    ({"dsa_layers": [0, "3"]}, "dsa_layers: found (0, '3')"),
    ({"mtp_hidden": "last"}, "mtp_hidden: found 'last', wanted one of merged, final"),
    ({"compute_dtype": "int8"}, "compute_dtype: found 'int8'"),
    ({"dtype": "bfloat16"}, "dtype: found 'bfloat16', but torch_dtype says 'float32'"),
])
def test_refuses_by_name(fields, change, names):
    with pytest.raises(ConfigError) as refusal:
        PanguConfig.from_dict(fields | change)
    assert names in str(refusal.value)
    with pytest.raises(ConfigError):  # a config that stands cannot be turned into one that would not
        dataclasses.replace(PanguConfig.from_dict(fields), **change)


def test_every_problem_is_named_at_once(fields):
    with pytest.raises(ConfigError) as refusal:
        PanguConfig.from_dict(fields | {"hidden_act": "relu", "index_topk": 0, "use_mome": False})
    assert all(name in str(refusal.value) for name in ("hidden_act", "index_topk", "use_mome"))


def test_rope_theta_may_stand_in_either_place(fields):
    del fields["rope_theta"]
    config = PanguConfig.from_dict(fields)
    assert config.rope_theta == 10000.0 and config.to_dict() == fields | {"dtype": "float32"}
    fields |= {"rope_parameters": None, "rope_scaling": {"rope_type": "deepseek_yarn", "factor": 1, "rope_theta": 77}}
    assert PanguConfig.from_dict(fields).rope_theta == 77


@pytest.mark.parametrize("name", ["hidden_size", "dsa_layers", "num_nextn_predict_layers", "index_topk"])
def test_fields_that_decide_the_model_must_be_there(fields, name):
    del fields[name]
    with pytest.raises(ConfigError, match=f"lacks {name};"):
        PanguConfig.from_dict(fields)


def test_no_flash_values_for_what_another_model_leaves_out(fields):
    for name in ("block_post_layernorm_idx", "sliding_window_list", "bos_token_id", "eos_token_id", "pad_token_id"):
        del fields[name]
    config = PanguConfig.from_dict(fields)
    assert config.block_post_layernorm_idx is config.sliding_window_list is config.eos_token_id is None
    assert not any(p.block_norm for p in config.plan.layers)
    del fields["sliding_window"], fields["rope_theta"], fields["rope_parameters"]
    with pytest.raises(ConfigError, match="lacks sliding_window, rope_theta;"):
        PanguConfig.from_dict(fields)


@pytest.mark.parametrize("text, says", [
    (None, "no such file"), ("{", "cannot be read as JSON"), ("[1]", "holds a list"), ("\xff\xfe", "cannot be read"),
    ("[" * 100_000, "cannot be read as JSON"),
])
def test_a_bad_file_is_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PanguError, match=says) as refusal:
        PanguConfig.from_pretrained(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))


def test_no_such_directory(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        PanguConfig.from_pretrained(tmp_path / "nowhere")


def test_presets_pick_nothing_that_is_not_published():
    flash = PanguConfig.flash_92b()
    assert (flash.num_hidden_layers, flash.rope_theta, flash.to_dict()["dtype"]) == (46, 6.4e6, "bfloat16")
    with pytest.raises(ConfigError, match="pro_505b: no public source gives q_lora_rank, .*rope_theta;"):
        PanguConfig.pro_505b()
    with pytest.raises(ConfigError, match="rope_theta, num_hidden_layers, num_nextn_predict_layers, max_position"):
        PanguConfig.small_34b()
    given = {name: getattr(flash, name) for name in UNPUBLISHED}
    pro = PanguConfig.pro_505b(**given | {"sliding_window_list": None})
    assert (pro.hidden_size, pro.n_routed_experts, pro.num_hidden_layers) == (5120, 384, 50)


@pytest.mark.parametrize("room", ["checkpoint", "conversion"])
def test_other_rooms_name_no_field_of_it(room):
    """They serve every architecture, and ask its config for a field's name where a message needs one."""
    own = PanguConfig.given_fields().keys() - {"architectures", "dtype", "torch_dtype", "quantization_config"}
    sources = list((Path(pangu_ms.__file__).parent / room).glob("*.py"))
    assert sources and not own & set(re.findall(r"\w+", "".join(path.read_text() for path in sources)))


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PanguConfig().hidden_size = 1
