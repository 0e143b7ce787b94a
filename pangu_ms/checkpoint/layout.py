"""The tensors of each layout: the release's (one for each expert, MTP copies) and ours (stacked, whole or by rank).

A layout's tensor consists of slices. A slice is a rectangle of one of a parameter's matrices (see `tensors.Parameter`).
So going from any layout to any other means intersecting rectangles.
"""

import math
from dataclasses import dataclass

import numpy as np

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import Parameter, mtp_copies, parameters
from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows and columns of matrix `member` of a parameter; `at` is its first row in the tensor that holds the slice."""

    parameter: Parameter
    member: int
    row: int
    rows: int
    column: int
    columns: int
    at: int


@dataclass(frozen=True, slots=True)
class LayoutTensor:
    """A tensor as a layout has it. Its slices stand one below the other and all have the same columns.

    Attributes:
        dtype: a key of `dtypes.CARRIERS`. A layout does not decide it: who reads or writes the tensor sets it.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    dtype: str = "F32"

    @property
    def parameter(self) -> Parameter:
        """The parameter whose slices these are."""
        return self.slices[0].parameter

    @property
    def rows(self) -> int:
        return self.slices[-1].at + self.slices[-1].rows

    @property
    def columns(self) -> int:
        return self.slices[0].columns

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * CARRIERS[self.dtype].itemsize

    def part_of(self, whole: np.ndarray) -> np.ndarray:
        """What this tensor holds of the parameter's array `whole`."""
        return np.concatenate([_rectangle(whole, part) for part in self.slices]).reshape(self.shape)


def _rectangle(whole: np.ndarray, part: Slice) -> np.ndarray:
    """A slice of the parameter's array, as a view."""
    matrix = whole.reshape(part.parameter.members, part.parameter.rows, part.parameter.columns)[part.member]
    return matrix[part.row:part.row + part.rows, part.column:part.column + part.columns]


def released(config: Config, copies: bool = True) -> list[LayoutTensor]:
    """The Hugging Face layout. `copies`: with the MTP copies of embedding and head, at the end."""
    known = parameters(config)
    found = [LayoutTensor(source, p.member_shape, (Slice(p, member, 0, p.rows, 0, p.columns, 0),))
             for p in known.values() for member, source in enumerate(p.sources)]
    for copy, original in mtp_copies(config).items() if copies else ():
        p = known[original]
        found.append(LayoutTensor(copy, p.shape, (Slice(p, 0, 0, p.rows, 0, p.columns, 0),)))
    return found


def stacked(config: Config, ranks: Ranks = Ranks()) -> list[LayoutTensor]:
    """Our layout: the tensors that one rank stores; by default the whole model's."""
    return [sliced(p, ranks) for p in parameters(config).values()]


def sliced(p: Parameter, ranks: Ranks = Ranks()) -> LayoutTensor:
    """The tensor that one rank stores of a parameter; by default the whole parameter."""
    extent = {"members": [(0, p.members)], "rows": [(0, p.rows)], "columns": [(0, p.columns)]}
    for split in p.splits:
        size, index, first = ranks.size(split.over), ranks.index(split.over), 0
        if split.axis == "rows" and size > 1:
            extent["rows"] = [(0, rows) for rows in p.shared_rows]
        for i, (_, length) in enumerate(extent[split.axis]):
            extent[split.axis][i] = first + index * length // size, length // size
            first += length
    (first, members), = extent["members"]
    (column, columns), = extent["columns"]
    slices, at = [], 0
    for member in range(first, first + members):
        for row, rows in extent["rows"]:
            slices.append(Slice(p, member, row, rows, column, columns, at))
            at += rows
    return LayoutTensor(p.name, p.local_shape(ranks), tuple(slices))
