"""The arrays of a training checkpoint: safetensors files that hold them whole, whichever ranks share the model.

Each rank writes its part of every array in its place, and reads its part whatever ranks wrote it. So the files lie
where all ranks reach them. Needs no MindSpore.
"""
import math
import os
from dataclasses import dataclass

import numpy as np

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint import dtypes
from pangu_ms.checkpoint.layout import LayoutTensor, sliced
from pangu_ms.checkpoint.shards import file_header, read_header
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks

COUNTERS = {"int64": "I64", "int32": "I32", "bool": "BOOL"}  # that an optimizer keeps besides
CODES = dtypes.CODES | COUNTERS
CARRIERS = dtypes.CARRIERS | {code: np.dtype(name) for name, code in COUNTERS.items()}


@dataclass(frozen=True)
class Share:
    """What one of `ranks` holds of arrays by name: of "NAME" or "kind.NAME" what it holds of the parameter NAME."""

    config: Config
    ranks: Ranks = Ranks()

    def parts(self, names) -> dict[str, LayoutTensor | None]:
        """Array name -> what the rank holds of it; None: every rank holds all of it."""
        known = parameters(self.config)
        found = {name: known.get(name) or known.get(name.partition(".")[2]) for name in names}
        return {name: p and sliced(p, self.ranks) for name, p in found.items()}

    def first(self, part: LayoutTensor | None) -> bool:
        """Whether the rank is the first of those that hold the same part."""
        over = {split.over for split in part.parameter.splits} if part else set()
        return all(self.ranks.index(dimension) == 0 for dimension in ("tensor", "expert", "data")
                   if dimension not in over)


def lay_out(path: str, arrays: dict[str, np.ndarray], share: Share) -> None:
    """Make a file with room for the whole of `arrays`, of which one rank's parts are given.

    Raises:
        OSError: the disk has no room.
    """
    sizes = []
    for name, part in share.parts(arrays).items():
        values = arrays[name]
        shape = part.parameter.shape if part else values.shape
        sizes.append((name, CODES[values.dtype.name], shape, math.prod(shape) * values.dtype.itemsize))
    with open(path, "wb") as file:
        file.write(file_header(sizes))
        file.flush()
        if end := sum(size for *_, size in sizes):
            # Asked for here: a full disk would end a process that writes to mapped memory without a word.
            os.posix_fallocate(file.fileno(), file.tell(), end)


def write_parts(path: str, arrays: dict[str, np.ndarray], share: Share) -> None:
    """Write what this rank holds of `arrays` into a file that was laid out; what several hold, the first writes."""
    data, whole = _mapped(path, "r+")
    for name, part in share.parts(arrays).items():
        if share.first(part):
            values = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape).view(whole[name].dtype)
            if part:
                part.write_into(whole[name], values)
            else:
                whole[name][...] = values
    data.flush()


def read_parts(path: str, share: Share) -> dict[str, np.ndarray]:
    """What this rank holds of the arrays of a file; bfloat16 as uint16 bit patterns.

    Raises:
        CheckpointError: the file is damaged, or an array has another shape than config.json gives its parameter.
        OSError: the file cannot be read.
    """
    _, whole = _mapped(path, "r")
    found = {}
    for name, part in share.parts(whole).items():
        if part and whole[name].shape != part.parameter.shape:
            raise CheckpointError(f"{path}: {name}: found {list(whole[name].shape)}, wanted "
                                  f"{list(part.parameter.shape)} by config.json; put the right file there")
        found[name] = part.part_of(whole[name]) if part else np.array(whole[name])
    return found


def _mapped(path: str, mode: str) -> tuple[np.memmap, dict[str, np.ndarray]]:
    """A whole file, and its arrays as views of it: what is written to them ends up there."""
    with open(path, "rb") as file:
        stored = read_header(file, CARRIERS)
    data = np.memmap(path, np.uint8, mode)
    return data, {name: data[each.offset:each.offset + each.nbytes].view(CARRIERS[each.dtype]).reshape(each.shape)
                  for name, each in stored.items()}
