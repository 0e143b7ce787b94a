"""The arrays of a training checkpoint: safetensors files that hold them whole, whichever ranks share the model.

Each rank writes its part of every array in its place, and reads its part under any other layout. So the files lie where
all ranks reach them. Needs no MindSpore.
"""
import json
import math
import os
import struct
from dataclasses import dataclass

import numpy as np

from pangu_ms.checkpoint import dtypes
from pangu_ms.checkpoint.layout import Grid, Stored, cut, sliced
from pangu_ms.checkpoint.names import parameters
from pangu_ms.checkpoint.shards import file_header
from pangu_ms.config import PanguConfig

COUNTERS = {"int64": "I64", "int32": "I32", "bool": "BOOL"}  # that an optimizer keeps besides
CODES = dtypes.CODES | COUNTERS
CARRIERS = dtypes.CARRIERS | {code: np.dtype(name) for name, code in COUNTERS.items()}


@dataclass(frozen=True)
class Share:
    """What rank `rank` of those of `grid` holds: of an array "kind.NAME" what it holds of the parameter NAME."""

    config: PanguConfig
    grid: Grid = Grid()
    rank: int = 0

    def parts(self, names):
        """Array name -> what is held of it; None: all, by every rank."""
        known = parameters(self.config)
        found = {name: known.get(name) or known.get(name.partition(".")[2]) for name in names}
        return {name: p and sliced(p, self.grid, self.rank) for name, p in found.items()}

    def first(self, stored: Stored | None) -> bool:
        """Whether this is the first of the ranks that hold the same part."""
        over = {split.over for split in stored.parameter.splits} if stored else set()
        return all(index == 0 for dimension, (index, _) in self.grid.place(self.rank).items() if dimension not in over)


def lay_out(path: str, arrays: dict[str, np.ndarray], share: Share) -> None:
    """A file with room for the whole of `arrays`, of which one rank's are given; OSError when the disk has none."""
    sizes = []
    for name, stored in share.parts(arrays).items():
        values = arrays[name]
        shape = stored.parameter.shape if stored else values.shape
        sizes.append((name, CODES[values.dtype.name], shape, math.prod(shape) * values.dtype.itemsize))
    with open(path, "wb") as file:
        file.write(file_header(sizes))
        file.flush()
        if end := sum(size for *_, size in sizes):
            # Asked for here: a full disk would end a process that writes to mapped memory without a word.
            os.posix_fallocate(file.fileno(), file.tell(), end)


def write_parts(path: str, arrays: dict[str, np.ndarray], share: Share) -> None:
    """Write what this rank holds of `arrays` into a file that was laid out."""
    data, whole = _mapped(path, "r+")
    for name, stored in share.parts(arrays).items():
        if share.first(stored):
            place = cut(whole[name], stored) if stored else whole[name]
            place[...] = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape).view(place.dtype)
    data.flush()


def read_parts(path: str, share: Share) -> dict[str, np.ndarray]:
    """What this rank holds of the arrays of a file; bfloat16 as uint16 bit patterns."""
    _, whole = _mapped(path, "r")
    return {name: np.array(cut(whole[name], stored) if stored else whole[name])
            for name, stored in share.parts(whole).items()}


def _mapped(path, mode):
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__")
    data = np.memmap(path, np.uint8, mode, 8 + size)
    return data, {name: data[slice(*entry["data_offsets"])].view(CARRIERS[entry["dtype"]]).reshape(entry["shape"])
                  for name, entry in header.items()}
