import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.checkpoint.source import open_source
from pangu_ms.conversion.plan import Options, plan_conversion
from tests.checkpoint import generate
from tests.conversion.commands import convert, refused

GOLDEN = ("tiny", "tiny_full", "odd", "eps")


@pytest.fixture(scope="module")
def sliceable(data, tmp_path_factory):
    """A bfloat16 checkpoint in five shards whose heads, experts and rows 2 and 4 ranks can share; for reading alone."""
    config = generate.config(data, **generate.SLICEABLE)
    return generate.write(tmp_path_factory.mktemp("sliceable"), config, generate.tensors(config), 5)


@pytest.fixture(scope="module")
def two_ranks(sliceable, tmp_path_factory):
    """two_ranks(directory): a copy of the same, sliced for two expert parallel ranks."""
    directory = tmp_path_factory.mktemp("ranks") / "ranks"
    convert("hf2ms", sliceable, directory, "--expert-parallel", 2)
    return lambda copy: shutil.copytree(directory, copy)


# ---- round trips

@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints_come_back_bit_by_bit(data, tmp_path, name):
    ours = convert("hf2ms", data / name, tmp_path / "ms", "--verify")
    assert convert("ms2hf", tmp_path / "ms", tmp_path / "hf", "--verify") == generate.read(data / name)
    assert convert("hf2ms", tmp_path / "hf", tmp_path / "ms2") == ours
    before, after = (json.loads((d / "config.json").read_text()) for d in (data / name, tmp_path / "hf"))
    assert after == before | {"dtype": before["torch_dtype"]}
    assert (tmp_path / "ms" / "model.safetensors").read_bytes() == (tmp_path / "ms2" / "model.safetensors").read_bytes()
    config = read_config(tmp_path / "ms")
    assert config == read_config(data / name)
    for (left, a), (right, b) in zip(read_parameters(data / name, config), read_parameters(tmp_path / "ms", config)):
        assert left == right and np.array_equal(a, b)


def test_bfloat16_in_shards_comes_back_bit_by_bit(sliceable, tmp_path, monkeypatch):
    monkeypatch.setattr("pangu_ms.checkpoint.copying.BLOCK", 1000)  # blocks that end within a tensor,
    monkeypatch.setattr("pangu_ms.checkpoint.source.BLOCK", 16)      # rows that are longer than a block,
    monkeypatch.setattr("pangu_ms.conversion.write.FLUSH", 10_000)   # a disk that is told to begin again and again
    ours = convert("hf2ms", sliceable, tmp_path / "ms", "--shard-size", "100KB")
    assert len(list((tmp_path / "ms").glob("*.safetensors"))) > 3
    assert convert("ms2hf", tmp_path / "ms", tmp_path / "hf", "--shard-size", "70KB") == generate.read(sliceable)
    assert convert("hf2ms", tmp_path / "hf", tmp_path / "ms2", "--shard-size", "100KB") == ours
    assert {dtype for dtype, _, _ in ours.values()} == {"BF16", "F32"}  # F32: the correction biases


def test_every_tensor_lies_at_a_multiple_of_its_item_size(sliceable):
    """Sixteen-bit tensors of odd length would push the 32-bit ones behind them off their places."""
    with open_source(str(sliceable)) as source:
        for size in range(2_000, 20_000, 1_500):
            plan, = plan_conversion(source, Options(to="stacked", shard_size=size))
            for shard in plan.shards:
                offset = len(shard.header)
                for tensor in shard.tensors:
                    assert offset % CARRIERS[tensor.dtype].itemsize == 0
                    offset += tensor.nbytes


def test_our_format_is_what_plain_numpy_makes(sliceable, tmp_path):
    found, known = generate.read(sliceable), parameters(read_config(sliceable))
    for name, (dtype, shape, raw) in convert("hf2ms", sliceable, tmp_path / "ms").items():
        p = known[name]
        assert shape == p.shape and raw == b"".join(found[source][2] for source in p.sources)
        assert dtype == found[p.sources[0]][0]


@pytest.mark.parametrize("tensor, expert", [(2, 1), (1, 4), (2, 4)])
def test_slices_join_bit_by_bit(sliceable, tmp_path, tensor, expert):
    convert("hf2ms", sliceable, tmp_path / "ranks", "--tensor-parallel", tensor, "--expert-parallel", expert,
            "--verify")
    assert len(list((tmp_path / "ranks").glob("rank_*"))) == tensor * expert
    assert convert("ms2hf", tmp_path / "ranks", tmp_path / "hf") == generate.read(sliceable)


