"""Checkpoints of a training run: one directory each, there completely or not at all.

    OUTPUT_DIR/checkpoints/step_000100/
        config.json, model.safetensors, tokenizer files    a checkpoint like any other of ours: pangu-generate reads it,
                                                           pangu-convert ms2hf turns it into the released layout
        training/optimizer.safetensors, state.json         what a resumed run needs besides, to go on with the same
                                                           numbers

A run that trains an adapter has adapter_config.json and adapter_model.safetensors, PEFT's layout, in place of
config.json and model.safetensors.

A checkpoint is written under another name, put on the disk, and renamed. What an interrupted write or removal leaves
ends in .partial and is never taken for a checkpoint. Ranks that share a model write one checkpoint together, the same
that one process would write, and any other ranks can go on from it. A rank that has written its part says so by a file,
not by a collective, which a thread beside the training must not begin. Needs no MindSpore.
"""
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pangu_ms.architectures.fields import ADAPTER_CONFIG, Config
from pangu_ms.checkpoint.adapter import ADAPTER_FILE, by_name, by_source
from pangu_ms.checkpoint.directory import checkpoints, read_config, step_directory
from pangu_ms.checkpoint.shards import SINGLE_FILE
from pangu_ms.conversion.write import sync
from pangu_ms.errors import CheckpointError, ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run.sharded_files import Share, lay_out, read_parts, write_parts

LOG_FILE = "log.jsonl"
OPTIMIZER_FILE = os.path.join("training", "optimizer.safetensors")
STATE_FILE = os.path.join("training", "state.json")
PARTIAL = ".partial"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json")
_DONE = "rank_{}.done"
_BEFORE = "remove {} to resume from the one before"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        sequences: sequences consumed by them, the cursor into the data's order.
        seed: of data order and initial values.
        fields: the run's configuration, values by dotted key; see `check_fields`.
    """

    step: int
    sequences: int
    seed: int
    fields: dict[str, Any]


def save_checkpoint(output_dir: str, config: Config, weights: dict[str, np.ndarray],
                    optimizer: dict[str, np.ndarray], state: RunState, keep: int, tokenizer: str | None = None,
                    ranks: Ranks = Ranks(), wait: Callable[[], None] = lambda: None,
                    start: Callable[[str, Callable[[], None]], None] = lambda name, work: work(),
                    adapter: dict | None = None) -> str:
    """Write `state.step`'s checkpoint, then remove all but the newest `keep`.

    Args:
        weights, optimizer: arrays by parameter name, in the dtype they are trained in; this rank's parts of them.
        tokenizer: a directory whose tokenizer files come along.
        ranks: how processes share the model, and which of them this is. A data parallel copy's arrays are not looked
            at: the first copy has written them.
        wait: returns when all processes of the run have called it.
        start: is given what the work is called, and the work: all that takes long. Default: it is done at once. Done in
            a thread, the arrays must not change meanwhile, and no other checkpoint begin.
        adapter: the contents of adapter_config.json, where the weights are those of an adapter, which `config` knows.

    Returns:
        The checkpoint's directory. It is there when the work of rank 0 is done.

    Raises:
        CheckpointError: also from the work: the disk is full or does not take it; earlier checkpoints stay as they are.
    """
    target = step_directory(output_dir, state.step)
    partial = target + PARTIAL
    if adapter:
        weights = by_source(weights, config)
    files = {os.path.join(partial, ADAPTER_FILE if adapter else SINGLE_FILE): weights,
             os.path.join(partial, OPTIMIZER_FILE): optimizer}
    share, writes = Share(config, ranks), ranks.rank < ranks.tensor * ranks.expert
    with _refusals(target, ranks):
        if ranks.rank == 0:
            _begin(partial, config, tokenizer, adapter)
            for path, arrays in files.items():
                lay_out(path, arrays, share)
    wait()

    def work():
        with _refusals(target, ranks):
            for path, arrays in files.items() if writes else ():
                write_parts(path, arrays, share)
            if ranks.rank == 0:
                _await_others(partial, ranks)
                _finish(partial, target, state)
                for old in checkpoints(output_dir)[:-keep]:
                    os.rename(old, old + PARTIAL)  # half removed, it must not look like a checkpoint
                    shutil.rmtree(old + PARTIAL)
            elif writes:
                open(os.path.join(partial, _DONE.format(ranks.rank)), "x").close()

    start(f"writing {os.path.relpath(target, output_dir)}", work)
    return target


@contextlib.contextmanager
def _refusals(target: str, ranks: Ranks):
    """What the disk refuses is a `CheckpointError` of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: not there for rank {ranks.rank}; choose an output_dir that all "
                              "processes reach") from None
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror}; make room or choose another output_dir, "
                              "then --resume goes on from the checkpoint before") from None


