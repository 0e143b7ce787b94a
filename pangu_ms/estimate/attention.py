"""What a layer's attention costs on one rank, by its record in the plan: its reach, operations and bytes."""
import numpy as np

from pangu_ms.estimate.work import Calls, Case
from pangu_ms.model.plan import GroupedQueryAttention, LatentAttention


def attention_cost(attention: LatentAttention | GroupedQueryAttention, case: Case, calls: Calls):
    """The costs of an attention of any kind."""
    return COSTS[type(attention)](attention, case, calls)


class LatentCost:
    """One layer's attention in the calls of a phase. Arrays [C] hold a number for each call, of one sequence.

    Fused attention sees visible pairs alone. Plain attention multiplies each query by every key that is there, masked:
    all rows without a cache, window + new rows for a ring, the capacity for growing tensors, topk rows where DSA
    selects in a cache.

    Attributes:
        selects: whether the indexer runs.
        absorbed: the form. Expanded attention multiplies each key row by kv_b; absorbed attention moves that product
            to each query, and is used for decoding and where DSA gathers rows.
        keys: rows in memory that a query is multiplied with, without sinks.
        pairs: query-key pairs of the scores, sinks included; index_pairs: of the indexer's.
        kv_b_rows: rows or queries that pass through kv_b.
    """

    def __init__(self, attention: LatentAttention, case: Case, calls: Calls):
        a, fused, rows, past = attention, case.work.fused, calls.rows, calls.past
        self.attention, self.case, self.calls, self.heads = a, case, calls, a.num_heads // case.ranks.tensor
        topk = a.indexer.topk if a.indexer else np.inf
        self.selects = past + rows > topk
        self.absorbed = (self.selects & (fused or calls.cached)) | calls.decode
        if fused:
            keys = rows + (past if a.window is None else np.minimum(past, a.window - 1))
        else:
            keys = calls.capacity if a.window is None or not calls.cached else a.window + rows
        self.keys = np.where(self.selects, np.minimum(topk, keys), keys) if fused or calls.cached else keys
        pairs = visible_pairs(past, rows, topk if a.indexer else a.window) if fused else rows * self.keys
        self.pairs = pairs + rows * a.sinks
        self.index_pairs = self.selects * (visible_pairs(past, rows, None) if fused else rows * calls.capacity)
        self.kv_b_rows = np.where(self.absorbed, rows, self.keys + a.sinks)

    def rows_through(self, name: str) -> np.ndarray:
        """Rows of each call that pass through one of the layer's matrices."""
        if name.endswith("kv_b_proj.weight"):
            return self.kv_b_rows
        if ".indexer." in name:                     # its keys are for the cache even where nothing is selected yet
            return self.calls.rows * (self.selects | (name.endswith("wk.weight") & self.calls.cached))
        return self.calls.rows

    def flops(self) -> dict[str, float]:
        """Scores and weighted values of all sequences. Expanded: 2 * (nope + rope) + 2 * value for each pair and head.
        Absorbed: the same over latent rows; the plain form multiplies the rotary part of the rows into the output too,
        and drops it. Each head of the indexer scores a pair, and the heads are added by weight."""
        a, sequences = self.attention, self.case.sequences
        absorbed = 2 * (a.row_width + (a.kv_lora_rank if self.case.work.fused else a.row_width))
        pair = np.where(self.absorbed, absorbed, 2 * (a.qk_head_dim + a.v_head_dim))
        found = {f"scores_{a.kind}": sequences * self.heads * self.calls.total(self.pairs * pair)}
        if a.indexer:
            found["indexer"] = sequences * self._index_flops(self.calls.total(self.index_pairs))
        return found

    def activations(self) -> dict[str, np.ndarray]:
        """What it computes and its backward reads, bytes [C] of all sequences.

        `d` is a value of the model's dtype, `wide` its copy in float32, which only the plain forms make.
        """
        a, heads, rows, d = self.attention, self.heads, self.calls.rows, self.case.width
        plain = not self.case.work.fused
        wide, convolved = 4 * plain, d + 4 * plain if a.conv_width > 1 else 0
        # Latent vectors: projected, normed; wide between. Queries: projected and rotated; wide between. What the heads
        # give. And of the first and the last what a convolution gives; wide before it.
        found = {"projections": rows * ((a.q_lora_rank + a.row_width) * (2 * d + wide + convolved)
                                        + heads * (a.qk_head_dim * (2 * d + wide) + a.v_head_dim * (d + convolved)))}
        # The keys and values of each row, or absorbed the queries over latent rows.
        of_row = np.where(self.absorbed, a.row_width, a.qk_nope_head_dim + a.v_head_dim)
        found["keys_values"] = self.kv_b_rows * of_row * heads * d
        # Plain: each score in float32 for the softmax, then as a probability. Fused: a float32 sum for each query.
        found["scores"] = heads * (self.pairs * (4 + d) if plain else rows * 4)
        if indexer := a.indexer:
            # Queries before and behind their rotation; plain, every head's score of each pair, once more in float32,
            # and their sum, and in a cache the selected rows, then these behind the sinks; fused, int32 positions.
            of_query, of_pair = indexer.num_heads * indexer.head_dim * 2 * d, plain * (indexer.num_heads * (4 + d) + 4)
            selected = 2 * a.row_width * d * self.calls.cached if plain else 4
            found["indexer"] = (rows * self.selects * (of_query + indexer.topk * selected)
                                + self.index_pairs * of_pair)
            if self.calls.cached and not plain and not self.calls.decode:       # latent and rotary part, each by itself
                found["split_cache"] = self.selects * self.calls.capacity * a.row_width * d
        return {name: self.case.sequences * value for name, value in found.items()}

    def cache_read(self) -> float:
        """Bytes over all calls: latent rows that the scores are made with, and where DSA selects every indexer key.

        Where DSA selects, each query gathers rows of its own. Other calls read the keys once for all their queries.
        """
        calls, indexer = self.calls, self.attention.indexer
        values = calls.total(np.where(self.selects, calls.rows, 1) * self.keys) * self.attention.row_width
        ends = calls.past + calls.rows if self.case.work.fused else calls.capacity
        values += calls.total(ends * self.selects) * (indexer.head_dim if indexer else 0)
        return self.case.sequences * values * self.case.width

    def copied_values(self) -> int:
        """Of a token, that tensor ranks have alike and go on from with heads of their own: both latent vectors."""
        return self.attention.q_lora_rank + self.attention.row_width

    # ---- the indexer's loss of a training step, for layers that have one. It runs over the keys up to the last query
    # of a block, so over half of all pairs

    def loss_flops(self) -> float:
        """The target, without a gradient, is the absorbed score of every local head, after its query product with the
        key part of kv_b; the indexer makes its scores once more, with a gradient."""
        a, indexer, length = self.attention, self.attention.indexer, self.case.work.length
        pairs = length * (length + 1) / 2
        target = (pairs + length * a.sinks) * a.row_width + length * a.qk_nope_head_dim * a.kv_lora_rank
        own = (indexer.num_heads * indexer.head_dim * a.q_lora_rank
               + (indexer.head_dim + indexer.num_heads) * self.case.plan.hidden_size)
        return self.case.sequences * (2 * self.heads * target + 3 * (2 * length * own + self._index_flops(pairs)))

    def loss_input(self) -> int:
        """Values of a token that the layer hands to it: its input, latent and whole queries, its row."""
        a = self.attention
        return self.case.plan.hidden_size + a.q_lora_rank + self.heads * a.qk_head_dim + a.row_width

    def loss_bytes(self) -> float:
        """Its own scores, as `activations` counts them. Fused: none."""
        pairs = 0 if self.case.work.fused else self.case.work.length ** 2 / 2
        return self.case.sequences * pairs * self.attention.indexer.num_heads * (4 + self.case.width)

    def _index_flops(self, pairs: float) -> float:
        return 2 * pairs * self.attention.indexer.num_heads * (self.attention.indexer.head_dim + 1)


