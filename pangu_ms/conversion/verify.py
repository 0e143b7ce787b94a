"""Read back what a conversion wrote and compare it with its source byte by byte."""

from collections.abc import Callable

from pangu_ms.checkpoint.shards import Shards
from pangu_ms.checkpoint.source import Source
from pangu_ms.conversion.plan import Plan
from pangu_ms.errors import CheckpointError


def verify(source: Source, plan: Plan, directory: str, progress: Callable[[int], None]) -> None:
    """Compare every tensor of `directory` with what `plan` makes of `source`.

    Args:
        progress: called with the number of bytes that were compared since the last call.

    Raises:
        CheckpointError: names the first tensor that is missing, too many, or differs.
    """
    with Shards(directory) as written:
        expected = {tensor.name: tensor for tensor in plan.tensors}
        if written.tensors.keys() != expected.keys():
            difference = sorted(written.tensors.keys() ^ expected.keys())
            raise CheckpointError(f"{directory}: {len(difference)} tensors missing or too many, first {difference[0]}")
        for name, tensor in expected.items():
            stored = written.tensors[name]
            if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(f"{directory}: {name} is {stored.dtype} {list(stored.shape)}, wanted "
                                      f"{tensor.dtype} {list(tensor.shape)}")
            start = 0
            for ours, _ in source.blocks(tensor):
                theirs = bytearray(ours.nbytes)
                stored.read_into(start, memoryview(theirs))
                if ours.tobytes() != theirs:
                    raise CheckpointError(f"{directory}: {name} differs from the source near its byte {start}; "
                                          "the disk or the memory is at fault: remove it and convert again")
                start += ours.nbytes
                progress(ours.nbytes)
