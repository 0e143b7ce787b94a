"""tools/make_model.py: what it writes is a whole checkpoint, the same from the same seed, never over anything."""
import numpy as np
import pytest

from make_model import PRESETS, main, make_config
from pangu_ms.checkpoint.dtypes import to_float32
from pangu_ms.checkpoint.shards import Shards
from pangu_ms.checkpoint.source import open_source

ONE_LAYER = [f"--set={change}" for change in (
    "num_hidden_layers=1", "num_nextn_predict_layers=1", "first_k_dense_replace=0", "dsa_layers=[0]", "swa_layers=[1]",
    "sliding_window_list=null", "block_post_layernorm_idx=[0]")]


def tensors(directory):
    with Shards(directory) as shards:
        found = {}
        for name, stored in shards.tensors.items():
            values = np.empty(stored.nbytes, np.uint8)
            stored.read_into(0, memoryview(values))
            found[name] = to_float32(values.view({"F32": np.float32, "BF16": np.uint16}[stored.dtype]),
                                     stored.dtype).reshape(stored.shape)
        return found


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    plan = make_config(preset, []).plan
    assert (len(plan.trunk), len(plan.mtp_layers)) == {"tiny": (4, 3), "toy": (6, 3), "small": (8, 0),
                                                       "deep": (46, 3), "embedded_1b": (26, 0)}[preset]


def test_the_small_model_has_its_name():
    config = make_config("small", [])
    assert round(config.parameter_count()["trunk_and_mtp"] / 1e6) == 197
    assert config.plan.max_positions == 65536
    assert {layer.attention.window for layer in config.plan.layers} == {None, 128}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_checkpoint(tmp_path, dtype):
    out = tmp_path / "deep" / "model"
    assert main([str(out), *ONE_LAYER, f"--set=dtype={dtype}", "--seed", "3"]) == 0
    with open_source(out) as source:                                            # every tensor is accounted for
        assert source.layout == "released" and source.config.dtype == dtype
        assert len(source.repeats) == 2
    found = tensors(out)
    np.testing.assert_array_equal(found["model.layers.1.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert found["model.norm.weight"].mean() == pytest.approx(1, abs=0.1)
    experts = [found[f"model.layers.0.mlp.experts.{i}.gate_proj.weight"] for i in range(8)]
    assert np.std(experts) == pytest.approx(48 ** -0.5, rel=0.1)
    assert not np.array_equal(experts[0], experts[1])


def test_a_seed_decides_all(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([str(tmp_path / name), *ONE_LAYER, "--seed", str(seed)]) == 0
    one, same, other = (tensors(tmp_path / name) for name in "abc")
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options, words", [
    (["--set", "hiden_size=4"], "--set.hiden_size: no such key; did you mean hidden_size?"),
    (["--set", "hidden_size"], "wanted KEY=VALUE"),
    (["--set", "num_hidden_layers=2"], "dsa_layers: found 3, wanted 0 to 1"),
])
def test_wrong_input_is_one_line(tmp_path, capsys, options, words):
    assert main([str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    (tmp_path / "other.partial").mkdir()
    for out, words in (("out", "is there already"), ("out/file", "is there already"), ("other", "another run")):
        assert main([str(tmp_path / out), *ONE_LAYER]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "out" / "file").read_text() == "mine" and not any((tmp_path / "other.partial").iterdir())


@pytest.mark.slow
def test_activations_stay_sane(tmp_path):
    from pangu_ms import PanguForCausalLM
    assert main([str(tmp_path / "out"), *ONE_LAYER]) == 0
    logits = PanguForCausalLM.from_pretrained(tmp_path / "out")([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]).asnumpy()
    assert 0.3 < logits.std() < 3
