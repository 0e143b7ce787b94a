"""Reading the parameters of a model from a checkpoint of any layout, one at a time."""

import dataclasses
import os
from collections.abc import Collection, Iterator

import numpy as np

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import FLOAT32
from pangu_ms.checkpoint.copying import steps
from pangu_ms.checkpoint.dtypes import CARRIERS, CODES
from pangu_ms.checkpoint.layout import LayoutTensor, stacked
from pangu_ms.checkpoint.merged import Merged
from pangu_ms.checkpoint.source import Source
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks


class ParameterReader:
    """The parameters of a checked checkpoint, in the order of `tensors.parameters`.

    Iterating yields (name, array), as often as wanted until `close`. The reader keeps no array: the peak of memory is
    what the caller keeps, and one tensor. `len()` is the number of parameters.
    """

    def __init__(self, directory: str | os.PathLike, config: Config, dtype: str, exact: Collection[str],
                 ranks: Ranks, adapter: str | os.PathLike | None):
        if dtype not in CODES:
            raise CheckpointError(f"dtype: found {dtype!r}, wanted one of {', '.join(CODES)}")
        self._tensors = [
            dataclasses.replace(tensor, dtype="F32" if tensor.parameter.note == FLOAT32 or tensor.name in exact
                                else CODES[dtype]) for tensor in stacked(config, ranks)]
        self._source = Merged(directory, config, adapter, ranks) if adapter else Source(directory, config, ranks)
        try:
            if ranks.rank == 0:  # one rank reads them for all
                self._source.check_repeats()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for tensor in self._tensors:
            yield tensor.name, self._read(tensor)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "ParameterReader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _read(self, tensor: LayoutTensor) -> np.ndarray:
        values = np.empty((tensor.rows, tensor.columns), CARRIERS[tensor.dtype])
        overflows = sum(self._source.fill(tensor, band, first, values[first:first + rows])
                        for first, rows, band in steps(self._source.copies(tensor), tensor))
        if overflows:
            raise CheckpointError(f"{self._source.directory}: {overflows} values of {tensor.name} are too large for "
                                  "float16; read it as bfloat16 or float32")
        return values.reshape(tensor.shape)


def read_parameters(directory: str | os.PathLike, config: Config, dtype: str = "float32",
                    exact: Collection[str] = (), ranks: Ranks = Ranks(),
                    adapter: str | os.PathLike | None = None) -> ParameterReader:
    """The parameters of a checkpoint of any layout under our names (`tensors.parameters`), or one rank's part of them.

    All checks come first; reading starts when the result is iterated. An Int8 release is dequantised.

    Args:
        directory: a checkpoint, or a training run: its newest one.
        dtype: "float32", "float16" or "bfloat16", which comes as uint16 bit patterns.
        exact: names of parameters that are float32 whatever `dtype` says. Those that the architecture's table marks
            FLOAT32 always are.
        ranks: the rank whose part is read. Rank 0 compares what is stored more than once, for all.
        adapter: a directory with an adapter, which is merged in.

    Raises:
        CheckpointError: a file is damaged; tensors are missing, unexpected or wrongly shaped, all of which are listed;
            the adapter belongs to another model; a repeated tensor differs; or, while iterating, a value is too large
            for float16.
    """
    return ParameterReader(directory, config, dtype, exact, ranks, adapter)
