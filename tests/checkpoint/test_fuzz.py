"""Damaged and hostile checkpoints: refused in words, or read as the safetensors library reads them; nothing else."""
import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.conversion import command
from tests.checkpoint import generate

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**65), st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 99)),
    st.sampled_from(["F32", "BF16", "F16", "I8", "I64", [0, 0], [2**63, 2**63], {}, [[]], "../../x.safetensors",
                     "/etc/passwd", "config.json", "model-00002-of-00002.safetensors", "\ud800", "a\0b", 10**400]))


@pytest.fixture(autouse=True)
def one_parser(monkeypatch):
    """To make the command's options takes longer than to refuse a checkpoint."""
    parser = command.build_parser()
    monkeypatch.setattr(command, "build_parser", lambda: parser)


@pytest.fixture(scope="module")
def release(data, tmp_path_factory):
    """A sound checkpoint in two shards."""
    config = generate.config(data, **generate.SMALL)
    return generate.write(tmp_path_factory.mktemp("fuzz") / "in", config, generate.tensors(config), 2)


def outcome(release, damage):
    """Convert a damaged copy. Whatever happens: code 0 or 2, one message, no file outside, and no wrong result."""
    with tempfile.TemporaryDirectory() as root:
        source, target = Path(root, "in"), Path(root, "out")
        shutil.copytree(release, source)
        damage(source)
        before = {path: path.read_bytes() for path in source.iterdir()}
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = command.main(["hf2ms", str(source), str(target)])
        assert code in (0, 2)
        assert {path: path.read_bytes() for path in source.iterdir()} == before
        assert set(os.listdir(root)) <= {"in", "out", "out.partial"}
        if code == 2:
            assert errors.getvalue().startswith("pangu-convert: error: ") and len(errors.getvalue()) < 10_000
            errors.getvalue().encode()
            assert not target.exists()
            return 2
        found = {}
        for path in source.glob("*.safetensors"):
            for name, fields in safetensors.deserialize(path.read_bytes()):
                found[name] = bytes(fields["data"])
        written = generate.read(target)
        wanted = parameters(read_config(source))
        assert written.keys() == wanted.keys()
        for name, p in wanted.items():
            assert written[name][1:] == (p.shape, b"".join(found[s] for s in p.sources))
        return 0


def shard(source, number=1):
    return source / f"model-{number:05}-of-00002.safetensors"


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])


def test_the_sound_checkpoint_converts(release):
    assert outcome(release, lambda source: None) == 0


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_in_a_shard(release, flips):
    def damage(source):
        raw = bytearray(shard(source).read_bytes())
        for at, value in flips:
            raw[at % len(raw)] = value
        shard(source).write_bytes(raw)

    outcome(release, damage)


@EXAMPLES
@given(st.sampled_from(["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]),
       st.integers(0, 60_000), st.binary(max_size=8))
def test_truncations_and_insertions(release, name, at, inserted):
    def damage(source):
        raw = (source / name).read_bytes()
        at_ = at % (len(raw) + 1)
        (source / name).write_bytes(raw[:at_] + (inserted + raw[at_:] if inserted else b""))

    outcome(release, damage)


@EXAMPLES
@given(st.integers(0, 200), st.sampled_from(["dtype", "shape", "data_offsets", "extra"]), NASTY)
def test_nasty_values_in_a_header(release, which, key, value):
    def damage(source):
        def change(header):
            header[list(header)[which % len(header)]][key] = value
        rewrite_header(shard(source), change)

    outcome(release, damage)


@EXAMPLES
@given(st.integers(0, 200), st.integers(0, 200), st.sampled_from(["swap", "repeat", "drop", "rename"]))
def test_tensors_exchanged_in_a_header(release, one, other, how):
    def damage(source):
        def change(header):
            names = [name for name in header if name != "__metadata__"]
            a, b = names[one % len(names)], names[other % len(names)]
            if how == "swap":
                header[a], header[b] = header[b], header[a]
            elif how == "repeat":
                header[a] = header[b]
            elif how == "drop":
                del header[a]
            else:
                header[f"{b}x"] = header.pop(a)
        rewrite_header(shard(source), change)

    outcome(release, damage)


@EXAMPLES
@given(st.integers(0, 200), NASTY)
def test_nasty_values_in_the_index(release, which, value):
    def damage(source):
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        names = list(index["weight_map"])
        index["weight_map"][names[which % len(names)]] = value
        path.write_text(json.dumps(index if which % 5 else {"weight_map": value}))

    assert outcome(release, damage) == 2 or value in ("model-00001-of-00002.safetensors",
                                                       "model-00002-of-00002.safetensors")


@EXAMPLES
@given(st.integers(0, 100), NASTY)
def test_nasty_values_in_the_config(release, which, value):
    def damage(source):
        path = source / "config.json"
        fields = json.loads(path.read_text())
        fields[list(fields)[which % len(fields)]] = value
        path.write_text(json.dumps(fields))

    outcome(release, damage)


def test_the_oracle_sees_wrong_results(release, monkeypatch):
    """The comparison above fails when bytes come from the wrong place."""
    from pangu_ms.checkpoint import shards
    read_into = shards.StoredTensor.read_into
    monkeypatch.setattr(shards.StoredTensor, "read_into", lambda self, start, buffer: read_into(self, 0, buffer))
    monkeypatch.setattr("pangu_ms.checkpoint.copying.BLOCK", 64)
    with pytest.raises(AssertionError):
        outcome(release, lambda source: None)