def test_a_slice_holds_its_own_part(sliceable, tmp_path):
    whole = convert("hf2ms", sliceable, tmp_path / "ms")
    convert("hf2ms", sliceable, tmp_path / "ranks", "--tensor-parallel", 2, "--expert-parallel", 2)
    rank = generate.read(tmp_path / "ranks" / "rank_3")  # second of two in both dimensions
    neighbour = generate.read(tmp_path / "ranks" / "rank_1")  # the tensor ranks of one expert rank follow each other

    def values(found, name):
        dtype, shape, raw = found[name]
        return np.frombuffer(raw, np.uint16).reshape(shape)

    layer = "model.layers.1."
    for name, index in {
        "self_attn.q_b_proj.weight": np.s_[48:], "self_attn.kv_b_proj.weight": np.s_[56:],
        "self_attn.o_proj.weight": np.s_[:, 24:], "self_attn.o_conv.weight": np.s_[24:], "self_attn.q_a_proj.weight":
        np.s_[:], "mlp.experts.gate_proj.weight": np.s_[4:, 10:], "mlp.experts.down_proj.weight": np.s_[4:, :, 10:],
        "mlp.shared_experts.up_proj.weight": np.s_[10:], "mlp.shared_experts.down_proj.weight": np.s_[:, 10:],
        "mlp.gate.weight": np.s_[:],
    }.items():
        assert np.array_equal(values(rank, layer + name), values(whole, layer + name)[index]), name
    experts = layer + "mlp.experts.gate_proj.weight"
    assert np.array_equal(values(neighbour, experts), values(whole, experts)[:4, 10:])
    assert np.array_equal(values(rank, "lm_head.weight"), values(whole, "lm_head.weight")[100:])
    assert np.array_equal(values(rank, "model.embed_tokens.weight"), values(whole, "model.embed_tokens.weight")[100:])


def test_ranks_written_one_at_a_time_join(sliceable, tmp_path, capsys):
    for rank in (1, 0):
        convert("hf2ms", sliceable, tmp_path / "ranks", "--expert-parallel", 2, "--rank", rank)
        if rank:
            assert "found 1 rank directories, wanted 2 (missing: 0)" in refused(
                capsys, "ms2hf", tmp_path / "ranks", tmp_path / "hf")
    assert convert("ms2hf", tmp_path / "ranks", tmp_path / "hf") == generate.read(sliceable)
    assert "--rank 2: wanted 0 to 1" in refused(
        capsys, "hf2ms", sliceable, tmp_path / "ranks", "--expert-parallel", 2, "--rank", 2)


def test_ranks_of_two_conversions_do_not_join(sliceable, tmp_path, capsys):
    for name, dtype in (("a", "keep"), ("b", "float32")):
        convert("hf2ms", sliceable, tmp_path / name, "--expert-parallel", 2, "--dtype", dtype)
    shutil.rmtree(tmp_path / "a" / "rank_1")
    assert "rank_0: comes from another conversion" in refused(  # nor is the second one written into the first
        capsys, "hf2ms", sliceable, tmp_path / "b", "--expert-parallel", 2, "--rank", 1)
    shutil.copytree(tmp_path / "b" / "rank_1", tmp_path / "a" / "rank_1")
    assert "comes from another conversion than" in refused(capsys, "ms2hf", tmp_path / "a", tmp_path / "hf")
    assert "is rank 1 of a sliced checkpoint" in refused(capsys, "ms2hf", tmp_path / "a" / "rank_1", tmp_path / "hf")


@pytest.mark.parametrize("change", [
    {"grid": None}, {"grid": {"tensor_parallel": 1}}, {"plan": 3}, {"files": []}, {"files": {"x": {"bytes": "1"}}},
    {"grid": {"tensor_parallel": 2**30, "expert_parallel": 2**30, "rank": 0}},
    {"grid": {"tensor_parallel": 0, "expert_parallel": 0, "rank": 0}},
    {"grid": {"tensor_parallel": 1, "expert_parallel": 2, "rank": 1}},
])
def test_damaged_manifests_are_refused(two_ranks, tmp_path, capsys, change):
    two_ranks(tmp_path / "ranks")
    path = tmp_path / "ranks" / "rank_0" / "pangu_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "rank" in refused(capsys, "ms2hf", tmp_path / "ranks", tmp_path / "hf")
    path.unlink()
    assert "it is not a finished rank" in refused(capsys, "ms2hf", tmp_path / "ranks", tmp_path / "hf")


def test_what_ranks_repeat_must_be_equal(two_ranks, tmp_path, capsys):
    two_ranks(tmp_path / "ranks")
    path = tmp_path / "ranks" / "rank_1" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # the last tensor of the file belongs to every rank
    path.write_bytes(raw)
    assert "which it must repeat" in refused(capsys, "ms2hf", tmp_path / "ranks", tmp_path / "hf")


# ---- options

