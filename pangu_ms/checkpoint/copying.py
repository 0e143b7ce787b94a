"""Copying rectangles of stored tensors into memory, casting and dequantising on the way, a block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pangu_ms.checkpoint.dtypes import CARRIERS, cast, from_float32, to_float32
from pangu_ms.checkpoint.layout import LayoutTensor
from pangu_ms.checkpoint.shards import StoredTensor

BLOCK = 1 << 20  # bytes copied at a time: they fit a core's cache, so that a checksum costs little


@dataclass(frozen=True, slots=True)
class Copy:
    """A rectangle of a stored tensor, and its place in a tensor to be made.

    Both tensors count as matrices. The stored one has `width` columns.
    """

    stored: StoredTensor
    width: int
    from_row: int
    from_column: int
    to_row: int
    to_column: int
    rows: int
    columns: int


def steps(copies: list[Copy], tensor: LayoutTensor) -> Iterator[tuple[int, int, list[Copy]]]:
    """The rows of a tensor in order, about `BLOCK` bytes at a time: (first row, rows, the copies that make them)."""
    step = max(1, BLOCK // (tensor.columns * CARRIERS[tensor.dtype].itemsize))
    for (start, rows), band in groupby(sorted(copies, key=_band), key=_band):
        band = list(band)
        for first in range(start, start + rows, step):
            yield first, min(step, start + rows - first), band


def fill(copies: list[Copy], first: int, out: np.ndarray, dtype: str) -> int:
    """Fill `out` [rows, columns] with the rows from `first` on of the tensor that `copies` make.

    `out` is contiguous and in the carrier of `dtype`. Returns how many finite values became infinite.
    """
    overflows = 0
    for copy in copies:
        start, end = max(first, copy.to_row), min(first + len(out), copy.to_row + copy.rows)
        if start >= end:
            continue
        stored, row, rows = copy.stored, copy.from_row + start - copy.to_row, end - start
        target = out[start - first:end - first]
        if stored.dtype == dtype and copy.columns == copy.width == out.shape[1]:
            stored.read_into(row * copy.width * out.itemsize, memoryview(target).cast("B"))
            continue
        values = _read_rows(stored, row, rows, copy.width)[:, copy.from_column:copy.from_column + copy.columns]
        if stored.scale:
            factors = to_float32(_read_rows(stored.scale, row, rows, 1), stored.scale.dtype)
            values, lost = from_float32(to_float32(values, "I8") * factors, dtype)
        else:
            values, lost = cast(values, stored.dtype, dtype)
        target[:, copy.to_column:copy.to_column + copy.columns] = values
        overflows += lost
    return overflows


def _band(copy: Copy) -> tuple[int, int]:
    return copy.to_row, copy.rows


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one size hold the same bytes."""
    left, right = bytearray(BLOCK), bytearray(BLOCK)
    for start in range(0, one.nbytes, BLOCK):
        size = min(BLOCK, one.nbytes - start)
        one.read_into(start, memoryview(left)[:size])
        other.read_into(start, memoryview(right)[:size])
        if left[:size] != right[:size]:  # bytearrays are compared at once, memoryviews item by item
            return False
    return True


def _read_rows(stored: StoredTensor, first: int, rows: int, columns: int) -> np.ndarray:
    values = np.empty((rows, columns), CARRIERS[stored.dtype])
    stored.read_into(first * columns * values.itemsize, memoryview(values).cast("B"))
    return values
