"""Checkpoints of a training run: complete or not there, and the newest of them is what a run goes on from."""
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pangu_ms.checkpoint.convert import main as convert
from pangu_ms.checkpoint.layout import Grid, cut, sliced
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.checkpoint.names import parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.training import state
from pangu_ms.training.state import RunState, check_fields, checkpoints, flatten, read_checkpoint, read_state
from tests.parallel.conftest import CONFIG


@pytest.fixture(scope="module")
def config(data):
    return PanguConfig.from_pretrained(data / "tiny")


@pytest.fixture(scope="module")
def weights(config):
    random = np.random.default_rng(0)
    return {p.name: random.standard_normal((p.members, *p.member_shape) if p.stacked else p.member_shape, np.float32)
            for p in parameters(config).values()}


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


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2), Grid(2, 2)])
def test_ranks_write_what_one_process_would(tmp_path, grid):
    """And any other layout reads its parts of it. A copy of the model writes nothing."""
    known, random = parameters(CONFIG), np.random.default_rng(1)
    weights = {name: random.standard_normal(p.shape, np.float32) for name, p in known.items()}
    optimizer = {"global_step": np.array([7], np.int32)}
    optimizer |= {f"muon.{name}": random.standard_normal(p.shape, np.float32) for name, p in known.items()}
    state_of_run = RunState(1, 4, 5, {})

    def held(arrays, grid, rank):
        stored = {name: sliced(known[name.removeprefix("muon.")], grid, rank) for name in arrays if name in known
                  or name.startswith("muon.")}
        return {name: cut(values, stored[name]) if name in stored else values for name, values in arrays.items()}

    def save_all(directory, grid, copies):
        barrier = threading.Barrier(grid.ranks + copies)
        ranks = [*range(grid.ranks), *[None] * copies]
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(lambda rank: state.save_checkpoint(
                str(directory), CONFIG, *(held(arrays, grid, rank or 0) for arrays in (weights, optimizer)),
                state_of_run, 9, grid=grid, rank=rank, wait=barrier.wait), ranks))[0]

    alone, together = save_all(tmp_path / "alone", Grid(), 0), save_all(tmp_path / "together", grid, 1)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert Path(together, name).read_bytes() == Path(alone, name).read_bytes()
    for other in (Grid(), Grid(4, 1), Grid(1, 4)):
        for rank in range(other.ranks):
            for found, arrays in zip(read_checkpoint(together, other, rank), (weights, optimizer)):
                wanted = held(arrays, other, rank)
                assert found.keys() == wanted.keys()
                for name in wanted:
                    np.testing.assert_array_equal(found[name], wanted[name])


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


@pytest.mark.parametrize("name", ["model.safetensors", "training/optimizer.safetensors", "training/state.json"])
def test_damage_is_one_line(tmp_path, config, weights, name):
    directory = save(tmp_path, config, weights, 1)
    with open(os.path.join(directory, name), "r+b") as file:
        file.truncate(20)
    with pytest.raises(PanguError, match=f"{name}: cannot be read .*remove .*step_000001 to resume"):
        read_state(directory)
        read_checkpoint(directory)


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
