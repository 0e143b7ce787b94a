"""Checkpoints of a training run: complete or not there, and the newest of them is what a run goes on from."""
import json
import os
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import checkpoint_directory, checkpoints, read_config
from pangu_ms.checkpoint.inspect import diff, inspect
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.conversion.command import main as convert
from pangu_ms.errors import CheckpointError, PanguError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run import state
from pangu_ms.training.run.sharded_files import Share, lay_out, write_parts
from pangu_ms.training.run.state import RunState, check_fields, flatten, read_checkpoint, read_state
from tests.checkpoint import generate


@pytest.fixture(scope="module")
def config(data):
    return generate.config(data, **generate.SMALL)


@pytest.fixture(scope="module")
def weights(config):
    random = np.random.default_rng(0)
    return {p.name: random.standard_normal(p.shape, np.float32) for p in parameters(config).values()}


OPTIMIZER = {"adam_m.x": np.arange(6, dtype=np.float32).reshape(2, 3), "global_step": np.array([7], np.int32),
             "done": np.array(True), "none": np.zeros((0, 4), np.float16)}


def save(directory, config, weights, step, keep=9, **options):
    run = RunState(step, step * 4, 5, {"optimizer.type": "PanguMuon", "seed": 5})
    return state.save_checkpoint(str(directory), config, weights, OPTIMIZER, run, keep, **options)


def test_what_was_saved_comes_back(tmp_path, config, weights):
    directory = save(tmp_path, config, weights, 100)
    assert directory == str(tmp_path / "checkpoints" / "step_000100")
    assert read_state(directory) == RunState(100, 400, 5, {"optimizer.type": "PanguMuon", "seed": 5})
    for found, wanted in zip(read_checkpoint(directory), (weights, OPTIMIZER)):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype
            np.testing.assert_array_equal(found[name], wanted[name])


def test_a_checkpoint_is_one_of_ours(tmp_path, config, weights, data, capsys):
    """The model reads it, and pangu-convert gives the released layout with the tokenizer beside it."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    directory = save(tmp_path, config, weights, 3, tokenizer=str(tmp_path / "tokenizer"))
    with read_parameters(directory, config) as found:
        for name, values in found:
            np.testing.assert_array_equal(values, weights[name])
    assert convert(["ms2hf", directory, str(tmp_path / "hf"), "--verify"]) == 0
    assert "not copied: training" in capsys.readouterr().out
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("ranks", [Ranks(2, 1), Ranks(1, 2, 2), Ranks(2, 2)], ids=str)
def test_ranks_write_what_one_process_would(tmp_path, data, ranks):
    """And any other ranks read their parts of it. A copy of the model writes nothing."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
    config = generate.config(data, **generate.SMALL | sizes)
    known, random = parameters(config), np.random.default_rng(1)
    weights = {name: random.standard_normal(p.shape, np.float32) for name, p in known.items()}
    optimizer = {"global_step": np.array([7], np.int32)}
    optimizer |= {f"muon.{name}": random.standard_normal(p.shape, np.float32) for name, p in known.items()}

    def held(arrays, ranks):
        names = {name: name.removeprefix("muon.") for name in arrays}
        return {name: sliced(known[names[name]], ranks).part_of(values) if names[name] in known else values
                for name, values in arrays.items()}

    def save_all(directory, ranks):
        barrier = threading.Barrier(ranks.count)

        def save_one(rank):
            place = ranks.at(rank)
            arrays = [held(arrays, place) for arrays in (weights, optimizer)] if rank < ranks.model.count else ({}, {})
            return state.save_checkpoint(str(directory), config, *arrays, RunState(1, 4, 5, {}), 9, ranks=place,
                                         wait=barrier.wait)

        with ThreadPoolExecutor(ranks.count) as pool:
            return list(pool.map(save_one, range(ranks.count)))[0]

    alone, together = save_all(tmp_path / "alone", Ranks()), save_all(tmp_path / "together", ranks)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert Path(together, name).read_bytes() == Path(alone, name).read_bytes()
    for other in (Ranks(), Ranks(4, 1), Ranks(1, 4, 2)):
        for rank in range(other.count):
            for found, arrays in zip(read_checkpoint(together, other.at(rank)), (weights, optimizer)):
                wanted = held(arrays, other.at(rank))
                assert found.keys() == wanted.keys()
                for name in wanted:
                    np.testing.assert_array_equal(found[name], wanted[name])


def test_a_rank_writes_its_own_bytes_and_no_others(tmp_path, data, monkeypatch):
    """Together the ranks write each byte behind the header once, also where a disk takes little at a time."""
    config = generate.config(data, **generate.SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4})
    path, written, pwrite = str(tmp_path / "x.safetensors"), [], os.pwrite

    def little(descriptor, values, start):
        count = pwrite(descriptor, values[:100], start)
        written.extend(range(start, start + count))
        return count

    monkeypatch.setattr(os, "pwrite", little)
    ranks = Ranks(2, 2, 2)
    for rank in range(ranks.count):
        share = Share(config, ranks.at(rank))
        held = {name: np.full(p.local_shape(ranks), rank + 1, np.float32) for name, p in parameters(config).items()}
        if rank == 0:
            lay_out(path, held, share)
            header = len(Path(path).read_bytes()) - 4 * sum(p.count for p in parameters(config).values())
        write_parts(path, held, share)
    assert sorted(written) == list(range(header, os.path.getsize(path)))


