"""Checkpoints that a thread writes while the training goes on: kills, a full disk, and who waits for whom."""
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import checkpoints
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run.background import Background
from pangu_ms.training.run.state import RunState, read_checkpoint, read_state, save_checkpoint
from tests.checkpoint import generate

ROOT = Path(__file__).parents[3]
STEPS = 18
# A run whose step changes the arrays in place. Its disk takes a few bytes at a time, so that it mostly writes.
TRAINING = f"""
import os, sys, time
import numpy as np
from pangu_ms.checkpoint.directory import checkpoints, read_config
from pangu_ms.training.run.background import Background
from pangu_ms.training.run.state import RunState, read_checkpoint, read_state, save_checkpoint
assert "mindspore" not in sys.modules
directory, config, pwrite = sys.argv[1], read_config(sys.argv[2]), os.pwrite

def slowly(descriptor, values, start):
    time.sleep(0.0005)
    return pwrite(descriptor, values[:256], start)

os.pwrite, found, background = slowly, checkpoints(directory), Background()
begun = 0
arrays = [{{"model.norm.weight": np.zeros(config.hidden_size, np.float32)}}, {{"m": np.ones(40_000, np.float32)}}]
if found:
    begun, arrays = read_state(found[-1]).step, list(read_checkpoint(found[-1]))
for step in range(begun + 1, {STEPS} + 1):
    time.sleep(0.01)
    for values in (*arrays[0].values(), *arrays[1].values()):
        values *= 0.75
        values += step
    if step % 3 == 0:
        background.wait()
        copies = [{{name: np.array(values) for name, values in each.items()}} for each in arrays]
        save_checkpoint(directory, config, *copies, RunState(step, step, 0, {{}}), 2, start=background.start)
"""


@pytest.fixture(scope="module")
def config(data):
    return generate.config(data, **generate.SMALL)


def numbers_of(step):
    weight, state = np.float32(0), np.float32(1)
    for n in range(1, step + 1):
        weight, state = (value * np.float32(0.75) + np.float32(n) for value in (weight, state))
    return weight, state


def test_kills_while_a_checkpoint_is_written(tmp_path, config):
    """What is there is whole and holds its step's numbers; the run that goes on from it ends with the right ones. The
    interpreter ends behind the last checkpoint."""
    config.save_pretrained(tmp_path / "config")
    run, partial = str(tmp_path / "run"), 0
    command = [sys.executable, "-c", TRAINING, run, str(tmp_path / "config")]
    for kill in (True, True, True, False):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        if kill:
            before = len(checkpoints(run)) and read_state(checkpoints(run)[-1]).step
            while process.poll() is None and not any(path.name == f"step_{before + 6:06}.partial"
                                                     for path in Path(run).glob("checkpoints/*")):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.25))
            process.kill()
        assert process.wait() == (-9 if kill else 0)
        partial += any(name.endswith(".partial") for name in os.listdir(Path(run, "checkpoints")))
        for path in checkpoints(run):
            found, (weight, state) = read_checkpoint(path), numbers_of(read_state(path).step)
            assert (found[0]["model.norm.weight"] == weight).all() and (found[1]["m"] == state).all()
    assert partial >= 1
    assert sorted(os.listdir(Path(run, "checkpoints"))) == [f"step_{STEPS - 3:06}", f"step_{STEPS:06}"]


def test_a_full_disk_is_one_line_later(tmp_path, config, monkeypatch):
    weights = {p.name: np.ones(p.shape, np.float32) for p in parameters(config).values()}
    background = Background()

    def save(step):
        return save_checkpoint(str(tmp_path), config, weights, {"n": np.array(step)}, RunState(step, step, 0, {}), 1,
                               start=background.start)

    def full(*_):
        raise OSError(28, "No space left on device")

    kept = save(1)
    background.wait()
    monkeypatch.setattr(os, "pwrite", full)
    save(2)
    with pytest.raises(CheckpointError, match="^.*step_000002: cannot be written: No space left on device; make room"):
        background.wait()
    background.wait()                                                           # which has said it
    assert checkpoints(str(tmp_path)) == [kept] and read_checkpoint(kept)[1]["n"] == 1


def test_the_first_rank_waits_for_the_others(data, tmp_path):
    """A checkpoint of two ranks gets its name when both have written, and keeps nothing of how they told each other."""
    config = generate.config(data, **generate.SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4})
    background, ranks = Background(), Ranks(2)
    weights = {p.name: np.ones(p.local_shape(ranks), np.float32) for p in parameters(config).values()}

    def save(rank, **options):
        return save_checkpoint(str(tmp_path), config, weights, {"n": np.array(1)}, RunState(1, 1, 0, {}), 1,
                               ranks=ranks.at(rank), **options)

    path = save(0, start=background.start)
    time.sleep(0.2)
    background.check()
    assert checkpoints(str(tmp_path)) == []
    save(1)
    background.wait()
    assert checkpoints(str(tmp_path)) == [path] and not list(Path(path).rglob("*.done"))
    assert all((values == 1).all() for values in read_checkpoint(path)[0].values())


def test_one_thing_at_a_time():
    """`start` waits for what was begun before, `check` for nothing."""
    background, done, go = Background(), [], threading.Event()
    background.start("first", lambda: go.wait() and done.append("first"))
    background.check()
    threading.Timer(0.05, go.set).start()
    background.start("second", lambda: done.append("second"))
    assert done[0] == "first"
    background.wait()
    assert done == ["first", "second"]
