"""The collectives between the layers of one network on several processes.

What a rank holds is cut as `pangu-convert --tensor-parallel --expert-parallel` cuts it. Everything else, and so the
hidden vector between two sublayers, is the same on all tensor parallel ranks. Expert parallel ranks see the same tokens
in inference; in training each has sequences of its own, whose tokens meet at the experts.
"""
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import communication, nn, ops

from pangu_ms import device
from pangu_ms.parallel.ranks import Ranks, check_processes


def start(ranks: Ranks) -> Ranks:
    """`ranks` with this process's place among those that msrun has started, ready to talk to the others."""
    check_processes(ranks)
    if ranks.count == 1:
        return ranks
    communication.init()
    return replace(ranks, rank=communication.get_rank())


def wait(ranks: Ranks) -> None:
    """Returns when all ranks have called it."""
    if ranks.count > 1:
        ops.AllReduce()(ms.Tensor([1.0], ms.float32)).asnumpy()                 # a CPU has no barrier


def copy(ranks, dimension):
    """A cell for x where ranks begin to compute different parts from it."""
    return Copy(group(ranks, dimension)) if ranks.size(dimension) > 1 else nn.Identity()


def reduce(ranks, dimension):
    """A cell for x where the ranks' parts become their sum."""
    return Reduce(group(ranks, dimension)) if ranks.size(dimension) > 1 else nn.Identity()


def gather_columns(ranks):
    """A cell for x, of whose last axis each tensor parallel rank has a part."""
    return GatherColumns(*_members(ranks, "tensor")) if ranks.tensor > 1 else nn.Identity()


def all_gather(ranks, dimension):
    """A cell: x [B, ...] of each rank of a dimension -> [ranks * B, ...] on all, in their order. No gradient."""
    return _all_of(*_members(ranks, dimension))


def all_gather_array(ranks, dimension, array):
    """What `all_gather` gives of a float32 array, outside a graph; of any device, and with nothing to compile."""
    found = np.zeros((ranks.size(dimension), *array.shape), np.float32)
    found[ranks.index(dimension)] = array
    summed = ops.AllReduce(group=group(ranks, dimension))(ms.Tensor(found)).asnumpy()
    return summed.reshape(-1, *array.shape[1:])


def all_to_all(ranks, split, concatenate):
    """A cell: x, of which each tensor parallel rank has a part along the axis `concatenate` -> x whole along that axis,
    of which each has its part along `split`. No gradient."""
    members = _members(ranks, "tensor")
    if device.on_ascend():
        return ops.AlltoAll(ranks.tensor, split, concatenate, members[0])
    return _ExchangeBySum(*members, split, concatenate)


def dispatch_and_combine(ranks):
    """Two cells: what every expert parallel rank must see of x [B, ...], and the way back for what its experts gave.

    Where the batch is sharded: the sequences of all ranks, and of the sums over the ranks the own sequences. Otherwise
    all ranks have the same sequences: x itself, and the sum.
    """
    if ranks.expert > 1 and ranks.batch_sharded:
        members = _members(ranks, "expert")
        return AllGather(*members), ReduceScatter(*members)
    return copy(ranks, "expert"), reduce(ranks, "expert")


def group(ranks, dimension):
    """The name of this rank's group in a dimension, made when it is first asked for."""
    members = ranks.group(dimension)
    name = f"pangu_{dimension}_" + "_".join(map(str, members))
    if name not in _groups:
        communication.create_group(name, members)
        _groups.add(name)
    return name


def _members(ranks, dimension):
    return group(ranks, dimension), ranks.index(dimension), ranks.size(dimension)


_groups = set()  # made in this process, of which no name may be made twice


class Copy(nn.Cell):
    """Where ranks begin to compute different parts from the same x: their gradients of it are summed."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(group=group)

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (self.sum(dout),)


class Reduce(nn.Cell):
    """Where their parts become one: x is summed, and its gradient is the same for all of them."""

    def __init__(self, group):
        super().__init__()
        self.sum = ops.AllReduce(group=group)

    def construct(self, x):
        return self.sum(x)

    def bprop(self, x, out, dout):
        return (dout,)


class AllGather(nn.Cell):
    """x [B, ...], other rows on each rank -> [ranks * B, ...] on all of them, in their order."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.all_of, self.own_of_sum = _all_of(group, index, ranks), _own_of_sum(group, index, ranks)

    def construct(self, x):
        return self.all_of(x)

    def bprop(self, x, out, dout):
        return (self.own_of_sum(dout),)


class ReduceScatter(nn.Cell):
    """x [ranks * B, ...] -> the own rows [B, ...] of its sum over the ranks."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.all_of, self.own_of_sum = _all_of(group, index, ranks), _own_of_sum(group, index, ranks)

    def construct(self, x):
        return self.own_of_sum(x)

    def bprop(self, x, out, dout):
        return (self.all_of(dout),)


class GatherColumns(nn.Cell):
    """x [A, B, D], a part on each rank -> [A, B, ranks * D] on all of them, in their order. No gradient."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.ranks, self.all_of = ranks, _all_of(group, index, ranks)

    def construct(self, x):
        parts = ops.reshape(self.all_of(x), (self.ranks, x.shape[0], -1, x.shape[2]))
        return ops.reshape(ops.transpose(parts, (1, 2, 0, 3)), (x.shape[0], -1, self.ranks * x.shape[2]))


def _all_of(group, index, ranks):
    return ops.AllGather(group) if device.on_ascend() else _AllOfBySum(group, index, ranks)


def _own_of_sum(group, index, ranks):
    return ops.ReduceScatter(group=group) if device.on_ascend() else _OwnOfSum(group, index, ranks)


class _AllOfBySum(nn.Cell):
    """AllGather along the first axis for a CPU, which has it for the group of all processes alone."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.place = ms.Tensor(np.eye(ranks, dtype=np.float32)[index])          # [ranks]
        self.sum = ops.AllReduce(group=group)

    def construct(self, x):
        place = ops.cast(ops.reshape(self.place, (-1,) + (1,) * x.ndim), x.dtype)
        parts = self.sum(ops.expand_dims(x, 0) * place)                         # the others' places hold zeros
        return ops.reshape(parts, (-1,) + x.shape[1:])


class _OwnOfSum(nn.Cell):
    """ReduceScatter along the first axis for a CPU, which has none."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.index, self.ranks, self.sum = index, ranks, ops.AllReduce(group=group)

    def construct(self, x):
        parts = ops.reshape(self.sum(x), (self.ranks, -1) + x.shape[1:])
        return parts[self.index]


class _ExchangeBySum(nn.Cell):
    """AlltoAll for a CPU, which has none."""

    def __init__(self, group, index, ranks, split, concatenate):
        super().__init__()
        self.all_of, self.index, self.ranks = _AllOfBySum(group, index, ranks), index, ranks
        self.split, self.concatenate = split, concatenate

    def construct(self, x):
        size = x.shape[self.split] // self.ranks
        parts = ops.narrow(self.all_of(ops.expand_dims(x, 0)), self.split + 1, self.index * size, size)
        return ops.cat(ops.unstack(parts), self.concatenate)