class GroupedCost:
    """The same of grouped-query attention, whose heads are all shared by tensor ranks.

    Attributes:
        keys: rows in memory that a query is multiplied with, without sinks: all that fused attention sees, otherwise
            the capacity.
        pairs: query-key pairs of the scores, sinks included.
    """

    def __init__(self, attention: GroupedQueryAttention, case: Case, calls: Calls):
        a, fused, rows, past = attention, case.work.fused, calls.rows, calls.past
        self.attention, self.case, self.calls, self.heads = a, case, calls, a.num_heads // case.ranks.tensor
        self.groups = a.num_kv_heads // case.ranks.tensor
        self.row = self.groups * (a.head_dim + a.v_head_dim)                    # numbers of a token's keys and values
        self.keys = rows + past if fused else calls.capacity
        self.pairs = (visible_pairs(past, rows, None) if fused else rows * self.keys) + rows * a.sinks

    def rows_through(self, name: str) -> np.ndarray:
        """Rows of each call that pass through one of the layer's matrices."""
        return self.calls.rows

    def flops(self) -> dict[str, float]:
        """Scores and weighted values of all sequences."""
        a = self.attention
        pair = 2 * (a.head_dim + a.v_head_dim)
        return {f"scores_{a.kind}": self.case.sequences * self.heads * self.calls.total(self.pairs) * pair}

    def activations(self) -> dict[str, np.ndarray]:
        """What it computes and its backward reads, bytes [C] of all sequences; `d` and `wide` as in `LatentCost`."""
        a, heads, groups, rows, d = self.attention, self.heads, self.groups, self.calls.rows, self.case.width
        plain = not self.case.work.fused
        wide = 4 * plain
        # Queries and keys: projected and rotated; wide between. Values, and what the heads give. Keys that are normed
        # once more, and the parts of a fused projection.
        of_row = (heads + groups) * (a.head_dim * (2 * d + wide) + a.v_head_dim * d)
        of_row += groups * a.head_dim * (d + wide) * a.key_norm + (heads * a.head_dim + self.row) * d * a.fused
        # Plain: keys and values once more, head by head. Fused: as they lie, but behind sinks, and one width for all.
        copied = self.row if plain else 2 * groups * a.head_dim * (a.sinks > 0)
        found = {"projections": rows * of_row,
                 "keys_values": (self.keys + a.sinks) * copied * d,
                 # Plain: each score in float32 for the softmax, then as a probability. Fused: a float32 sum a query.
                 "scores": heads * (self.pairs * (4 + d) if plain else rows * 4)}
        return {name: self.case.sequences * value for name, value in found.items()}

    def cache_read(self) -> float:
        """Bytes over all calls: keys and values, once for all queries of a call."""
        return self.case.sequences * self.calls.total(self.keys) * self.row * self.case.width

    def copied_values(self) -> int:
        """Of a token, that tensor ranks have alike and go on from with heads of their own: the layer's input."""
        return self.case.plan.hidden_size


COSTS = {LatentAttention: LatentCost, GroupedQueryAttention: GroupedCost}


def visible_pairs(past, rows, reach):
    """Query-key pairs of rows past .. past + rows - 1, each seeing itself and up to `reach` - 1 before it.

    sum over t of min(t + 1, reach) = f(past + rows) - f(past), with f(n) = n(n+1)/2 up to n = reach, and reach for
    every row more.
    """
    def f(n):
        short = n if reach is None else np.minimum(n, reach)
        return short * (short + 1) / 2 + (n - short) * (0 if reach is None else reach)
    return f(past + rows) - f(past)
