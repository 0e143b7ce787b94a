"""Filling a model: every parameter from a checkpoint directory of any layout, one at a time."""

import os
from collections.abc import Collection, Iterator

import numpy as np

from pangu_ms.checkpoint.dtypes import CARRIERS, CODES
from pangu_ms.checkpoint.layout import Grid, Stored, stacked
from pangu_ms.checkpoint.manifest import rank_directories
from pangu_ms.checkpoint.names import FLOAT32
from pangu_ms.checkpoint.source import Source
from pangu_ms.checkpoint.transfer import fill, steps
from pangu_ms.config import PanguConfig
from pangu_ms.errors import CheckpointError


class ParameterReader:
    """The parameters of a checkpoint, checked, in the order of `names.parameters`.

    `len()` is their number and `nbytes` their size once read. Iterating yields (name, array) and keeps no array, so
    that the peak is what the consumer keeps and one tensor. May be iterated more than once, until `close`.
    """

    def __init__(self, directory: str | os.PathLike, config: PanguConfig, dtype: str, exact: Collection[str],
                 grid: Grid, rank: int):
        if dtype not in CODES:
            raise CheckpointError(f"dtype: found {dtype!r}, wanted one of {', '.join(CODES)}")
        self._tensors = stacked(config, grid, rank)
        self._dtype, self._exact = CODES[dtype], exact
        self._source = Source(directory, config, (grid, rank))
        try:
            if rank == 0:  # one rank reads them for all
                self._source.check_repeats()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(stored.rows * stored.columns * CARRIERS[self._code(stored)].itemsize for stored in self._tensors)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for stored in self._tensors:
            yield stored.name, self._read(stored)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "ParameterReader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _code(self, stored: Stored) -> str:
        return "F32" if stored.parameter.note == FLOAT32 or stored.name in self._exact else self._dtype

    def _read(self, stored: Stored) -> np.ndarray:
        code, moves = self._code(stored), self._source.moves(stored)
        values = np.empty((stored.rows, stored.columns), CARRIERS[code])
        overflows = sum(fill(band, first, values[first:first + rows], code)
                        for first, rows, band in steps(moves, stored.columns, code))
        if overflows:
            raise CheckpointError(f"{self._source.directory}: {overflows} values of {stored.name} are too large for "
                                  "float16; read it as bfloat16 or float32")
        return values.reshape(stored.shape)


def read_parameters(directory: str | os.PathLike, config: PanguConfig, dtype: str = "float32",
                    exact: Collection[str] = (), grid: Grid = Grid(), rank: int = 0) -> ParameterReader:
    """All parameters under our names (`names.parameters`), whatever the layout of `directory`; of a grid, one rank's.

    `dtype`: float32, float16 or bfloat16 (as uint16 bit patterns); float32 always for the names in `exact` and for the
    router's correction biases. An Int8 release is dequantised. Checks first, reads afterwards: `CheckpointError` lists
    every missing, unexpected and wrongly shaped tensor, and MTP copies that differ from what they repeat.
    """
    return ParameterReader(directory, config, dtype, exact, grid, rank)


def read_config(directory: str | os.PathLike) -> PanguConfig:
    """The config of a checkpoint directory of any layout."""
    return PanguConfig.from_pretrained(document_directory(directory))


def document_directory(directory: str | os.PathLike) -> str:
    """Where config.json and the tokenizer of a checkpoint lie: a sliced one has them in each rank."""
    ranks = rank_directories(os.fspath(directory)) if os.path.isdir(directory) else []
    return ranks[0] if ranks else os.fspath(directory)