def test_mtp_drop(data, tmp_path, capsys):
    ours = convert("hf2ms", data / "tiny", tmp_path / "ms", "--mtp", "drop")
    assert "num_nextn_predict_layers is now 0" in capsys.readouterr().out
    config = read_config(tmp_path / "ms")
    assert config.num_nextn_predict_layers == 0 and len(config.plan.layers) == 4
    assert not any(name.startswith(("model.layers.4.", "model.layers.6.")) for name in ours)
    assert len(dict(read_parameters(tmp_path / "ms", config))) == len(ours)
    back = convert("ms2hf", tmp_path / "ms", tmp_path / "hf")
    kept = {n: v for n, v in generate.read(data / "tiny").items() if not n.startswith(("model.layers.4.",
            "model.layers.5.", "model.layers.6."))}
    assert back == kept


def test_layers_are_cut_and_renumbered(data, tmp_path):
    source = generate.read(data / "tiny_full")
    cut = convert("hf2ms", data / "tiny_full", tmp_path / "ms", "--layers", "1-2")
    config = read_config(tmp_path / "ms")
    assert [(p.attention.kind, p.attention.window, p.moe, p.mtp_depth) for p in config.plan.layers] == [
        ("swa", 6, False, 0), ("swa", 11, True, 0), ("swa", 4, True, 1), ("swa", 4, True, 2), ("swa", 4, True, 3)]
    assert cut["model.layers.0.input_layernorm.weight"] == source["model.layers.1.input_layernorm.weight"]
    assert cut["model.layers.2.eh_proj.weight"] == source["model.layers.6.eh_proj.weight"]
    assert cut["lm_head.weight"] == source["lm_head.weight"]
    back = convert("ms2hf", tmp_path / "ms", tmp_path / "hf")
    assert back["model.layers.1.mlp.experts.3.up_proj.weight"] == source["model.layers.2.mlp.experts.3.up_proj.weight"]
    assert back["model.layers.4.embed_tokens.weight"] == source["model.embed_tokens.weight"]


def test_a_model_without_experts_goes_both_ways(data, tmp_path):
    """Its tensors have the same names and shapes in both layouts, so that nothing tells them apart."""
    convert("hf2ms", data / "tiny", tmp_path / "ms", "--layers", "0-0", "--mtp", "drop")
    back = convert("ms2hf", tmp_path / "ms", tmp_path / "hf", "--verify")
    whole = generate.read(data / "tiny")
    assert back == {name: whole[name] for name in back} and not any(".experts." in name for name in back)
    assert back == convert("hf2ms", tmp_path / "hf", tmp_path / "again") == generate.read(tmp_path / "ms")
    half = convert("ms2hf", tmp_path / "hf", tmp_path / "half", "--dtype", "float16")
    assert {dtype for dtype, _, _ in half.values()} == {"F16"}


def test_copies_may_be_left_out(data, tmp_path):
    convert("hf2ms", data / "tiny", tmp_path / "ms")
    small = convert("ms2hf", tmp_path / "ms", tmp_path / "hf", "--mtp-copies", "drop")
    whole = generate.read(data / "tiny")
    left_out = whole.keys() - small.keys()
    assert left_out == {f"model.layers.{layer}.{copy}.weight" for layer in (4, 5, 6)
                        for copy in ("embed_tokens", "shared_head.head")}
    assert all(small[name] == whole[name] for name in small)
    convert("hf2ms", tmp_path / "hf", tmp_path / "again")                       # they are not needed to read it
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "ms/model.safetensors").read_bytes()


def test_layers_beyond_the_trunk_are_refused(data, tmp_path, capsys):
    assert "wanted a range within 0-3" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms", "--layers", "2-4")


def test_a_cut_that_wants_other_tensors_is_refused(data, tmp_path, capsys, monkeypatch):
    """An architecture may cut its config wrongly: it then wants tensors that the checkpoint does not have."""
    architecture = type(read_config(data / "tiny"))
    cut = architecture.cut
    for change, says in (({"first_k_dense_replace": 0}, "has no such tensor; convert all layers"),
                         ({"vocab_size": 200}, "want model.embed_tokens.weight [200, 48], the model that is read has")):
        monkeypatch.setattr(architecture, "cut", lambda self, *given: dataclasses.replace(cut(self, *given), **change))
        assert says in refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms", "--layers", "0-1")
    assert not (tmp_path / "ms").exists()


