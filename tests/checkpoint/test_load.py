import dataclasses
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.conversion.command import main
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks
from tests.checkpoint import generate


def wanted(config, found):
    """The parameters that the release's tensors `found` make, put together by plain numpy."""
    return {name: np.stack([found[s] for s in p.sources]) if p.stacked else found[name]
            for name, p in parameters(config).items()}


def as_float(values):
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.astype(np.float32)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_parameter(data, tmp_path, stored, shards):
    config = generate.config(data)
    found = generate.tensors(config, stored)
    generate.write(tmp_path, config, found, shards)
    reader = read_parameters(tmp_path, config)
    read, expected = dict(reader), wanted(config, found)
    assert list(read) == list(parameters(config)) and len(reader) == len(read)
    assert reader.nbytes == sum(values.nbytes for values in read.values())
    for name, values in read.items():
        assert values.dtype == np.float32 and values.flags.writeable
        assert np.array_equal(values, as_float(expected[name])), name


@pytest.mark.parametrize("name", ["tiny", "tiny_full", "odd", "eps"])
def test_reads_the_golden_checkpoints(data, name):
    config = read_config(data / name)
    kinds = {"F32": np.float32}
    found = {tensor: np.frombuffer(raw, kinds[dtype]).reshape(shape)
             for tensor, (dtype, shape, raw) in generate.read(data / name).items()}
    expected = wanted(config, found)
    for tensor, values in read_parameters(data / name, config):
        assert np.array_equal(values, expected[tensor]), tensor


def test_bfloat16_comes_as_bit_patterns(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config)
    generate.write(tmp_path, config, found)
    expected = wanted(config, found)
    for name, values in read_parameters(tmp_path, config, "bfloat16"):
        assert values.dtype == (np.float32 if name.endswith("correction_bias") else np.uint16)
        assert np.array_equal(values, expected[name])


def test_an_int8_release_is_dequantised(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config, int8=True)
    generate.write(tmp_path, config, found, 2)
    read = dict(read_parameters(tmp_path, config))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert np.array_equal(read[name], found[name].astype(np.float32) * as_float(found[f"{name}_scale"]))
    expert = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert np.array_equal(read["model.layers.2.mlp.experts.down_proj.weight"][5],
                          found[expert].astype(np.float32) * as_float(found[f"{expert}_scale"]))


def test_a_rank_reads_its_part_of_any_layout(data, tmp_path):
    """A whole directory, one that is sliced otherwise, and its own rank of one sliced so: it opens nothing else."""
    config, ranks = generate.config(data, **generate.SLICEABLE), Ranks(2, 2)
    release = generate.write(tmp_path / "release", config, generate.tensors(config))
    whole = dict(read_parameters(release, config))
    for tensor, expert in ((2, 2), (4, 1)):
        assert main(["hf2ms", str(release), str(tmp_path / f"{tensor}{expert}"), "--tensor-parallel", str(tensor),
                     "--expert-parallel", str(expert)]) == 0
    for directory in (release, tmp_path / "22", tmp_path / "41"):
        for rank in range(4):
            for name, values in read_parameters(directory, config, ranks=ranks.at(rank)):
                wanted = sliced(parameters(config)[name], ranks.at(rank)).part_of(whole[name])
                np.testing.assert_array_equal(values, wanted, name)
    (tmp_path / "22" / "rank_0" / "model.safetensors").unlink()
    for reader in (ranks.at(3), Ranks(2, 2, data=2, rank=7, batch_sharded=True)):  # the copy's rank 7 has the same part
        assert len(list(read_parameters(tmp_path / "22", config, ranks=reader))) == len(whole)


def refusal(directory, config):
    with pytest.raises(CheckpointError) as refused:
        read_parameters(directory, config)
    return str(refused.value)


def test_every_problem_is_named_in_one_error(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config)
    del found["model.norm.weight"], found["model.layers.2.mlp.experts.3.up_proj.weight"]
    found["model.layers.9.extra"] = found["model.layers.0.stray.weight"] = np.zeros(3, np.float32)
    found["lm_head.weight"] = found["lm_head.weight"][:, :-1]
    found["model.layers.0.self_attn.q_a_proj.weight"] = np.zeros((32, 48), np.int8)
    text = refusal(generate.write(tmp_path, config, found), config)
    assert "2 missing:\n  model.layers.2.mlp.experts.3.up_proj.weight [20, 48]\n  model.norm.weight [48]" in text
    assert "2 unexpected:\n  model.layers.0.stray.weight\n  model.layers.9.extra" in text
    assert "lm_head.weight: found BF16 [199, 47], wanted F32 or F16 or BF16 [199, 48]" in text
    assert "q_a_proj.weight: found I8" in text


def test_long_lists_are_cut(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config)
    found |= {f"stray.{i:02}": np.zeros(1, np.float32) for i in range(30)}
    text = refusal(generate.write(tmp_path, config, found), config)
    assert "30 unexpected:" in text and "stray.19" in text and "stray.20" not in text and "... and 10 more" in text