def _begin(partial: str, config: Config, tokenizer: str | None, adapter: dict | None) -> None:
    """Write what comes before the arrays, and remove what an interrupted write has left."""
    parent = os.path.dirname(partial)
    os.makedirs(parent, exist_ok=True)
    for name in os.listdir(parent):
        if name.endswith(PARTIAL):
            shutil.rmtree(os.path.join(parent, name))
    os.makedirs(os.path.join(partial, "training"))
    if adapter:
        with open(os.path.join(partial, ADAPTER_CONFIG), "w", encoding="utf-8") as file:
            json.dump(adapter, file, indent=1)
    else:
        config.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        if tokenizer and os.path.isfile(os.path.join(tokenizer, name)):
            shutil.copyfile(os.path.join(tokenizer, name), os.path.join(partial, name))


def _await_others(partial: str, ranks: Ranks) -> None:
    """Return when all ranks of the model have written their parts."""
    wanted = {_DONE.format(rank) for rank in range(1, ranks.model.count)}
    while wanted - set(os.listdir(partial)):
        time.sleep(0.05)
    for name in wanted:
        os.remove(os.path.join(partial, name))


def _finish(partial: str, target: str, state: RunState) -> None:
    """Write the state, have all of it and the log on the disk, and give the directory its name."""
    with open(os.path.join(partial, STATE_FILE), "w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=1)
    for directory, _, names in os.walk(partial, topdown=False):
        for name in (*names, ""):
            sync(os.path.join(directory, name))
    log = os.path.join(os.path.dirname(os.path.dirname(target)), LOG_FILE)
    if os.path.exists(log):
        sync(log)  # who resumes adds to its lines, which must be there up to the checkpoint
    os.rename(partial, target)
    sync(os.path.dirname(target))


def read_state(directory: str) -> RunState:
    """The state beside a checkpoint's weights; `CheckpointError` when no run has written it."""
    path = os.path.join(directory, STATE_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return RunState(**json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_BEFORE.format(directory)}") from None


def read_checkpoint(directory: str, ranks: Ranks = Ranks(),
                    config: Config | None = None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(weights, optimizer) as they were given to `save_checkpoint`: one rank's parts, whatever ranks wrote them.

    bfloat16 comes as uint16 bit patterns.

    Args:
        config: of the model, which knows the adapter, where the checkpoint is of one; default: what lies there.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit config.json.
    """
    found, share = [], Share(config or read_config(directory), ranks)
    adapter = os.path.exists(os.path.join(directory, ADAPTER_CONFIG))
    for name in (ADAPTER_FILE if adapter else SINGLE_FILE, OPTIMIZER_FILE):
        path = os.path.join(directory, name)
        try:
            found.append(read_parts(path, share))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_BEFORE.format(directory)}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or {_BEFORE.format(directory)}") from None
    return by_name(found[0], share.config) if adapter else found[0], found[1]


def check_fields(directory: str, state: RunState, fields: dict[str, Any]) -> None:
    """`ConfigError` names the first key in which a run's configuration differs from the one it would continue."""
    missing = object()
    for key in sorted(state.fields.keys() | fields.keys()):
        before, now = state.fields.get(key, missing), fields.get(key, missing)
        if before != now:
            shown = ["nothing" if value is missing else repr(value) for value in (before, now)]
            raise ConfigError(f"{key}: found {shown[1]}, but {directory} was trained with {shown[0]}; put that back to "
                              "resume, or choose another output_dir for a new run")


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key: {"a": {"b": 1}} -> {"a.b": 1}. Lists stay values."""
    flat = {}
    for key, value in fields.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
