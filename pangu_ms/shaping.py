"""Indices and parts of tensors, by the operators that MindSpore compiles fastest.

Its own functions ask much of their arguments, in Python that is compiled anew in every graph: `ops.arange` takes a
tenth of a second each time, a slice in brackets a fiftieth. These take a few thousandths.
"""
import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr


def arange(count):
    """int32 [count]: 0, 1, 2, ..., count - 1."""
    return ops.cast(ops.range(0, count, 1), ms.int32)


def part(x, axis, start, end):
    """Entries `start` to `end` - 1 along an axis, end None: to the last. Numbers that the graph knows."""
    return _slice(x.ndim, axis, end)(x, _at(x.ndim, axis, start), _at(x.ndim, axis, end), _at(x.ndim, axis, 1))


@constexpr
def _slice(axes, axis, end):
    """All of every other axis."""
    here, every = 1 << axis % axes, (1 << axes) - 1
    return ops.StridedSlice(every - here, every if end is None else every - here)


@constexpr
def _at(axes, axis, value):
    return tuple((value or 0) if i == axis % axes else 1 for i in range(axes))
