"""What each layout stores: the release's (one tensor per expert, MTP copies) and ours (stacked, whole or per rank).

A stored tensor is described by the parts of a parameter it holds. A part is a rectangle of one of the parameter's
matrices (see `names.Parameter`), so that moving between any two layouts is intersecting rectangles.
"""

from dataclasses import dataclass

import numpy as np

from pangu_ms.checkpoint.names import Parameter, mtp_copies, parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns of matrix `member` of a parameter; `at` is their first row in the stored tensor."""

    member: int
    row: int
    rows: int
    column: int
    columns: int
    at: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a layout stores it. Its parts, one below the other, are its rows; all have the same columns."""

    name: str
    shape: tuple[int, ...]
    parameter: Parameter
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return self.parts[-1].at + self.parts[-1].rows

    @property
    def columns(self) -> int:
        return self.parts[0].columns


@dataclass(frozen=True)
class Grid:
    """The ranks that share a model: rank = expert rank * tensor + tensor rank."""

    tensor: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.expert

    def place(self, rank: int) -> dict[str, tuple[int, int]]:
        """Parallel dimension -> (this rank's index in it, its size)."""
        return {"tensor": (rank % self.tensor, self.tensor), "expert": (rank // self.tensor, self.expert)}


def cut(whole: np.ndarray, stored: Stored) -> np.ndarray:
    """What a rank stores of a parameter's array: a view of it."""
    first, last = stored.parts[0], stored.parts[-1]
    rows, columns = slice(first.row, first.row + first.rows), slice(first.column, first.column + first.columns)
    members = (slice(first.member, last.member + 1),) if stored.parameter.stacked else ()
    return whole[members + ((rows, columns) if len(stored.parameter.member_shape) == 2 else (rows,))]


def released(config: PanguConfig, copies: bool = True) -> list[Stored]:
    """The Hugging Face layout, at the end the MTP copies of embedding and head if they are wanted."""
    found, known = [], parameters(config)
    for p in known.values():
        found += [Stored(source, p.member_shape, p, (Part(member, 0, p.rows, 0, p.columns, 0),))
                  for member, source in enumerate(p.sources)]
    for copy, original in mtp_copies(config).items() if copies else ():
        p = known[original]
        found.append(Stored(copy, p.shape, p, (Part(0, 0, p.rows, 0, p.columns, 0),)))
    return found


def stacked(config: PanguConfig, grid: Grid = Grid(), rank: int = 0) -> list[Stored]:
    """Our layout: the tensors of one rank; of the whole model for the default grid."""
    return [sliced(p, grid, rank) for p in parameters(config).values()]


def check_grid(config: PanguConfig, grid: Grid) -> None:
    """`CheckpointError` when the grid would cut through a head, an expert or a row, naming each."""
    sizes = {"tensor": grid.tensor, "expert": grid.expert}
    problems = dict.fromkeys(
        f"--{s.over}-parallel {sizes[s.over]} does not divide the {s.units} {s.unit} of "
        f"{p.name if p.plan is None else p.name.split('.', 3)[3]}"
        for p in parameters(config).values() for s in p.splits if s.units % sizes[s.over])
    if problems:
        raise CheckpointError("the model cannot be cut that way:\n  " + "\n  ".join(problems))


def sliced(p: Parameter, grid: Grid = Grid(), rank: int = 0) -> Stored:
    """What one rank stores of a parameter; all of it for the default grid."""
    extent = {"members": (0, p.members), "rows": (0, p.rows), "columns": (0, p.columns)}
    for split in p.splits:
        index, size = grid.place(rank)[split.over]
        length = extent[split.axis][1] // size
        extent[split.axis] = (index * length, length)
    (first, members), (row, rows), (column, columns) = extent.values()
    parts = tuple(Part(first + i, row, rows, column, columns, i * rows) for i in range(members))
    # Only matrices are cut by columns, so every other shape keeps all but its first axis.
    inner = (rows, columns) if len(p.member_shape) == 2 else (rows, *p.member_shape[1:])
    return Stored(p.name, (members, *inner) if p.stacked else inner, p, parts)
