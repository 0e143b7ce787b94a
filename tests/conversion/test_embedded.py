"""Members of the family there and back: computed tensors, repeats, heads and groups of ranks, cut layers."""
import json

import numpy as np
import pytest

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.tensors import computed_tensors, mtp_copies
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.load import read_parameters
from tests.checkpoint import generate
from tests.conversion.commands import convert, refused


@pytest.mark.parametrize("name", ["embedded", "embedded_tied", "pro_moe", "pro_moe_v2", "ultra_moe"])
def test_a_member_comes_back_bit_by_bit_but_for_what_follows_from_the_config(data, tmp_path, capsys, name):
    """Of three shards; a table of frequencies for each layer, which the 7B stores, is read by nobody."""
    found = generate.read(data / name)
    computed = computed_tensors(read_config(data / name)) & found.keys()
    assert len(computed) == (3 if name == "embedded" else 0)
    convert("hf2ms", data / name, tmp_path / "ms", "--verify", "--shard-size", "100KB")
    copies = mtp_copies(read_config(data / name)).keys() & found.keys()
    assert f"{len(found) - len(computed) - len(copies)} used" in capsys.readouterr().out
    assert len(list((tmp_path / "ms").glob("*.safetensors"))) > 2
    back = convert("ms2hf", tmp_path / "ms", tmp_path / "hf", "--verify")
    assert back == {key: value for key, value in found.items() if key not in computed}
    config, other = read_config(data / name), read_config(tmp_path / "hf")
    assert config == other and config.to_dict() == json.loads((tmp_path / "hf" / "config.json").read_text())
    for (left, a), (right, b) in zip(read_parameters(data / name, config), read_parameters(tmp_path / "ms", config)):
        assert left == right and np.array_equal(a, b)


def test_slices_of_embedded_hold_whole_heads_and_join(data, tmp_path, capsys):
    fields = json.loads((data / "embedded" / "config.json").read_text()) | {"vocab_size": 212}
    config = config_from_dict(fields)
    source = generate.write(tmp_path / "source", config, generate.tensors(config), 2)
    whole = generate.read(source)
    convert("hf2ms", source, tmp_path / "ranks", "--tensor-parallel", 2, "--verify")
    rank = generate.read(tmp_path / "ranks" / "rank_1")
    for name, part in {"q_proj.weight": np.s_[24:], "k_proj.weight": np.s_[8:], "v_proj.bias": np.s_[8:],
                       "q_proj.bias": np.s_[24:], "o_proj.weight": np.s_[:, 24:], "o_proj.bias": np.s_[:]}.items():
        (_, shape, raw), (_, _, own) = (each["model.layers.1.self_attn." + name] for each in (whole, rank))
        assert np.frombuffer(raw, np.uint16).reshape(shape)[part].tobytes() == own
    assert convert("ms2hf", tmp_path / "ranks", tmp_path / "hf") == whole
    assert "tensor parallel 4 does not divide 6 heads" in refused(
        capsys, "hf2ms", source, tmp_path / "four", "--tensor-parallel", 4)


def test_slices_of_pro_moe_hold_whole_groups_and_join(data, tmp_path, capsys):
    fields = json.loads((data / "pro_moe" / "config.json").read_text()) | {"vocab_size": 200}
    config = config_from_dict(fields)
    source = generate.write(tmp_path / "source", config, generate.tensors(config), 2)
    whole = generate.read(source)
    convert("hf2ms", source, tmp_path / "ranks", "--tensor-parallel", 2, "--expert-parallel", 4, "--verify")
    rank, layer = generate.read(tmp_path / "ranks" / "rank_5"), "model.layers.1.mlp."    # tensor rank 1, expert rank 2
    (_, shape, raw) = rank[layer + "experts.down_proj.weight"]
    assert shape == (3, 40, 10)                                                 # one group of three
    for at, member in enumerate(np.frombuffer(raw, np.uint16).reshape(shape)):
        (_, shape, raw) = whole[f"{layer}experts.{6 + at}.down_proj.weight"]
        assert np.array_equal(member, np.frombuffer(raw, np.uint16).reshape(shape)[:, 10:])
    assert rank[layer + "router_scale"] == whole[layer + "router_scale"]
    assert convert("ms2hf", tmp_path / "ranks", tmp_path / "hf") == whole
    assert "expert parallel 3 does not divide 4 groups (mlp.experts.gate_proj.weight): take one of 1, 2, 4" in refused(
        capsys, "hf2ms", source, tmp_path / "three", "--expert-parallel", 3)


def test_slices_of_ultra_join_and_repeats_are_compared_and_not_written(data, tmp_path, capsys):
    """Nobody knows yet whether the release repeats embedding and head in its MTP layer."""
    fields = json.loads((data / "ultra_moe" / "config.json").read_text())
    config = config_from_dict(fields | {"vocab_size": 204, "num_attention_heads": 4, "num_routed_experts": 8})
    found = generate.tensors(config)
    source = generate.write(tmp_path / "source", config, found, 2)
    whole, copies = generate.read(source), mtp_copies(config).keys()
    assert copies == {f"model.layers.4.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    convert("hf2ms", source, tmp_path / "ranks", "--tensor-parallel", 2, "--expert-parallel", 2, "--verify")
    assert "2 repeat another and are compared with it" in capsys.readouterr().out
    rank = generate.read(tmp_path / "ranks" / "rank_3")
    assert rank["model.layers.4.mlp.experts.down_proj.weight"][1] == (4, 40, 9)
    assert rank["model.layers.0.self_attn.kv_b_proj.weight"][1] == (2 * (12 + 10), 20)
    back = convert("ms2hf", tmp_path / "ranks", tmp_path / "hf")
    assert back == {name: tensor for name, tensor in whole.items() if name not in copies}
    found["model.layers.4.shared_head.head.weight"] = found["lm_head.weight"] + 1
    other = generate.write(tmp_path / "other", config, found)
    assert "model.layers.4.shared_head.head.weight differs from lm_head.weight" in refused(
        capsys, "hf2ms", other, tmp_path / "none")


def test_layers_of_embedded_are_cut(data, tmp_path, capsys):
    source = generate.read(data / "embedded_tied")
    cut = convert("hf2ms", data / "embedded_tied", tmp_path / "ms", "--layers", "2-3")
    assert len(cut) == 2 * 13 + 2 and len(read_config(tmp_path / "ms").plan.layers) == 2
    assert cut["model.layers.1.self_attn.o_proj.bias"] == source["model.layers.3.self_attn.o_proj.bias"]
    assert "--layers 3-4: wanted a range within 0-3" in refused(
        capsys, "hf2ms", data / "embedded_tied", tmp_path / "none", "--layers", "3-4")
