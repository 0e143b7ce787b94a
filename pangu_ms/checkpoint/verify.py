"""Reading back what a conversion wrote and comparing it with its source, byte by byte."""

from collections.abc import Callable

import numpy as np

from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.checkpoint.plan import Plan
from pangu_ms.checkpoint.shards import Shards
from pangu_ms.checkpoint.source import Source
from pangu_ms.checkpoint.transfer import fill, steps
from pangu_ms.errors import CheckpointError


def verify(source: Source, plan: Plan, directory: str, progress: Callable[[int], None]) -> None:
    """`CheckpointError` names the first tensor of `directory` that is not what `plan` makes of `source`."""
    with Shards(directory) as written:
        expected = {output.stored.name: output for output in plan.outputs}
        if written.entries.keys() != expected.keys():
            difference = sorted(written.entries.keys() ^ expected.keys())
            raise CheckpointError(f"{directory}: {len(difference)} tensors missing or too many, first {difference[0]}")
        for name, output in expected.items():
            entry, stored = written.entries[name], output.stored
            if (entry.dtype, entry.shape) != (output.dtype, stored.shape):
                raise CheckpointError(f"{directory}: {name} is {entry.dtype} {list(entry.shape)}, wanted "
                                      f"{output.dtype} {list(stored.shape)}")
            for first, rows, band in steps(source.moves(stored, output.source), stored.columns, output.dtype):
                ours = np.empty((rows, stored.columns), CARRIERS[output.dtype])
                theirs = np.empty_like(ours)
                fill(band, first, ours, output.dtype)
                entry.read_into(first * stored.columns * ours.itemsize, memoryview(theirs).cast("B"))
                if ours.tobytes() != theirs.tobytes():
                    raise CheckpointError(f"{directory}: rows {first} to {first + rows - 1} of {name} differ from the "
                                          "source; the disk or the memory is at fault: remove it and convert again")
                progress(ours.nbytes)
