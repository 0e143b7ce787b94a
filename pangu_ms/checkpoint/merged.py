"""A checkpoint read with an adapter merged into it: W + alpha / rank * B A, in float32 and rounded once."""
import dataclasses
import os

import numpy as np

from pangu_ms.architectures.fields import Config
from pangu_ms.checkpoint.adapter import AdapterFiles
from pangu_ms.checkpoint.copying import Copy
from pangu_ms.checkpoint.directory import checkpoint_directory, read_config
from pangu_ms.checkpoint.dtypes import from_float32
from pangu_ms.checkpoint.layout import LayoutTensor
from pangu_ms.checkpoint.source import Source
from pangu_ms.parallel.ranks import Ranks


def open_merged(directory: str | os.PathLike, adapter: str | os.PathLike) -> "Merged":
    """As `open_source`, with an adapter."""
    directory = checkpoint_directory(directory)
    return Merged(directory, read_config(directory), adapter)


class Merged(Source):
    """A `Source` whose values are those of the model with its adapter.

    Attributes:
        adapter: the `AdapterFiles`.
    """

    def __init__(self, directory: str | os.PathLike, config: Config, adapter: str | os.PathLike,
                 reader: Ranks | None = None):
        super().__init__(directory, config, reader)
        try:
            self.adapter = AdapterFiles(adapter, config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self.adapter:
            self.adapter.close()

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        stat = os.fstat(self.adapter.file.fileno())
        return [*super().identity, (os.path.abspath(self.adapter.file.name), stat.st_size, stat.st_mtime_ns)]

    def fill(self, tensor: LayoutTensor, copies: list[Copy], first: int, out: np.ndarray) -> int:
        parts = [part for part in tensor.slices if part.at < first + len(out) and first < part.at + part.rows
                 and (part.parameter.name, part.member) in self.adapter.pairs]
        if not parts:
            return super().fill(tensor, copies, first, out)
        values = np.empty(out.shape, np.float32)
        super().fill(dataclasses.replace(tensor, dtype="F32"), copies, first, values)
        for part in parts:
            start, end = max(first, part.at), min(first + len(out), part.at + part.rows)
            down, up = self.adapter.pair(part.parameter, part.member)
            row = part.row + start - part.at
            values[start - first:end - first] += self.adapter.scale * (
                up[row:row + end - start] @ down[:, part.column:part.column + part.columns])
        out[...], overflows = from_float32(values, tensor.dtype)
        return overflows
