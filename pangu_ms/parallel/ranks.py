"""How processes share a model and a batch, in numbers. Needs no MindSpore.

Tensor parallel ranks share heads, the widths of the feed-forward layers, and the vocabulary; expert parallel ranks
share the routed experts. Together they hold one model. Data parallel ranks are copies of it.
"""
import os
from dataclasses import dataclass, replace

from pangu_ms.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """The numbers of ranks, and one rank's place: rank = (copy * expert + expert_rank) * tensor + tensor_rank.

    Attributes:
        tensor, expert, data: ranks in each dimension.
        rank: of this process, 0 to count - 1; known once it has started.
        batch_sharded: expert parallel ranks have sequences of their own, as in training. In inference all ranks of a
            model have the same sequences.

    Raises:
        ConfigError: a number is no whole number of at least 1.
    """

    tensor: int = 1
    expert: int = 1
    data: int = 1
    rank: int = 0
    batch_sharded: bool = False

    def __post_init__(self):
        for name in ("tensor", "expert", "data"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} parallel is {size!r}: wanted a whole number of at least 1")

    def __str__(self) -> str:
        return f"dp={self.data},tp={self.tensor},ep={self.expert}"

    @property
    def count(self) -> int:
        return self.tensor * self.expert * self.data

    @property
    def model(self) -> "Ranks":
        """The ranks that hold one model, with this rank's place among them: what a sliced checkpoint knows."""
        return Ranks(self.tensor, self.expert, rank=self.rank % (self.tensor * self.expert))

    def at(self, rank: int) -> "Ranks":
        """The same ranks, seen from another of them."""
        return replace(self, rank=rank)

    @property
    def batch(self) -> int:
        """How many ranks have different sequences."""
        return self.data * self.expert if self.batch_sharded else self.data

    @property
    def tensor_rank(self) -> int:
        return self.index("tensor")

    @property
    def expert_rank(self) -> int:
        return self.index("expert")

    def size(self, dimension: str) -> int:
        """dimension: "tensor", "expert", "data", or "batch": all that have different sequences for the same part."""
        return getattr(self, dimension)

    def index(self, dimension: str) -> int:
        """This rank's place among the ranks of a dimension."""
        return self.rank // self._step(dimension) % self.size(dimension)

    def group(self, dimension: str) -> list[int]:
        """The ranks whose other coordinates are this rank's."""
        step = self._step(dimension)
        first = self.rank - self.index(dimension) * step
        return [first + i * step for i in range(self.size(dimension))]

    def _step(self, dimension: str) -> int:
        model = self.tensor * self.expert
        return {"tensor": 1, "expert": self.tensor, "data": model,
                "batch": self.tensor if self.batch_sharded else model}[dimension]


def check_processes(ranks: Ranks) -> None:
    """`ConfigError` when msrun has started more or fewer processes than there are ranks."""
    processes = int(os.environ.get("MS_WORKER_NUM", "1"))
    if processes != ranks.count:
        raise ConfigError(f"tensor {ranks.tensor} x expert {ranks.expert} x data {ranks.data} parallel makes "
                          f"{ranks.count} processes, and this run has {processes}: start it by msrun "
                          f"--worker_num={ranks.count} --local_worker_num=(those on this machine)")