def test_mtp_layers_that_the_config_does_not_know(data, tmp_path):
    config = generate.config(data)
    generate.write(tmp_path, config, generate.tensors(config))
    field = config.MTP_FIELD
    text = refusal(tmp_path, dataclasses.replace(config, **{field: 0}))
    assert "config.json says num_nextn_predict_layers 0, the checkpoint holds 3 MTP layers: set it to 3" in text
    assert main(["hf2ms", str(tmp_path), str(tmp_path / "ms")]) == 0
    assert "holds 3 MTP layers: set it to 3" in refusal(tmp_path / "ms", dataclasses.replace(config, **{field: 1}))


@pytest.mark.parametrize("copy", ["model.layers.5.embed_tokens.weight", "model.layers.6.shared_head.head.weight"])
def test_a_copy_that_differs_in_one_bit(data, tmp_path, copy):
    config = generate.config(data)
    found = generate.tensors(config)
    found[copy] = found[copy].copy()
    found[copy][-1, -1] ^= 1
    assert f"{copy} differs from" in refusal(generate.write(tmp_path, config, found), config)


def test_a_copy_in_another_format(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config)
    copy = "model.layers.5.embed_tokens.weight"
    found[copy] = found[copy].view(np.float16)  # the same bytes, other numbers
    assert f"{copy} differs from" in refusal(generate.write(tmp_path, config, found), config)


def test_the_two_releases_are_never_mixed(data, tmp_path):
    config = generate.config(data)
    found, other = generate.tensors(config, int8=True), generate.tensors(config)
    name = "model.layers.3.self_attn.q_b_proj.weight"
    found[name] = other[name]
    del found[f"{name}_scale"]
    text = refusal(generate.write(tmp_path, config, found), config)
    assert f"{name}: found BF16" in text and f"{name}_scale" in text and "never mixed" in text


def test_float16_overflow_is_refused(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config, "float32")
    found["model.norm.weight"][:2] = 1e6
    generate.write(tmp_path, config, found)
    with pytest.raises(CheckpointError, match="2 values of model.norm.weight are too large for float16"):
        dict(read_parameters(tmp_path, config, "float16"))
    with pytest.raises(CheckpointError, match="dtype: found 'int4'"):
        read_parameters(tmp_path, config, "int4")


def test_memory_is_one_tensor(data, tmp_path):
    config = generate.config(data, vocab_size=20_000, n_routed_experts=64, moe_intermediate_size=64)
    generate.write(tmp_path, config, generate.tensors(config))
    largest = max(p.count for p in parameters(config).values()) * 4
    reader = read_parameters(tmp_path, config)
    tracemalloc.start()
    total = sum(values.nbytes for _, values in reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 5 * largest  # or the next line would show nothing
    assert peak < 2 * largest + 4e6  # `values` of the step before is still alive when the next is read


def test_needs_neither_mindspore_nor_torch():
    """Nor do converting, inspecting, and the checkpoints of a training run."""
    rooms = "checkpoint.load, pangu_ms.checkpoint.inspect, pangu_ms.conversion.command, pangu_ms.training.run.state"
    script = (f"import sys, pangu_ms.{rooms}; "
              "sys.exit(any(m in sys.modules for m in ('mindspore', 'mindformers', 'torch', 'safetensors')))")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_mtp_layers_that_are_not_there(data, tmp_path):
    config = generate.config(data)
    generate.write(tmp_path, config, generate.tensors(dataclasses.replace(config, num_nextn_predict_layers=1)))
    assert "says num_nextn_predict_layers 3, 2 of these layers are not there: set it to 1" in refusal(tmp_path, config)


def test_mtp_layers_that_the_config_does_not_speak_of(data, tmp_path):
    config = read_config(data / "ultra_moe")
    found = generate.tensors(config, "float32")
    generate.write(tmp_path, dataclasses.replace(config, num_mtp_layers=0), found)
    assert "says num_mtp_layers 0, the checkpoint holds 1 MTP layers: set it to 1" in refusal(
        tmp_path, read_config(tmp_path))


def test_nothing_but_the_known_tables_of_embedded_is_dropped(data, tmp_path):
    config = read_config(data / "embedded_tied")
    found = generate.tensors(config, "float32")
    del found["model.layers.3.self_attn.o_proj.bias"]
    found |= {f"model.layers.{i}.self_attn.rotary_emb.{name}": np.zeros(3, np.float32)
              for i, name in ((0, "inv_freq"), (4, "inv_freq"), (1, "scale"))}
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    text = refusal(generate.write(tmp_path, config, found), config)
    assert "1 missing:\n  model.layers.3.self_attn.o_proj.bias [36]\n" in text
    assert ("3 unexpected:\n  lm_head.weight\n  model.layers.1.self_attn.rotary_emb.scale\n"
            "  model.layers.4.self_attn.rotary_emb.inv_freq") in text
