"""Reading back what a conversion wrote and comparing it with its source, byte by byte."""

from collections.abc import Callable

from pangu_ms.checkpoint.plan import Plan
from pangu_ms.checkpoint.shards import Shards
from pangu_ms.checkpoint.source import Source
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
            start = 0
            for ours, _ in source.blocks(stored, output.dtype, output.source):
                theirs = bytearray(ours.nbytes)
                entry.read_into(start, memoryview(theirs))
                if ours.tobytes() != theirs:
                    raise CheckpointError(f"{directory}: {name} differs from the source near its byte {start}; "
                                          "the disk or the memory is at fault: remove it and convert again")
                start += ours.nbytes
                progress(ours.nbytes)