def test_down_and_up_casts(data, tmp_path):
    convert("hf2ms", data / "tiny", tmp_path / "bf16", "--dtype", "bfloat16", "--verify")
    config = read_config(tmp_path / "bf16")
    assert config.torch_dtype == "bfloat16"
    originals = dict(read_parameters(data / "tiny", config))
    for name, values in read_parameters(tmp_path / "bf16", config):
        exact = originals[name]
        largest = 0 if name.endswith("correction_bias") else 2**-8  # half of the last of 8 bits
        assert np.all(np.abs(values - exact) <= largest * np.abs(exact)), name
    wide = convert("ms2hf", tmp_path / "bf16", tmp_path / "f32", "--dtype", "float32")
    assert {dtype for dtype, _, _ in wide.values()} == {"F32"}
    narrow = convert("hf2ms", tmp_path / "f32", tmp_path / "again", "--dtype", "bfloat16")
    assert narrow == generate.read(tmp_path / "bf16")


def test_overflow_is_counted_and_refused(data, tmp_path, capsys):
    config = generate.config(data)
    found = generate.tensors(config, "float32")
    found["model.norm.weight"][:3] = [1e6, -1e6, np.inf]
    source = generate.write(tmp_path / "hf", config, found)
    text = refused(capsys, "hf2ms", source, tmp_path / "ms", "--dtype", "float16")
    assert "2 values of model.norm.weight are too large for float16" in text and "--allow-overflow" in text
    assert not (tmp_path / "ms").exists()
    convert("hf2ms", source, tmp_path / "ms", "--dtype", "float16", "--allow-overflow")
    assert "overflow: 2 values of model.norm.weight are infinite now" in capsys.readouterr().out


def test_int8_is_dequantised_on_request(data, tmp_path, capsys):
    config = generate.config(data, quantization_config={"format": "int-quantized"})
    source = generate.write(tmp_path / "hf", config, generate.tensors(config, int8=True), 2)
    assert "is the Int8 release; add --dequantize" in refused(capsys, "hf2ms", source, tmp_path / "ms")
    ours = convert("hf2ms", source, tmp_path / "ms", "--dequantize", "--dtype", "float32", "--verify")
    assert "quantization_config" not in json.loads((tmp_path / "ms" / "config.json").read_text())
    assert not any(name.endswith("_scale") for name in ours)
    for name, values in read_parameters(source, config):
        assert np.array_equal(np.frombuffer(ours[name][2], np.float32), values.ravel()), name
    convert("hf2ms", source, tmp_path / "bf16", "--dequantize")  # keep: the format of the scales
    assert generate.read(tmp_path / "bf16")["model.layers.0.self_attn.o_proj.weight"][0] == "BF16"
    assert "leave out --dequantize" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "x", "--dequantize")


def test_dry_run_writes_nothing(sliceable, tmp_path, capsys):
    convert("hf2ms", sliceable, tmp_path / "ms", "--dry-run", "--shard-size", "200KB", "--mtp", "drop")
    text = capsys.readouterr().out
    assert not (tmp_path / "ms").exists() and not (tmp_path / "ms.partial").exists()
    assert "read: 356 tensors (released layout): 203 used, 6 repeat another" in text
    assert "147 left out" in text and "MTP layers 4 to 6" in text and "model-00002-of-0000" in text
    convert("hf2ms", sliceable, tmp_path / "ms", "--shard-size", "200KB", "--mtp", "drop")
    shards = {line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  model-")}
    assert shards == {path.name for path in (tmp_path / "ms").glob("*.safetensors")}


def test_documents_go_along(data, tmp_path, capsys):
    source = tmp_path / "hf"
    shutil.copytree(data / "tiny", source)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin", ".hidden"):
        (source / name).write_text(name)
    os.symlink("/etc/hostname", source / "secret.json")
    convert("hf2ms", source, tmp_path / "ms")
    names = {path.name for path in (tmp_path / "ms").iterdir()}
    assert names == {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "model.safetensors",
                     "model.safetensors.index.json", "pangu_manifest.json"}
    assert "pytorch_model.bin, secret.json" in capsys.readouterr().out
    assert (tmp_path / "ms" / "tokenizer.json").read_text() == "tokenizer.json"


@pytest.mark.slow
def test_mindspore_reads_the_shards(sliceable, tmp_path):
    """In a process of its own: MindSpore takes a while to import, and the converter must not need it."""
    ours = convert("hf2ms", sliceable, tmp_path / "ms", "--shard-size", "200KB", "--dtype", "float32")
    script = ("import sys, glob, mindspore, numpy as np\n"
              "found = {}\n"
              f"for path in glob.glob({str(tmp_path / 'ms')!r} + '/*.safetensors'):\n"
              "    found.update(mindspore.load_checkpoint(path, format='safetensors'))\n"
              f"np.savez({str(tmp_path / 'read.npz')!r}, **{{k: v.asnumpy() for k, v in found.items()}})\n")
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"GLOG_v": "3"})
    with np.load(tmp_path / "read.npz") as found:
        assert set(found.files) == ours.keys()
        for name in found.files:
            assert found[name].shape == ours[name][1] and found[name].tobytes() == ours[name][2], name
