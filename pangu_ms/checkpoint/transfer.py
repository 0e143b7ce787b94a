"""Moving rectangles of stored tensors into memory, casting and dequantising on the way, a block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pangu_ms.checkpoint.dtypes import CARRIERS, cast, from_float32, to_float32
from pangu_ms.checkpoint.layout import Part
from pangu_ms.checkpoint.shards import Entry

BLOCK = 1 << 20  # bytes moved at a time: they stay within a core's cache, so that a checksum costs little


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a parameter where it lies: its rows begin at row `part.at` of the entry's matrix."""

    part: Part
    entry: Entry
    scale: Entry | None  # of an int8 entry: one factor per row


@dataclass(frozen=True, slots=True)
class Move:
    """A rectangle to take from a stored tensor, and its place in a tensor to be made."""

    held: Held
    from_row: int
    from_column: int
    to_row: int
    to_column: int
    rows: int
    columns: int


def steps(moves: list[Move], columns: int, dtype: str) -> Iterator[tuple[int, int, list[Move]]]:
    """The rows of a tensor in order, in runs of about `BLOCK` bytes: (first row, rows, the moves that make them)."""
    step = max(1, BLOCK // (columns * CARRIERS[dtype].itemsize))
    for (start, rows), band in groupby(sorted(moves, key=_band), key=_band):
        band = list(band)
        for first in range(start, start + rows, step):
            yield first, min(step, start + rows - first), band


def fill(moves: list[Move], first: int, out: np.ndarray, dtype: str) -> int:
    """Write rows `first` to `first + len(out)` of the tensor that `moves` make into `out` [rows, columns].

    `out` is contiguous and in the carrier of `dtype`. Returns how many finite values became infinite.
    """
    overflows = 0
    for move in moves:
        start, end = max(first, move.to_row), min(first + len(out), move.to_row + move.rows)
        if start >= end:
            continue
        entry, width = move.held.entry, move.held.part.columns
        row, rows, target = move.from_row + start - move.to_row, end - start, out[start - first:end - first]
        if entry.dtype == dtype and move.columns == width == out.shape[1]:
            entry.read_into(row * width * out.itemsize, memoryview(target).cast("B"))
            continue
        values = _read_rows(entry, row, rows, width)[:, move.from_column:move.from_column + move.columns]
        if move.held.scale:
            factors = to_float32(_read_rows(move.held.scale, row, rows, 1), move.held.scale.dtype)
            values, lost = from_float32(to_float32(values, "I8") * factors, dtype)
        else:
            values, lost = cast(values, entry.dtype, dtype)
        target[:, move.to_column:move.to_column + move.columns] = values
        overflows += lost
    return overflows


def _band(move: Move) -> tuple[int, int]:
    return move.to_row, move.rows


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two entries of one size hold the same bytes."""
    left, right = bytearray(BLOCK), bytearray(BLOCK)
    for start in range(0, one.nbytes, BLOCK):
        size = min(BLOCK, one.nbytes - start)
        one.read_into(start, memoryview(left)[:size])
        other.read_into(start, memoryview(right)[:size])
        if left[:size] != right[:size]:  # bytearrays compare as memory does, memoryviews item by item
            return False
    return True


def _read_rows(entry: Entry, first: int, rows: int, columns: int) -> np.ndarray:
    values = np.empty((rows, columns), CARRIERS[entry.dtype])
    entry.read_into(first * columns * values.itemsize, memoryview(values).cast("B"))
    return values
