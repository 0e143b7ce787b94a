"""Strict and safe: everything is checked before the first byte, and nothing is overwritten."""
import os
import runpy
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest

from pangu_ms.conversion.command import main
from tests.checkpoint import generate
from tests.conversion.commands import convert, refused


def test_everything_is_checked_before_the_first_byte(data, tmp_path, capsys):
    config = generate.config(data)
    found = generate.tensors(config)
    del found["model.norm.weight"]
    found["stray"] = np.zeros(1, np.float32)
    generate.write(tmp_path / "hf", config, found)
    text = refused(capsys, "hf2ms", tmp_path / "hf", tmp_path / "ms")
    assert "model.norm.weight" in text and "stray" in text
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_copy_that_differs_is_refused(data, tmp_path, capsys):
    config = generate.config(data)
    found = generate.tensors(config)
    found["model.layers.4.embed_tokens.weight"] = found["model.layers.4.embed_tokens.weight"] ^ 1
    generate.write(tmp_path / "hf", config, found)
    assert "model.layers.4.embed_tokens.weight differs" in refused(capsys, "hf2ms", tmp_path / "hf", tmp_path / "ms")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_foreign_output_directories_are_refused(data, tmp_path, capsys):
    target = tmp_path / "ms"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    assert "is not empty and was not written by pangu-convert" in refused(capsys, "hf2ms", data / "tiny", target)
    assert "holds 'thesis.txt'" in refused(capsys, "hf2ms", data / "tiny", target, "--expert-parallel", 2)
    partial = tmp_path / "other.partial"
    target.rename(partial)
    assert "holds 'thesis.txt'" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "other")
    assert (partial / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "file")
    assert "is not empty" in refused(capsys, "hf2ms", data / "tiny", data / "tiny")


def test_another_conversion_is_not_overwritten(data, tmp_path, capsys):
    convert("hf2ms", data / "tiny", tmp_path / "ms")
    assert "another conversion" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms", "--dtype", "bfloat16")
    assert "another conversion" in refused(capsys, "hf2ms", data / "odd", tmp_path / "ms")
    convert("hf2ms", data / "tiny", tmp_path / "ms")
    assert "was complete already" in capsys.readouterr().out
    with open(tmp_path / "ms" / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert "was changed after the conversion" in refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms")


def test_an_empty_output_directory_is_used(data, tmp_path):
    (tmp_path / "ms").mkdir()
    assert convert("hf2ms", data / "tiny", tmp_path / "ms")


def test_ms2hf_of_a_hugging_face_directory_is_refused(data, tmp_path, capsys):
    assert "already has the Hugging Face layout" in refused(capsys, "ms2hf", data / "tiny", tmp_path / "x")


def test_free_space_is_checked_first(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1_000_000))
    text = refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms")
    assert "1,310,308 bytes are still to be written, the disk has 1,000,000 free; make room" in text
    assert not (tmp_path / "ms.partial").exists()
    text = refused(capsys, "hf2ms", data / "tiny", tmp_path / "new" / "ranks", "--expert-parallel", 4)
    assert "bytes are still to be written" in text  # all four ranks together, though one would fit
    assert not list((tmp_path / "new" / "ranks").iterdir())


def test_verify_finds_a_flipped_bit(data, tmp_path, capsys):
    convert("hf2ms", data / "tiny", tmp_path / "ms")
    path = tmp_path / "ms" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 4
    path.write_bytes(raw)
    text = refused(capsys, "hf2ms", data / "tiny", tmp_path / "ms", "--verify")
    assert "differs from the source near its byte" in text


@pytest.mark.parametrize("options", [
    ["--shard-size", "0"], ["--shard-size", "x"], ["--shard-size", "9" * 400 + "GB"], ["--rank", "x"],
    ["--layers", "a-b"], ["--dtype", "int8"], ["--tensor-parallel", "0"], ["--expert-parallel", "1025"],
    ["--mtp", "maybe"]])
def test_wrong_options_leave_with_code_2(data, tmp_path, options):
    with pytest.raises(SystemExit) as left:
        main(["hf2ms", str(data / "tiny"), str(tmp_path / "ms"), *options])
    assert left.value.code == 2


@pytest.mark.parametrize("script, command", [("convert_hf_to_ms.py", "hf2ms"), ("convert_ms_to_hf.py", "ms2hf")])
def test_tools_with_mindformers_flags(data, tmp_path, capsys, monkeypatch, script, command):
    source = data / "tiny"
    if command == "ms2hf":
        convert("hf2ms", source, tmp_path / "ms")
        source = tmp_path / "ms"
    path = data.parent.parent / "tools" / script
    monkeypatch.setattr(sys, "argv", [str(path), "--input_path", str(source), "--output_path", str(tmp_path / "out"),
                                      "--dtype", "fp32", "--verify"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert left.value.code == 0
    assert "verified" in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").exists()
