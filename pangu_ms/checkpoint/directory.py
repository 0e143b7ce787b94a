"""What kind of directory a path is: a checkpoint, the ranks of one that is sliced, or a training run with several.

    DIR/config.json, *.safetensors            a checkpoint
    DIR/rank_0, rank_1, ...                   a sliced one: each rank has a config.json and its part of the tensors
    DIR/checkpoints/step_000100, ...          a training run: each step is a checkpoint
"""

import os
import re

from pangu_ms import architectures
from pangu_ms.architectures.fields import CONFIG_FILE, Config
from pangu_ms.errors import CheckpointError

CHECKPOINTS = "checkpoints"


def checkpoint_directory(directory: str | os.PathLike) -> str:
    """The newest complete checkpoint of a training run; any other directory as it is given.

    A directory with a config.json of its own is a checkpoint, though a run may have written below it.

    Raises:
        CheckpointError: the run's directory cannot be read.
    """
    directory = os.fspath(directory)
    found = [] if os.path.exists(os.path.join(directory, CONFIG_FILE)) else checkpoints(directory)
    return found[-1] if found else directory


def checkpoints(run_directory: str) -> list[str]:
    """The complete checkpoints of a run, oldest first; none when it has none, or is no run.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    steps = _numbers(os.path.join(run_directory, CHECKPOINTS), r"step_(\d{6}|[1-9]\d{6,11})")
    return [step_directory(run_directory, step) for step in steps]


def step_directory(run_directory: str, step: int) -> str:
    """Where a run keeps the checkpoint of an optimizer step."""
    return os.path.join(run_directory, CHECKPOINTS, f"step_{step:06}")


def rank_directories(directory: str) -> list[str]:
    """The rank_* directories of a sliced checkpoint in the order of their ranks; none for any other directory.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    return [rank_directory(directory, rank) for rank in _numbers(directory, r"rank_(0|[1-9]\d{0,5})")]


def rank_directory(directory: str, rank: int) -> str:
    """Where a sliced checkpoint keeps the part of a rank."""
    return os.path.join(directory, f"rank_{rank}")


def read_config(directory: str | os.PathLike) -> Config:
    """The config of a checkpoint of any layout, or of the newest of a training run.

    Raises:
        ConfigError: config.json is missing, damaged or refused; the message names the file.
        CheckpointError: the directory cannot be read.
    """
    return architectures.read_config(document_directory(directory))


def document_directory(directory: str | os.PathLike) -> str:
    """Where config.json and the tokenizer of a checkpoint lie: a sliced one has them in each rank."""
    directory = checkpoint_directory(directory)
    ranks = rank_directories(directory)
    return ranks[0] if ranks else directory


def _numbers(directory: str, pattern: str) -> list[int]:
    """The numbers in the names below a directory that match as a whole, sorted; none when there is no directory."""
    try:
        names = os.listdir(directory) if os.path.isdir(directory) else []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from None
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
