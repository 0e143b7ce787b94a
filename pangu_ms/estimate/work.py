"""What is to be estimated: how devices share the model, what they compute, and the calls of the network it takes."""
import math
from dataclasses import dataclass

import numpy as np

from pangu_ms.checkpoint.layout import Grid
from pangu_ms.checkpoint.names import Parameter, parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import PanguError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PREFILL_CHUNK = 512      # of `stream_generate`
CHUNK_BYTES = 2 ** 26    # of `generation.engine`
FIRST_CAPACITY = 256     # of `generation.engine`
FUSED_CHUNK = 4096       # rows of a prompt at once that fused operators would be given


@dataclass(frozen=True)
class Parallel:
    """`data` copies of the model, each on `expert` * `tensor` devices (rank = expert rank * tensor + tensor rank).

    Tensor ranks share heads, the width of MLPs and experts, and the vocabulary. Expert ranks share the routed experts
    and hold all else `expert` times. In training each takes sequences of its own: `replicas` sets of them run at once.
    In inference all ranks of a copy compute the same sequences.
    """

    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.expert

    @property
    def replicas(self) -> int:
        return self.data * self.expert

    @property
    def grid(self) -> Grid:
        return Grid(self.tensor, self.expert)

    def __str__(self) -> str:
        return f"dp={self.data},tp={self.tensor},ep={self.expert}"


_last: list = [None, ()]


def held(config: PanguConfig) -> tuple[Parameter, ...]:
    """All parameters of the model. A search over layouts asks for them hundreds of times, so the last are kept."""
    if _last[0] is not config:
        _last[:] = config, tuple(parameters(config).values())
    return _last[1]