def test_a_run_stands_for_its_newest_checkpoint(tmp_path, config, weights, capsys):
    run = tmp_path / "run"
    save(run, config, {name: values + 1 for name, values in weights.items()}, 999_999)
    newest = save(run, config, weights, 1_000_000)
    os.makedirs(run / "checkpoints" / "step_2000000.partial")
    assert checkpoint_directory(run) == newest and read_config(run) == config
    for name, values in read_parameters(run, config):
        np.testing.assert_array_equal(values, weights[name])
    assert inspect(run)["fits"] and diff(run, newest)["equal"]
    assert convert(["ms2hf", str(run), str(tmp_path / "hf"), "--verify"]) == 0
    assert f"newest checkpoint of the run: {newest}\n" in capsys.readouterr().out
    assert diff(tmp_path / "hf", run)["equal"]


def test_a_checkpoint_stands_for_itself(tmp_path, config, weights):
    """Also where a run has written below it, or none has come as far as a checkpoint."""
    config.save_pretrained(tmp_path)
    save(tmp_path, config, weights, 1)
    assert checkpoint_directory(tmp_path) == str(tmp_path)
    os.makedirs(tmp_path / "begun" / "checkpoints" / "step_000001.partial")
    assert checkpoint_directory(tmp_path / "begun") == str(tmp_path / "begun")


def test_the_last_are_kept(tmp_path, config, weights):
    for step in (1, 2, 10):
        save(tmp_path, config, weights, step, keep=2)
    assert [os.path.basename(path) for path in checkpoints(str(tmp_path))] == ["step_000002", "step_000010"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000002", "step_000010"]
    assert checkpoints(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("call", range(12))
def test_an_interrupted_write_leaves_what_was_there(tmp_path, config, weights, monkeypatch, call):
    """The process dies at each of the calls that change the directory; the newest checkpoint is always whole."""
    save(tmp_path, config, weights, 1, keep=1)
    calls = 0

    class Died(BaseException):
        pass

    def dies(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise Died
            return function(*args, **kwargs)
        return wrapped

    for name in ("makedirs", "rename", "fsync"):
        monkeypatch.setattr(os, name, dies(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", dies(shutil.rmtree))
    with pytest.raises(Died):
        save(tmp_path, config, weights, 2, keep=1)
    monkeypatch.undo()
    newest = checkpoints(str(tmp_path))[-1]
    assert read_state(newest).step in (1, 2)
    assert read_checkpoint(newest)[0].keys() == weights.keys()
    save(tmp_path, config, weights, 3, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step_000003"]


def test_a_full_disk_is_one_line(tmp_path, config, weights, monkeypatch):
    save(tmp_path, config, weights, 1)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PanguError, match="step_000002: cannot be written: No space left on device; make room"):
        save(tmp_path, config, weights, 2)
    assert [os.path.basename(path) for path in checkpoints(str(tmp_path))] == ["step_000001"]


@pytest.mark.parametrize("name, says", [
    ("model.safetensors", "claims a header"), ("training/optimizer.safetensors", "claims a header"),
    ("training/state.json", "cannot be read")])
def test_damage_is_one_line(tmp_path, config, weights, name, says):
    directory = save(tmp_path, config, weights, 1)
    with open(os.path.join(directory, name), "r+b") as file:
        file.truncate(20)
    with pytest.raises(CheckpointError, match=f"{name}: .*{says}.* remove .*step_000001 to resume from the one before"):
        read_state(directory)
        read_checkpoint(directory)


def test_headers_are_checked(tmp_path, config, weights):
    """Two arrays on the same bytes, or in another shape, are not read as if they were what they say."""
    def changed(change):
        raw = Path(path).read_bytes()
        size, = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8:8 + size])
        change(header)
        text = json.dumps(header).encode()
        Path(path).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])
        with pytest.raises(CheckpointError, match="step_000001 to resume from the one before") as refusal:
            read_checkpoint(directory)
        return str(refusal.value)

    directory = save(tmp_path, config, weights, 1)
    path = os.path.join(directory, "model.safetensors")
    name, other = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    assert f"{name}: found [2, 4], wanted [8] by config.json" in changed(lambda h: h[name].update(shape=[2, 4]))
    assert "overlaps the tensor before it" in changed(lambda h: h.update({name: h[other]}))


@pytest.mark.parametrize("change, message", [
    ({"optimizer.type": "AdamW"}, "optimizer.type: found 'AdamW', but step_1 was trained with 'PanguMuon'"),
    ({"model.x": 1}, "model.x: found 1, but step_1 was trained with nothing"),
])
def test_another_configuration_is_refused(change, message):
    run = RunState(1, 4, 5, {"optimizer.type": "PanguMuon", "seed": 5})
    check_fields("step_1", run, dict(run.fields))
    with pytest.raises(PanguError, match=message):
        check_fields("step_1", run, run.fields | change)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
