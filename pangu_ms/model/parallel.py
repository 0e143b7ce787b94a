"""One network on several processes: which rank holds what, and the collectives between its layers.

Tensor parallel ranks share heads, the rows and columns of the feed-forward layers, and the vocabulary; expert parallel
ranks share the routed experts. Together they form one model; data parallel ranks are copies of it. What a rank holds
is cut as `pangu-convert --tensor-parallel --expert-parallel` cuts it; everything else, and so the hidden vector between
two sublayers, is the same on all tensor parallel ranks. Expert parallel ranks see the same tokens in inference; in
training each has sequences of its own, whose tokens meet at the experts.
"""
import math
import os
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import communication, context, nn, ops

from pangu_ms.checkpoint.layout import Grid
from pangu_ms.errors import ConfigError

SHARED = {  # what the ranks of a dimension divide among them
    "tensor": ("num_attention_heads", "vocab_size", "intermediate_size", "moe_intermediate_size"),
    "expert": ("n_routed_experts",),
}


@dataclass(frozen=True)
class Parallel:
    """A process's place: rank = (number of the copy * expert + expert_rank) * tensor + tensor_rank.

    Attributes:
        tensor, expert, data: ranks in each dimension.
        own_sequences: expert parallel ranks see different sequences, as in training.
        rank: of this process, of tensor * expert * data; known once it has started.
    """

    tensor: int = 1
    expert: int = 1
    data: int = 1
    own_sequences: bool = False
    rank: int = 0

    def __post_init__(self):
        for name in ("tensor", "expert", "data"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} parallel is {size!r}: wanted a whole number of at least 1")

    @property
    def ranks(self):
        return self.tensor * self.expert * self.data

    @property
    def grid(self):
        """The ranks of one model, as a sliced checkpoint knows them."""
        return Grid(self.tensor, self.expert)

    def check_processes(self):
        """`ConfigError` when msrun has started more or fewer processes than there are ranks."""
        processes = int(os.environ.get("MS_WORKER_NUM", "1"))
        if processes != self.ranks:
            raise ConfigError(f"tensor {self.tensor} x expert {self.expert} x data {self.data} parallel makes "
                              f"{self.ranks} processes, and this run has {processes}: start it by msrun "
                              f"--worker_num={self.ranks} --local_worker_num=(those on this machine)")

    def start(self):
        """This process's place among those that msrun has started, ready to talk to the others."""
        self.check_processes()
        if self.ranks == 1:
            return self
        communication.init()
        return replace(self, rank=communication.get_rank())

    def wait(self):
        """Returns when all ranks have called it."""
        if self.ranks > 1:
            ops.AllReduce()(ms.Tensor([1.0], ms.float32)).asnumpy()             # a CPU has no barrier

    def check(self, config):
        """`ConfigError` when ranks would cut through a head, a row or an expert; it says which sizes would fit."""
        for dimension, fields in SHARED.items():
            size, values = getattr(self, dimension), [getattr(config, name) for name in fields]
            if any(value % size for value in values):
                fit = [n for n in range(1, min(values) + 1) if math.gcd(*values) % n == 0]
                raise ConfigError(f"{dimension} parallel {size} does not divide all of "
                                  + ", ".join(f"{name} {value}" for name, value in zip(fields, values))
                                  + f": take one of {', '.join(map(str, fit))}")

    @property
    def tensor_rank(self):
        return self.index("tensor")

    @property
    def expert_rank(self):
        return self.index("expert")

    @property
    def model_rank(self):
        """Among the ranks of one model: the number of its directory in a sliced checkpoint."""
        return self.rank % self.grid.ranks

    @property
    def batch(self):
        """How many ranks have different sequences."""
        return self.data * self.expert if self.own_sequences else self.data

    def size(self, dimension):
        return self.batch if dimension == "batch" else getattr(self, dimension)

    def index(self, dimension):
        """This process's place among the ranks of a dimension."""
        return self.rank // self._step(dimension) % self.size(dimension)

    def _step(self, dimension):
        return {"tensor": 1, "expert": self.tensor, "data": self.grid.ranks,
                "batch": self.tensor if self.own_sequences else self.grid.ranks}[dimension]

    def copy(self, dimension):
        return Copy(self.group(dimension)) if self.size(dimension) > 1 else nn.Identity()

    def reduce(self, dimension):
        return Reduce(self.group(dimension)) if self.size(dimension) > 1 else nn.Identity()

    def gather(self):
        """The last axis, of which each tensor parallel rank has a part."""
        return GatherColumns(*self._members("tensor")) if self.tensor > 1 else nn.Identity()

    def all_rows(self, dimension):
        """x [B, ...] of each rank of a dimension -> [ranks * B, ...] on all of them, in their order. No gradient."""
        return _all_of(*self._members(dimension))

    def whole(self, dimension, array):
        """What `all_rows` gives of a float32 array, outside a graph; of any device, and with nothing to compile."""
        found = np.zeros((self.size(dimension), *array.shape), np.float32)
        found[self.index(dimension)] = array
        summed = ops.AllReduce(group=self.group(dimension))(ms.Tensor(found)).asnumpy()
        return summed.reshape(-1, *array.shape[1:])

    def exchange(self, split, concatenate):
        """x, of which each tensor parallel rank has a part along the axis `concatenate` -> x whole along that axis, of
        which each has its part along `split`. No gradient."""
        members = self._members("tensor")
        if context.get_context("device_target") == "Ascend":
            return ops.AlltoAll(self.tensor, split, concatenate, members[0])
        return _ExchangeBySum(*members, split, concatenate)

    def to_experts(self):
        """What every expert parallel rank must see of x [B, ...], and the way back for what their experts made of it:

        all their sequences, and of the sums over all ranks the own sequences; if they have the same, x, and the sum.
        """
        if self.expert > 1 and self.own_sequences:
            members = self._members("expert")
            return Gather(*members), Scatter(*members)
        return self.copy("expert"), self.reduce("expert")

    def group(self, dimension):
        """The name of this rank's group: those whose other coordinates are the same.

        dimension: "tensor", "expert", "data", or "batch": all that have other sequences, of the same part of the model.
        """
        step, size = self._step(dimension), self.size(dimension)
        first = self.rank - self.index(dimension) * step
        ranks = [first + i * step for i in range(size)]
        name = f"pangu_{dimension}_" + "_".join(map(str, ranks))
        if name not in _groups:
            communication.create_group(name, ranks)
            _groups.add(name)
        return name

    def _members(self, dimension):
        return self.group(dimension), self.index(dimension), self.size(dimension)


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


class Gather(nn.Cell):
    """x [B, ...], other rows on each rank -> [ranks * B, ...] on all of them, in their order."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.all_of, self.own_of_sum = _all_of(group, index, ranks), _own_of_sum(group, index, ranks)

    def construct(self, x):
        return self.all_of(x)

    def bprop(self, x, out, dout):
        return (self.own_of_sum(dout),)


class Scatter(nn.Cell):
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
    on_ascend = context.get_context("device_target") == "Ascend"
    return ops.AllGather(group) if on_ascend else _AllOfBySum(group, index, ranks)


def _own_of_sum(group, index, ranks):
    on_ascend = context.get_context("device_target") == "Ascend"
    return ops.ReduceScatter(group=group) if on_ascend else _OwnOfSum(group, index, ranks)


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


def own_part(ids, first, count):
    """Of ids: which are first .. first + count - 1, and their places in that range, 0 for all others."""
    place = ids - first
    own = ops.logical_and(place >= 0, place < count)
    return own, ops.select(own, place, ops.zeros_like(place))
