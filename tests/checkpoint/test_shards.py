import json
import os
import struct

import numpy as np
import pytest

from pangu_ms.checkpoint.shards import LARGEST_HEADER, Shards
from pangu_ms.errors import CheckpointError


def put(directory, header, data=b"\0" * 16, name="model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_byte_ranges(tmp_path):
    values = np.arange(4, dtype=np.float32)
    put(tmp_path, {"__metadata__": {"format": "pt"}, "b": tensor(shape=[2], offsets=[8, 16]),
                   "a": tensor(shape=[1, 2], offsets=[0, 8]), "none": tensor(shape=[0, 3], offsets=[8, 8])},
        values.tobytes())
    with Shards(tmp_path) as shards:
        assert shards.tensors.keys() == {"a", "b", "none"} and shards.tensors["a"].shape == (1, 2)
        out = np.empty(1, np.float32)
        shards.tensors["b"].read_into(4, memoryview(out).cast("B"))
        assert out[0] == 3


@pytest.mark.parametrize("header, data, says", [
    (b"", b"", "claims a header of 0 bytes"),
    (b"{}", b"x", "found 11 bytes, wanted 10"),
    (b"[]", b"", "holds a JSON list"),
    (b"{", b"", "claims a header of 1 bytes"),
    (b'{"a": ', b"", "cannot be read as JSON"),
    (b"[" * 100_000, b"", "cannot be read as JSON"),
    (b'{"a": 1' + b"0" * 5000 + b"}", b"", "cannot be read as JSON"),
    (b'{"\\ud800": {}}', b"", "cannot be read as JSON"),
    (b'{"\xff": {}}', b"", "cannot be read as JSON"),
    (b'{"a": {}, "a": {}}', b"", "the key 'a' occurs twice"),
    (b'{"a": {"dtype": "F32", "dtype": "I8"}}', b"", "the key 'dtype' occurs twice"),
    ({"__metadata__": None}, b"", "found __metadata__ 'None'"),
    ({"__metadata__": {"format": 1}}, b"", "found __metadata__"),
    ({"a": 3}, b"", "a: its header wants exactly"),
    ({"a": {"dtype": "F32", "shape": [4]}}, b"", "a: its header wants exactly"),
    ({"a": tensor(dtype="F99")}, b"\0" * 16, "a: found dtype 'F99'"),
    ({"a": tensor(dtype=["F32"])}, b"\0" * 16, "a: found dtype"),
    ({"a": tensor(shape=[-4])}, b"\0" * 16, "a: found shape"),
    ({"a": tensor(shape=[True, 4])}, b"\0" * 16, "a: found shape"),
    ({"a": tensor(shape=[4.0])}, b"\0" * 16, "a: found shape"),
    ({"a": tensor(shape="4")}, b"\0" * 16, "a: found shape"),
    ({"a": tensor(shape=[2**62, 2**62])}, b"\0" * 16, "a: found data_offsets"),
    ({"a": tensor(shape=[5])}, b"\0" * 16, r"a: found data_offsets \[0, 16\], wanted 20 bytes"),
    ({"a": tensor(offsets=[16, 0])}, b"\0" * 16, "a: found data_offsets"),
    ({"a": tensor(offsets=[0])}, b"\0" * 16, "a: found data_offsets"),
    ({"a": tensor(offsets=[-16, 0])}, b"\0" * 16, "a: found data_offsets"),
    ({"a": tensor(offsets=[4, 20])}, b"\0" * 20, "a begins at byte .* leaves unused bytes"),
    ({"a": tensor(), "b": tensor(offsets=[8, 24])}, b"\0" * 24, "b begins at byte .* overlaps"),
    ({"a": tensor(), "b": tensor()}, b"\0" * 16, "begins at byte .* overlaps"),
    ({"a": tensor()}, b"\0" * 15, "cut short"),
    ({"a": tensor()}, b"\0" * 17, "too long"),
])
def test_refuses_headers(tmp_path, header, data, says):
    put(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=says) as refusal:
        Shards(tmp_path)
    assert "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize("raw", [b"", b"\1\0", struct.pack("<Q", 2**63), struct.pack("<Q", LARGEST_HEADER + 1) + b"{"])
def test_refuses_files_without_a_header(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="claims a header"):
        Shards(tmp_path)


def test_bounds_the_header(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:  # sparse: large for its size, nothing on disk
        file.write(struct.pack("<Q", LARGEST_HEADER + 1))
        file.truncate(LARGEST_HEADER + 100)
    with pytest.raises(CheckpointError, match="claims a header of 100000001 bytes"):
        Shards(tmp_path)


def put_index(directory, weight_map):
    if not isinstance(weight_map, bytes):
        weight_map = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    (directory / "model.safetensors.index.json").write_bytes(weight_map)


@pytest.mark.parametrize("name", [
    "../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "", "a\\b.safetensors", "a\0.safetensors",
    "\ud800.safetensors", "../inside/x.safetensors"])
def test_an_index_never_leaves_the_directory(tmp_path, name):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    for directory in (tmp_path, inside, inside / "sub"):
        put(directory, {"a": tensor()}, name="x.safetensors")
    put_index(inside, {"a": name})
    with pytest.raises(CheckpointError, match="wanted a plain name|surrogates not allowed"):
        Shards(inside)


def test_a_link_never_leaves_the_directory(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    put(tmp_path, {"a": tensor()})
    os.symlink(tmp_path / "model.safetensors", inside / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a link to .* outside"):
        Shards(inside)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    put(blobs, {"a": tensor()}, name="0123")
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    with Shards(snapshot) as shards:
        assert shards.tensors.keys() == {"a"}


@pytest.mark.parametrize("weight_map, says", [
    ({"a": "x.safetensors"}, "disagrees with the shards about 1 tensors, first b: found no entry"),
    ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "first c: .* it is in no shard"),
    ({"a": "x.safetensors", "b": "y.safetensors"}, "y.safetensors: the shard is missing"),
    ({}, "wanted a \"weight_map\""),
    ({"a": 3}, "wanted a \"weight_map\""),
    (b"{}", "wanted a \"weight_map\""),
    (b"nonsense", "cannot be read as JSON"),
])
def test_refuses_an_index_that_does_not_fit(tmp_path, weight_map, says):
    put(tmp_path, {"a": tensor(), "b": tensor(offsets=[16, 32])}, b"\0" * 32, name="x.safetensors")
    put_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=says):
        Shards(tmp_path)


def test_refuses_a_tensor_in_two_shards(tmp_path):
    put(tmp_path, {"a": tensor()}, name="x.safetensors")
    put(tmp_path, {"a": tensor(), "b": tensor(offsets=[16, 32])}, b"\0" * 32, name="y.safetensors")
    put_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(CheckpointError, match="a stands in x.safetensors too"):
        Shards(tmp_path)


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither"):
        Shards(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):  # opening it would wait for ever
        Shards(tmp_path)
