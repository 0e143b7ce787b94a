"""openPangu R-72B-2512 there and back: a fused projection, sinks by head, the two places of the selection bias."""
import numpy as np
import pytest

from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.inspect import inspect
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.errors import CheckpointError
from tests.checkpoint import generate
from tests.conversion.commands import convert, refused


def test_slices_hold_whole_heads_and_join(data, tmp_path, capsys):
    """Rows of 6 query heads and 2 key heads of 16, and of 2 value heads of 12: half of each. Experts by fives."""
    source = data / "pro_moe_v2"
    whole = generate.read(source)
    convert("hf2ms", source, tmp_path / "ranks", "--tensor-parallel", 2, "--expert-parallel", 2, "--verify")
    rank = generate.read(tmp_path / "ranks" / "rank_3")
    rows = np.r_[48:96, 112:128, 140:152]
    for name, part in {"qkv_proj.weight": rows, "param_sink_key": np.s_[:, 1:], "param_sink_value": np.s_[:, 1:],
                       "k_layernorm.weight": np.s_[:], "o_proj.weight": np.s_[:, 36:]}.items():
        (_, shape, raw), (_, _, own) = (each["model.layers.4.self_attn." + name] for each in (whole, rank))
        assert np.frombuffer(raw, np.float32).reshape(shape)[part].tobytes() == own, name
    assert rank["model.layers.4.mlp.experts.up_proj.weight"][1] == (5, 8, 44)
    convert("hf2ms", tmp_path / "ranks", tmp_path / "other", "--expert-parallel", 5, "--verify")
    assert convert("ms2hf", tmp_path / "other", tmp_path / "hf") == whole
    assert "tensor parallel 4 does not divide 2 kv_heads (self_attn.qkv_proj.weight" in refused(
        capsys, "hf2ms", source, tmp_path / "four", "--tensor-parallel", 4)


def test_the_selection_bias_may_stand_below_the_gate(data, tmp_path):
    """It is then the same tensor, and comes back where the release has it; in both places at once it is refused."""
    config = read_config(data / "pro_moe_v2")
    tensors = generate.tensors(config, "float32")
    moved = {name.replace("mlp.e_score", "mlp.gate.e_score"): values for name, values in tensors.items()}
    assert moved.keys() != tensors.keys()
    source = generate.write(tmp_path / "source", config, moved)
    assert inspect(source)["fits"] and "unknown" not in inspect(source)["components"]
    convert("hf2ms", source, tmp_path / "ms")
    back = convert("ms2hf", tmp_path / "ms", tmp_path / "hf")
    assert back == generate.read(generate.write(tmp_path / "plain", config, tensors))
    with pytest.raises(CheckpointError, match="4 unexpected:\n  model.layers.1.mlp.gate.e_score_correction_bias"):
        read_parameters(generate.write(tmp_path / "both", config, tensors | moved), config)


def test_kept_layers_are_dense_or_not_as_before(data, tmp_path):
    cut = convert("hf2ms", data / "pro_moe_v2", tmp_path / "ms", "--layers", "0-1")
    config = read_config(tmp_path / "ms")
    assert [layer.moe for layer in config.plan.layers] == [False, True, True] and config.mlp_only_layers == (0,)
    assert cut["model.layers.2.eh_proj.weight"] == generate.read(data / "pro_moe_v2")["model.layers.4.eh_proj.weight"]