def local_shape(p: Parameter, parallel: Parallel) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter on one device: what `checkpoint.layout.sliced` leaves of it."""
    shape = {"members": p.members, "rows": p.rows, "columns": p.columns}
    for split in p.splits:
        shape[split.axis] //= parallel.tensor if split.over == "tensor" else parallel.expert
    return tuple(shape.values())


def parse_parallel(text: str) -> Parallel:
    """`dp=..,tp=..,ep=..,pp=1` -> Parallel; what is left out is 1."""
    sizes = {"dp": 1, "tp": 1, "ep": 1, "pp": 1}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in sizes or not value.isascii() or not value.isdigit() or not int(value):
            raise PanguError(f"--parallel {text}: found {item!r}, wanted dp, tp, ep or pp and a number: dp=8,tp=1,ep=8")
        sizes[name] = int(value)
    if sizes["pp"] > 1:
        raise PanguError(f"--parallel {text}: found pp={sizes['pp']}, wanted pp=1: layers are not spread over devices; "
                         "raise ep or tp")
    return Parallel(sizes["dp"], sizes["tp"], sizes["ep"])


def fitting(config: PanguConfig, over: str) -> list[int]:
    """The numbers of `tensor` or `expert` ranks that cut no head, expert or row: the divisors of all units cut."""
    units = math.gcd(*(split.units for p in held(config) for split in p.splits if split.over == over))
    return [n for n in range(1, units + 1) if units % n == 0]


@dataclass(frozen=True)
class Work:
    """`batch` sequences of `length` tokens: one forward and backward of all of them, or their prefill and decoding.

    fused: as the Ascend forms of `pangu_ms.ops` compute (attention over visible keys without its scores in memory, one
    product for each group of experts, a cross entropy in pieces); otherwise as the plain forms do.
    """

    phase: str  # "train" or "infer"
    length: int
    batch: int
    dtype: str = "bfloat16"
    recompute: bool = False
    shard_optimizer: bool = False
    fused: bool = False

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return DTYPE_BYTES[self.dtype]

    def sequences(self, parallel: Parallel) -> int:
        """On the busiest device."""
        return -(-self.batch // (parallel.replicas if self.phase == "train" else parallel.data))

    def group_sequences(self, parallel: Parallel) -> int:
        """In one copy of the model: what its experts see."""
        return -(-self.batch // parallel.data)


def check(config: PanguConfig, parallel: Parallel, work: Work) -> None:
    """`PanguError` for a layout or a length that cannot be, with the numbers that can."""
    for name, size, over in (("tp", parallel.tensor, "tensor"), ("ep", parallel.expert, "expert")):
        numbers = fitting(config, over)
        if size not in numbers:
            cut = "heads, MLP rows and vocabulary" if over == "tensor" else "n_routed_experts"
            raise PanguError(f"{name}={size} does not divide {cut}; these do: {', '.join(map(str, numbers))}")
    if work.phase == "train" and work.batch % parallel.replicas:
        raise PanguError(f"--batch {work.batch} does not divide among dp * ep = {parallel.replicas} sets of sequences; "
                         f"the next that does: {parallel.replicas * (work.batch // parallel.replicas + 1)}")
    if work.length > config.max_position_embeddings:
        raise PanguError(f"--sequence-length {work.length}: the model's positions end at max_position_embeddings = "
                         f"{config.max_position_embeddings}")


@dataclass(frozen=True)
class Calls:
    """Calls of the network for one sequence: `rows[c]` new tokens after `past[c]` earlier ones, made `times[c]` times.

    cached: earlier rows come from a cache of `capacity[c]` rows. decode: with absorbed attention. logits[c]: rows of
    the call that go through the head.
    """

    rows: np.ndarray
    past: np.ndarray
    logits: np.ndarray
    times: np.ndarray
    capacity: np.ndarray
    cached: bool
    decode: bool = False

    def total(self, values: np.ndarray) -> float:
        """Over all calls, of something that each call has so much of."""
        return float((values * self.times).sum())

    @property
    def tokens(self) -> int:
        return int(self.total(self.rows))


def make_calls(rows, past, logits, capacity, times=1, **fields) -> Calls:
    rows = np.asarray(rows, np.float64)
    others = (np.broadcast_to(np.asarray(values, np.float64), rows.shape) for values in (past, logits, times, capacity))
    return Calls(rows, *others, **fields)


def train_calls(work: Work) -> Calls:
    """The whole sequence at once."""
    return make_calls([work.length], 0, work.length, work.length, cached=False)


def decode_calls(work: Work) -> Calls:
    """The token that makes the context `length` long."""
    return make_calls([1], work.length - 1, 1, grown(FIRST_CAPACITY, work.length), cached=True, decode=True)


def prefill_calls(config: PanguConfig, parallel: Parallel, work: Work) -> Calls:
    """The prompt in the engine's chunks, or FUSED_CHUNK rows at a time, the cache growing as it does there.

    What the plain forms compute for a chunk behind the top-k limit does not depend on where it stands: equal ones are
    one call made many times.
    """
    rows, past, capacities, times, done, capacity = [], [], [], [], 0, FIRST_CAPACITY
    while done < work.length:
        size = chunk_rows(config, work, work.sequences(parallel), done, capacity)
        capacity, room = grown(capacity, done + size), min(work.length, capacity) - done
        equal = 1 if work.fused or done < config.index_topk else max(1, room // size)
        rows, past, capacities, times = rows + [size], past + [done], capacities + [capacity], times + [equal]
        done += size * equal
    return make_calls(rows, past, 1, capacities, times, cached=True)


def grown(capacity: int, length: int) -> int:
    """Rows of a growing tensor of the cache that must hold `length`: doubled as often as it takes."""
    while capacity < length:
        capacity *= 2
    return capacity


def chunk_rows(config: PanguConfig, work: Work, batch: int, done: int, capacity: int) -> int:
    """Rows of the next chunk of `generation.engine`.

    A chunk either precedes the top-k limit of DSA or lies behind it, and there neither the gathered latent rows nor
    the indexer's scores of a batch of such chunks take more than CHUNK_BYTES.
    """
    if work.fused:
        return min(FUSED_CHUNK, work.length - done)
    rows = min(PREFILL_CHUNK, work.length - done)
    if not config.dsa_layers:
        return rows
    if done < config.index_topk:
        return min(rows, config.index_topk - done)
    gathered = config.index_topk * (config.kv_lora_rank + config.qk_rope_head_dim) * work.width
    scored = capacity * config.index_n_heads * 4
    return min(rows, max(1, CHUNK_BYTES // (batch * max(gathered, scored))))
