"""Indices and parts of tensors, by the operators that MindSpore compiles fastest.

Its own functions ask much of their arguments, in Python that is compiled anew in every graph: `ops.arange` takes a
tenth of a second each time, a slice in brackets a fiftieth. These take a few thousandths.
"""
import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr

# Behind every entry. The masks that say the same are not heard by the gradient on a CPU.
LAST = 2**31 - 1


def arange(count):
    """int32 [count]: 0, 1, 2, ..., count - 1."""
    return ops.cast(ops.range(0, count, 1), ms.int32)


def part(x, axis, start, end):
    """Entries `start` to `end` - 1 along an axis, of all other axes all. Numbers that the graph knows."""
    return ops.StridedSlice()(x, _at(x.ndim, axis, start, 0), _at(x.ndim, axis, end, LAST), _at(x.ndim, axis, 1, 1))


@constexpr
def _at(axes, axis, value, others):
    return tuple(value if i == axis % axes else others for i in range(axes))
