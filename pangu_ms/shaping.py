"""Indices and parts of tensors, by the operators that MindSpore compiles fastest.

Its own functions ask much of their arguments, in Python that every call compiles anew: `ops.arange` takes a tenth of a
second of a graph's compilation each time, `ops.split` into given sizes nearly as long, a slice a hundredth.
"""
import mindspore as ms
from mindspore import ops


def arange(count):
    """int32 [count]: 0, 1, 2, ..., count - 1."""
    return ops.cast(ops.range(0, count, 1), ms.int32)
