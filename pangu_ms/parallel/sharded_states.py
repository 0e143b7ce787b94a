"""ZeRO-1: optimizer states sharded over ranks that hold the same parameters (arXiv:1910.02054).

Each rank keeps the states of its shard, float32 master copies included, and updates that shard; then all gather the
shards. As their gradients are equal, the result is that of states that are not sharded. All ranks have the same graph
but for the number at which their shard begins: where graphs differ, MindSpore may start collectives in different
orders.
"""
import functools
import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.parallel import collectives


class ShardedStates(nn.Cell):
    """An update of parameters of one dtype, seen as rows one behind the other, of which each rank has equally many.

    A row is whatever is updated by itself: a matrix, or a number. What is missing for equal shards is zero, and stays
    so.

    Args:
        params: of all ranks.
        row: the shape of a row.
        make: from a list of one float32 parameter [rows, *row] to the cell that updates it.
        ranks, dimension: the ranks that hold `params` alike.
    """

    def __init__(self, params, row, make, ranks, dimension):
        super().__init__(auto_prefix=False)
        count = ranks.size(dimension)
        self.params, self.row, self.exact = ms.ParameterTuple(params), row, params[0].dtype == ms.float32
        self.sizes = tuple(parameter.size // math.prod(row) for parameter in params)             # in rows
        self.starts = tuple(sum(self.sizes[:i]) for i in range(len(params)))
        self.count = -(-sum(self.sizes) // count)                               # of one rank
        self.first, self.length = ranks.index(dimension) * self.count, count * self.count
        # Under a name that all ranks have.
        part = ms.Parameter(ops.zeros((self.count, *row), ms.float32), f"part.{params[0].name}", requires_grad=False)
        self.update = make([part])
        self.states = {parameter.name.partition(".")[0]: parameter for parameter in self.update.get_parameters()}
        self.all_gather = collectives.all_gather(ranks, dimension)
        self.all_gather_array = functools.partial(collectives.all_gather_array, ranks, dimension)
        self.each = ops.Map()
        self.set_states({})

    def construct(self, gradients, rate, powers):
        rows = filled(ops.cat(self.each(ops.partial(_rows, (-1,) + self.row), gradients)), self.length)
        begin = (self.first,) + (0,) * len(self.row)
        own = ops.cast(ops.slice(rows, begin, (self.count,) + self.row), ms.float32)
        own = self.update((own,), rate, powers)[0]
        rows = self.all_gather(ops.cast(own, self.params[0].dtype))
        return self.each(ops.partial(_take, rows), self.params, self.starts, self.sizes)

    def kinds(self):
        """Of states: those that parameters have by themselves are not among them."""
        return [kind for kind in self.states if kind != "part"] + ["master"] * (not self.exact)

    def gathered(self):
        """By name, KIND.NAME as states that are not sharded are called: float32 arrays; on all ranks at once."""
        found = {}
        for kind in self.kinds():
            rows = self.all_gather_array(self.states["part" if kind == "master" else kind].asnumpy())
            found |= {f"{kind}.{parameter.name}": rows[start:start + size].reshape(parameter.shape)
                      for parameter, start, size in zip(self.params, self.starts, self.sizes)}
        return found

    def set_states(self, arrays):
        """What `gathered` gave; without arrays the parameters' values as masters, and zeros."""
        for kind, state in self.states.items():
            kind, rows = "master" if kind == "part" else kind, np.zeros((self.length, *self.row), np.float32)
            for parameter, start, size in zip(self.params, self.starts, self.sizes):
                name = f"{kind}.{parameter.name}"
                if name in arrays:
                    rows[start:start + size] = arrays[name].reshape(-1, *self.row)
                elif kind == "master":
                    rows[start:start + size] = parameter.astype(ms.float32).asnumpy().reshape(-1, *self.row)
            state.set_data(ms.Tensor(rows[self.first:self.first + self.count]))


def _rows(shape, gradient):
    return ops.reshape(gradient, shape)


def _take(rows, parameter, start, size):
    row = rows.shape[1:]
    own = ops.slice(rows, (start,) + (0,) * len(row), (size,) + row)
    return ops.assign(parameter, ops.reshape(own, parameter.shape))


def filled(x, length):
    """x [B, ...] with zeros behind it, [length, ...]."""
    if x.shape[0] == length:
        return x
    return ops.cat((x, ops.zeros((length - x.shape[0],) + x.shape[1:], x.dtype)))
