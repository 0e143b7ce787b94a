"""Indices and parts of tensors, by the operators that MindSpore compiles fastest.

Its own functions ask much of their arguments, in Python that is compiled anew in every graph: `ops.arange` takes a tenth
of a second each time, a slice in brackets a fiftieth. These take a thousandth.
"""
import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr


def arange(count):
    """int32 [count]: 0, 1, 2, ..., count - 1."""
    return ops.cast(ops.range(0, count, 1), ms.int32)


def part(x, axis, start, size):
    """The `size` entries from `start` on along an axis, -1: all from there. Numbers that the graph knows."""
    return ops.slice(x, _one(x.ndim, axis, start, 0), _one(x.ndim, axis, size, -1))


@constexpr
def _one(axes, axis, value, others):
    return tuple(value if i == axis % axes else others for i in range(axes))
