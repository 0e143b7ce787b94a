"""One network on several processes: which rank holds what, and the collectives between its layers.

Tensor parallel ranks share heads, the rows and columns of the feed-forward layers, and the vocabulary; expert parallel
ranks share the routed experts. Together they form one model and see the same tokens; data parallel ranks are copies of
it. What a rank holds is cut as `pangu-convert --tensor-parallel --expert-parallel` cuts it; everything else, and so the
hidden vector between two sublayers, is the same on all ranks of a model.

A sum of parts is the one collective used: a CPU has no other for less than all processes.
"""
import math
import os
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import communication, nn, ops

from pangu_ms.errors import ConfigError

SHARED = {  # what the ranks of a dimension divide among them
    "tensor": ("num_attention_heads", "vocab_size", "intermediate_size", "moe_intermediate_size"),
    "expert": ("n_routed_experts",),
}


@dataclass(frozen=True)
class Parallel:
    """This process's place: rank = (data_rank * expert + expert_rank) * tensor + tensor_rank.

    Attributes:
        tensor, expert, data: ranks in each dimension.
        rank: of this process, of tensor * expert * data.
    """

    tensor: int = 1
    expert: int = 1
    data: int = 1
    rank: int = 0

    @classmethod
    def start(cls, tensor=1, expert=1, data=1):
        """The place of this process among those that msrun has started, ready to talk to the others.

        Raises:
            ConfigError: there are more or fewer processes than the product of the sizes.
        """
        for name, size in (("tensor", tensor), ("expert", expert), ("data", data)):
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} parallel is {size!r}: wanted a whole number of at least 1")
        processes, wanted = int(os.environ.get("MS_WORKER_NUM", "1")), tensor * expert * data
        if processes != wanted:
            raise ConfigError(f"tensor {tensor} x expert {expert} x data {data} parallel makes {wanted} processes, and "
                              f"this run has {processes}: start it by msrun --worker_num={wanted} "
                              f"--local_worker_num={wanted}")
        if processes == 1:
            return cls()
        # A rank that still compiles lets the others wait, and MindSpore on a CPU gives up after a short while.
        os.environ.setdefault("MS_RECEIVE_MSG_TIMEOUT", "3600")               # seconds
        communication.init()
        return cls(tensor, expert, data, communication.get_rank())

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
        return self.rank % self.tensor

    @property
    def expert_rank(self):
        return self.rank // self.tensor % self.expert

    @property
    def model_rank(self):
        """Among the ranks of one model: the number of its directory in a sliced checkpoint."""
        return self.rank % (self.tensor * self.expert)

    def copy(self, dimension):
        return Copy(self.group(dimension)) if getattr(self, dimension) > 1 else nn.Identity()

    def reduce(self, dimension):
        return Reduce(self.group(dimension)) if getattr(self, dimension) > 1 else nn.Identity()

    def gather(self):
        """Over the tensor parallel ranks."""
        return Gather(self.group("tensor"), self.tensor_rank, self.tensor) if self.tensor > 1 else nn.Identity()

    def group(self, dimension):
        """The name of this rank's group: all ranks whose other coordinates are the same."""
        step = {"tensor": 1, "expert": self.tensor, "data": self.tensor * self.expert}[dimension]
        size = getattr(self, dimension)
        first = self.rank - self.rank // step % size * step
        ranks = [first + i * step for i in range(size)]
        name = f"pangu_{dimension}_" + "_".join(map(str, ranks))
        if name not in _groups:
            communication.create_group(name, ranks)
            _groups.add(name)
        return name


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
    """x float32 [B, T, D], a part on each rank -> [B, T, ranks * D] on all of them, in their order. No gradient."""

    def __init__(self, group, index, ranks):
        super().__init__()
        self.ranks = ranks
        self.place = ms.Tensor(np.eye(ranks, dtype=np.float32)[index][:, None])                 # [ranks, 1]
        self.sum = ops.AllReduce(group=group)

    def construct(self, x):
        parts = self.sum(ops.expand_dims(x, -2) * self.place)                   # the others' places hold zeros
        return ops.reshape(parts, (x.shape[0], -1, self.ranks * x.shape[-1]))


def own_part(ids, first, count):
    """Of ids: which are first .. first + count - 1, and their places in that range, 0 for all others."""
    place = ids - first
    own = ops.logical_and(place >= 0, place < count)
    return own, ops.select(own, place, ops.zeros_like(place))
