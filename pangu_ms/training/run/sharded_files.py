"""The arrays of a training checkpoint: safetensors files that hold them whole, whichever ranks share the model.

Each rank writes its part of every array in its place, and reads its part whatever ranks wrote it. So the files lie
where all ranks reach them. A rank writes its own bytes and no others: what is mapped into memory is written in pages,
and on a network disk two ranks' pages would overwrite each other. Needs no MindSpore.
"""
import math
import os
from collections.abc import Iterator
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
    """Make a file as long as the whole of `arrays`, of which one rank's parts are given. It holds only the header.

    Raises:
        OSError: the disk does not take it.
    """
    sizes = []
    for name, part in share.parts(arrays).items():
        values = arrays[name]
        shape = part.parameter.shape if part else values.shape
        sizes.append((name, CODES[values.dtype.name], shape, math.prod(shape) * values.dtype.itemsize))
    with open(path, "wb") as file:
        file.write(file_header(sizes))
        file.truncate(file.tell() + sum(size for *_, size in sizes))


def write_parts(path: str, arrays: dict[str, np.ndarray], share: Share) -> None:
    """Write what this rank holds of `arrays` into a file that was laid out, and have it on the disk.

    What several ranks hold, the first of them writes.

    Raises:
        OSError: the disk is full or does not take it.
    """
    with open(path, "r+b", buffering=0) as file:
        stored = read_header(file, CARRIERS)
        for name, part in share.parts(arrays).items():
            if share.first(part):
                for start, data in _runs(part, np.ascontiguousarray(arrays[name])):
                    _write(file.fileno(), data, stored[name].offset + start)
        os.fsync(file.fileno())                                                 # of its own writes a machine knows


def _runs(part: LayoutTensor | None, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The bytes of contiguous `values` in runs that lie together in the whole array, each with where it begins there.

    Of whole rows a slice is one run; of a part of their columns each row is one.
    """
    if part is None:
        yield 0, values.reshape(-1).view(np.uint8)
        return
    p, size = part.parameter, values.dtype.itemsize
    rows = values.reshape(part.rows, part.columns).view(np.uint8)
    for piece in part.slices:
        start = ((piece.member * p.rows + piece.row) * p.columns + piece.column) * size
        own = rows[piece.at:piece.at + piece.rows]
        if piece.columns == p.columns:
            yield start, own.reshape(-1)
        else:
            yield from zip(range(start, start + piece.rows * p.columns * size, p.columns * size), own)


def _write(descriptor: int, data: np.ndarray, start: int) -> None:
    """Write all bytes of `data` from the byte `start` of a file on: a disk may take less than it is given at once."""
    while (count := os.pwrite(descriptor, data, start)) < len(data):
        data, start = data[count:], start + count


def read_parts(path: str, share: Share) -> dict[str, np.ndarray]:
    """What this rank holds of the arrays of a file; bfloat16 as uint16 bit patterns.

    Raises:
        CheckpointError: the file is damaged, or an array has another shape than config.json gives its parameter.
        OSError: the file cannot be read.
    """
    whole, found = _mapped(path), {}
    for name, part in share.parts(whole).items():
        if part and whole[name].shape != part.parameter.shape:
            raise CheckpointError(f"{path}: {name}: found {list(whole[name].shape)}, wanted "
                                  f"{list(part.parameter.shape)} by config.json; put the right file there")
        found[name] = part.part_of(whole[name]) if part else np.array(whole[name])
    return found


def _mapped(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file, as views of what is read of it when it is looked at."""
    with open(path, "rb") as file:
        stored = read_header(file, CARRIERS)
    data = np.memmap(path, np.uint8, "r")
    return {name: data[each.offset:each.offset + each.nbytes].view(CARRIERS[each.dtype]).reshape(each.shape)
            for name, each in stored.items()}
