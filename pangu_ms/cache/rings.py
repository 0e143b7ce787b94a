"""What a compiled step does to the tensors of the cache: where rows lie, reading and writing them in place.

The row of position p lies at slot p mod R of a ring of R rows. A growing tensor is a ring that has room for all: there
it is slot p, and a row before the text, which means nothing, lies at the end and not among those of another sequence.
"""
from mindspore import ops

from pangu_ms.device import replaceable
from pangu_ms.shaping import arange, part


def ring_slots(position, size, decode, count=None):
    """Where `ring_update` reads and writes, for new rows at position int32 [B, T] and rings of `size` rows.

    Args:
        decode: few new rows, at most `size`: they alone are written. Otherwise all rows of the ring are.
        count: int32 [1], how many of the new rows are real, the others padding; None: all.

    Returns:
        "read": slots int32 [B, size] of the rows before the new ones, oldest first; nothing real lies before position
        0. "write": slots of the new rows [B, T], or of the last `size` rows, new or old [B, size]. And the arguments.
    """
    span, first = arange(size), part(position, 1, 0, 1)
    if decode:
        written = position
    else:
        last = first + (position.shape[1] if count is None else count) - 1
        written = last - size + 1 + span
    return {"read": in_ring(first - size + span, size), "write": in_ring(written, size), "decode": decode,
            "count": count}


def in_ring(position, size):
    """Slots of positions int32 [B, ...] of each sequence in rings [B * size, D]."""
    return position % size + ops.expand_dims(arange(position.shape[0]) * size, 1)


@replaceable
def ring_update(ring, new, slots):
    """Read the rows before `new` [B, T, D] from a ring, then let the ring hold the last rows. -> past [B, R, D]."""
    past, count = ops.gather(ring, slots["read"], 0), slots["count"]
    if slots["decode"]:
        rows = new
    elif count is None:
        rows = ops.cat((past, new), 1)[:, -past.shape[1]:]
    else:
        rows = ops.gather(ops.cat((past, new), 1), count + arange(past.shape[1]), 1)
    return ops.depend(past, ops.scatter_update(ring, slots["write"], rows))     # a write nobody uses is dropped


def append(tensor, new, slots):
    """Write `new` [B, T, D] into a growing tensor. -> the tensor with the rows in it [B * capacity, D]."""
    return ops.scatter_update(tensor, slots, new)
