"""What is estimated: a network on the ranks that share it, what they compute, and the calls of the network it takes."""
import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from pangu_ms.architectures.tensors import check_ranks, has_gradient, parameters
from pangu_ms.cache.sizes import DTYPE_BYTES, FIRST_CAPACITY, grown
from pangu_ms.errors import PanguError
from pangu_ms.generation.chunks import PREFILL_CHUNK, chunk_rows
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.optimizer.groups import Group, group_parameters

FLOAT32 = {"mhc", "merge", "router"}  # components that the network keeps, and multiplies by, in float32
FUSED_CHUNK = 4096  # rows of a prompt at once that fused operators would be given


@dataclass(frozen=True)
class Work:
    """`batch` sequences of `length` tokens: one forward and backward of all of them, or their prefill and decoding.

    fused: as the Ascend forms of `pangu_ms.ops` compute (attention over visible keys without its scores in memory, one
    product for each group of experts, a cross entropy in pieces); otherwise as the formulas of `pangu_ms.model` do.
    """

    phase: str  # "train" or "infer"
    length: int
    batch: int
    dtype: str = "bfloat16"
    recompute: bool = False
    shard_optimizer: bool = False
    fused: bool = False


class Case:
    """Work of a network on the ranks of one layout. Numbers are those of one rank: all have equally much to do.

    Attributes:
        plan: with the work's dtype; `width` are the bytes of a value of it.
        layers: a layer for all that cost the same -> how many these are.
        sequences, group_sequences: of this rank; of the copy of the model that it belongs to, which its experts see.
        shapes, counts, dtypes, bytes: of what the rank holds of each tensor, by name.
    """

    def __init__(self, config, ranks: Ranks, work: Work, tensors=None):
        self.config, self.ranks, self.work, self.train = config, ranks, work, work.phase == "train"
        self.plan, self.width = replace(config.plan, dtype=work.dtype), DTYPE_BYTES[work.dtype]
        self.layers = Counter(replace(layer, index=0, block_norm=False, mtp_depth=min(layer.mtp_depth, 1))
                              for layer in self.plan.layers)
        self.sequences, self.group_sequences = -(-work.batch // ranks.batch), -(-work.batch // ranks.data)
        self.tensors = tensors or parameters(config)
        self.shapes = {name: p.local_shape(ranks) for name, p in self.tensors.items()}
        self.counts = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.dtypes = {name: "float32" if p.component in FLOAT32 else work.dtype for name, p in self.tensors.items()}
        self.bytes = {name: count * DTYPE_BYTES[self.dtypes[name]] for name, count in self.counts.items()}

    @functools.cached_property
    def groups(self) -> dict[Group, list[str]]:
        """The names of the tensors that the optimizer updates together."""
        trained = {name: shape for name, shape in self.shapes.items() if has_gradient(name)}
        return group_parameters(trained, self.dtypes, self.tensors, self.ranks, True, self.work.shard_optimizer)

    def on(self, ranks: Ranks) -> "Case":
        """The same work in another layout."""
        return Case(self.config, ranks, self.work, self.tensors)

    def check(self) -> None:
        """`PanguError` for a layout or a length that cannot be, with the numbers that can."""
        check_ranks(self.config, self.ranks)
        sets, work, most = self.ranks.batch, self.work, self.plan.max_positions
        if self.train and work.batch % sets:
            raise PanguError(f"--batch {work.batch} does not divide among dp * ep = {sets} sets of sequences; the next "
                             f"that does: {sets * (work.batch // sets + 1)}")
        if work.length > most:
            raise PanguError(f"--sequence-length {work.length}: the model's positions end at max_position_embeddings = "
                             f"{most}")


def parse_parallel(text: str, train: bool) -> Ranks:
    """`dp=..,tp=..,ep=..,pp=1` -> Ranks; what is left out is 1."""
    sizes = {"dp": 1, "tp": 1, "ep": 1, "pp": 1}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in sizes or not value.isascii() or not value.isdigit() or not int(value):
            raise PanguError(f"--parallel {text}: found {item!r}, wanted dp, tp, ep or pp and a number: dp=8,tp=1,ep=8")
        sizes[name] = int(value)
    if sizes["pp"] > 1:
        raise PanguError(f"--parallel {text}: found pp={sizes['pp']}, wanted pp=1: layers are not spread over devices; "
                         "raise ep or tp")
    return Ranks(sizes["tp"], sizes["ep"], sizes["dp"], batch_sharded=train)


class Calls:
    """Calls of the network for one sequence: `rows[c]` new tokens after `past[c]` earlier ones, made `times[c]` times.

    capacity[c]: rows of the cache that earlier rows come from; None: there is none, and all rows go through the head
    instead of the last one. decode: with absorbed attention.
    """

    def __init__(self, rows, past, capacity=None, times=1, decode=False):
        self.rows, self.cached, self.decode = np.asarray(rows, np.float64), capacity is not None, decode
        self.past, self.capacity, self.times, self.logits = (
            np.broadcast_to(np.asarray(each, np.float64), self.rows.shape)
            for each in (past, capacity or rows, times, 1 if self.cached else rows))
        self.tokens = int(self.total(self.rows))

    def total(self, values: np.ndarray) -> float:
        """Over all calls, of something that each call has so much of."""
        return float((values * self.times).sum())


def calls_of(case: Case) -> dict[str, Calls]:
    """By phase. Of decoding, the token that makes the context `length` long."""
    length = case.work.length
    if case.train:
        return {"step": Calls([length], 0)}
    capacity = grown(FIRST_CAPACITY, length)
    return {"prefill": prefill_calls(case), "decode": Calls([1], length - 1, capacity, decode=True)}


def prefill_calls(case: Case) -> Calls:
    """The prompt in the engine's chunks, or FUSED_CHUNK rows at a time, the cache growing as it does there.

    What the plain forms compute for a chunk behind the top-k limit does not depend on where it stands: equal ones are
    one call made many times.
    """
    fused, topk = case.work.fused, case.plan.indexer.topk if case.plan.indexer else 0
    calls, done, capacity = [], 0, FIRST_CAPACITY
    while (left := case.work.length - done) > 0:
        rows = min(FUSED_CHUNK, left) if fused else chunk_rows(case.plan, case.sequences, done, capacity,
                                                               min(PREFILL_CHUNK, left))
        times = 1 if fused or done < topk else max(1, min(left, capacity - done) // rows)  # until the cache grows
        capacity = grown(capacity, done + rows)
        calls.append((rows, done, capacity, times))
        done += rows * times
    return Calls(*zip(*calls))
