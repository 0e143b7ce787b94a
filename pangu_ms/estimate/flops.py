"""Floating-point operations by component, two for each multiply-add of a product.

Products and the short convolutions are counted; norms, softmax, Sinkhorn and other elementwise work are not: memory
bandwidth decides their time. Everything is the share of the busiest device; with `Parallel()` it is the whole model.
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pangu_ms.checkpoint.names import Parameter
from pangu_ms.config import LayerPlan, PanguConfig
from pangu_ms.estimate.work import Calls, Parallel, Work, held, local_shape

BLOCK = 64  # rows of one expert's block in the plain form
FLOAT32 = ("mhc", "router")  # components whose products are float32 whatever the model's dtype
NEWTON_SCHULZ_STEPS = 5


def local_count(p: Parameter, parallel: Parallel) -> int:
    """Values of a parameter on one device: all ranks have equally many."""
    return math.prod(local_shape(p, parallel))


def visible_pairs(past, rows, reach):
    """Query-key pairs of rows past .. past + rows - 1, each seeing itself and up to `reach` - 1 before it.

    sum over t of min(t + 1, reach) = f(past + rows) - f(past), with f(n) = n(n+1)/2 up to n = reach, and reach for
    every row more.
    """
    def f(n):
        short = n if reach is None else np.minimum(n, reach)
        return short * (short + 1) / 2 + (n - short) * (0 if reach is None else reach)
    return f(past + rows) - f(past)


@dataclass(frozen=True)
class Extent:
    """How far one layer's attention reaches, for each call of one sequence (arrays [C]).

    absorbed: the form. Expanded attention multiplies each key row by kv_b; absorbed attention moves that product to
    each query, and is used for decoding and where DSA gathers rows. selects: whether the indexer runs. keys: rows in
    memory that a query is multiplied with, without sinks. pairs: query-key pairs of the score, sinks included.
    """

    absorbed: np.ndarray
    selects: np.ndarray
    keys: np.ndarray
    pairs: np.ndarray
    kv_b_rows: np.ndarray
    index_pairs: np.ndarray
    index_rows: np.ndarray      # queries of the indexer
    index_key_rows: np.ndarray  # keys it makes: for the cache even where nothing is selected yet


def extent(config: PanguConfig, plan: LayerPlan, calls: Calls, fused: bool) -> Extent:
    """Fused: visible pairs alone. Plain: each query by every key that is there, masked: all rows without a cache,
    window + new rows for a ring (in decoding the new ones are in the ring already), the capacity for growing tensors,
    index_topk rows where DSA selects in a cache.
    """
    rows, past, sinks, dsa = calls.rows, calls.past, config.param_sink_number, plan.kind == "dsa"
    reach = config.index_topk if dsa else plan.window
    selects = (past + rows > config.index_topk) & dsa
    absorbed = (selects & (fused or calls.cached)) | calls.decode
    if fused:
        keys = rows + (past if plan.window is None else np.minimum(past, plan.window - 1))
        keys = np.where(selects, np.minimum(config.index_topk, keys), keys)
        pairs, index_pairs = visible_pairs(past, rows, reach), visible_pairs(past, rows, None)
    else:
        keys = rows
        if calls.cached:
            keys = calls.capacity if plan.window is None else plan.window + rows * (not calls.decode)
            keys = np.where(selects, np.minimum(config.index_topk, keys), keys)
        pairs, index_pairs = rows * keys, rows * (calls.capacity if calls.cached else rows)
    return Extent(absorbed, selects, keys, pairs + rows * sinks, np.where(absorbed, rows, keys + sinks),
                  index_pairs * selects, rows * selects, rows * (dsa & (selects | calls.cached)))


def score_flops(config: PanguConfig, reach: Extent, calls: Calls, heads: int, fused: bool) -> float:
    """Scores and weighted values. Expanded: 2 * (nope + rope) + 2 * value for each pair and head. Absorbed: the same
    over latent rows; the plain form multiplies the rotary part of the rows into the output too, and drops it."""
    row = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = 2 * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    absorbed = 2 * (row + (config.kv_lora_rank if fused else row))
    return heads * calls.total(reach.pairs * np.where(reach.absorbed, absorbed, expanded))


def expert_rows(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> np.ndarray:
    """Rows of each call through the experts of one device in one layer, if they are loaded evenly.

    The plain form fills blocks of 64 rows with one expert each and computes one more block for each expert.
    """
    pairs = work.group_sequences(parallel) * calls.rows * config.num_experts_per_tok / parallel.expert
    if not work.fused and not calls.decode:
        pairs = BLOCK * (np.ceil(pairs / BLOCK) + config.n_routed_experts // parallel.expert)
    return pairs


def forward_flops(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> dict[str, float]:
    """One forward of the busiest device's sequences, by component; `mtp` holds all of the MTP layers and their heads.

    Every matrix takes 2 * (values on this device) for each row that passes through it. Experts see the tokens of the
    whole copy of the model, and of those one expert rank's share.
    """
    sequences = work.sequences(parallel)
    found: dict[str, float] = defaultdict(float)
    extents = {plan.index: extent(config, plan, calls, work.fused) for plan in config.layers}
    for p in held(config):
        component = _component(p)
        if component is None:
            continue
        count, rows = 2 * local_count(p, parallel), sequences * calls.tokens
        reach = extents[p.plan.index] if p.plan else None
        if component == "expert":
            count //= config.n_routed_experts // parallel.expert
            rows = calls.total(expert_rows(config, parallel, work, calls))
        elif component == "head":
            rows = sequences * calls.total(calls.logits)
            found["mtp"] += count * rows * config.num_nextn_predict_layers * (not calls.cached or calls.decode)
        elif component == "indexer":
            key = p.name.endswith("indexer.wk.weight")
            rows = sequences * calls.total(reach.index_key_rows if key else reach.index_rows)
        elif p.name.endswith("kv_b_proj.weight"):
            rows = sequences * calls.total(reach.kv_b_rows)
        found["mtp" if p.plan and p.plan.mtp_depth else component] += count * rows
    for plan in config.layers:
        reach = extents[plan.index]
        name = "mtp" if plan.mtp_depth else f"scores_{plan.kind}"
        heads = config.num_attention_heads // parallel.tensor
        found[name] += sequences * score_flops(config, reach, calls, heads, work.fused)
        if plan.kind == "dsa":
            index_pairs = sequences * calls.total(reach.index_pairs)
            found["indexer"] += 2 * index_pairs * config.index_n_heads * (config.index_head_dim + 1)
        if not plan.mtp_depth:  # reading a sublayer's input off the streams, and mixing them, around both sublayers
            n = config.mhc_num_stream
            found["mhc"] += 2 * sequences * calls.tokens * 2 * config.hidden_size * (n + n * n)
    found["mhc"] += sequences * calls.tokens * 2 * config.hidden_size * config.mhc_num_stream       # the merge
    return dict(found)


def _component(p: Parameter) -> str | None:
    """The component whose product reads this parameter; None for what is no matrix."""
    if p.component == "convolution":
        return "convolution"
    if len(p.shape) < 2 or p.component in ("embedding", "sink"):
        return None
    return {"merge": "mhc", "mtp_input": "mtp"}.get(p.component, p.component)


def indexer_loss_flops(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """The indexer's loss of a training step: `target` (no gradient) and `indexer` (with one), for all DSA layers.

    Both run over the keys up to the last query of a block, so over half of all pairs. The target is the absorbed score
    of every local head, after its query product with the key part of kv_b; the indexer makes its scores once more.
    """
    layers, sequences = len(config.dsa_layers), work.sequences(parallel)
    pairs = work.length * (work.length + 1) / 2 + work.length * config.param_sink_number
    heads = config.num_attention_heads // parallel.tensor
    row = config.kv_lora_rank + config.qk_rope_head_dim
    query = work.length * config.qk_nope_head_dim * config.kv_lora_rank
    own = (config.index_n_heads * config.index_head_dim * config.q_lora_rank
           + (config.index_head_dim + config.index_n_heads) * config.hidden_size)
    index_pairs = work.length * (work.length + 1) / 2 * config.index_n_heads * (config.index_head_dim + 1)
    return {"target": layers * sequences * 2 * heads * (pairs * row + query),
            "indexer": layers * sequences * 2 * (work.length * own + index_pairs)}


def train_flops(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> dict[str, float]:
    """Forward and backward. Each product has two more in the backward; recompute does the layers' forward again."""
    forward = forward_flops(config, parallel, work, calls)
    found = {name: value * (4 if work.recompute and name != "head" else 3) for name, value in forward.items()}
    if config.dsa_layers:
        loss = indexer_loss_flops(config, parallel, work)
        found["indexer_loss"] = loss["target"] + 3 * loss["indexer"]
    return found


def muon_rows(p: Parameter, config: PanguConfig) -> tuple[int, ...] | None:
    """Rows of the matrices that Muon sees in one parameter, or in one expert; None where AdamW updates it."""
    if p.component in ("embedding", "head", "router", "mhc", "merge", "sink", "convolution") or len(p.shape) < 2:
        return None
    heads = config.num_attention_heads
    kind = p.name.split(".")[-2]
    if kind == "q_b_proj":
        return heads * config.qk_nope_head_dim, heads * config.qk_rope_head_dim
    if kind == "kv_a_proj_with_mqa":
        return config.kv_lora_rank, config.qk_rope_head_dim
    if kind == "kv_b_proj":
        return heads * config.qk_nope_head_dim, heads * config.v_head_dim
    return (p.rows,)


def optimizer_flops(config: PanguConfig, parallel: Parallel, work: Work) -> float:
    """Muon's Newton-Schulz steps on this device, all float32.

    A step on a matrix with sides m <= n takes XX^T (2m^2 n), its square (2m^3) and the product with X (2m^2 n). Tensor
    ranks, and with divided states the ranks that hold the same, have their share of the matrices, as whole matrices.
    """
    total, shares = 0.0, state_shares(config, parallel, work)
    for p in held(config):
        rows = muon_rows(p, config)
        if rows is None:
            continue
        matrices = local_shape(p, parallel)[0] * shares[p.name] / (parallel.tensor if divided_axis(p) else 1)
        for part in rows:
            m, n = sorted((part, p.columns))
            total += matrices * NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m ** 3)
    return total


def divided_axis(p: Parameter) -> str | None:
    """Along which tensor ranks divide a matrix, if they do."""
    return next((split.axis for split in p.splits if split.over == "tensor"), None)


def state_ranks(p: Parameter, parallel: Parallel, work: Work) -> int:
    """How many ranks divide the optimizer states of a parameter: those that hold the same values, if any do."""
    return (parallel.data if p.component == "expert" else parallel.replicas) if work.shard_optimizer else 1


def state_shares(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """Name -> how much of a parameter's optimizer states the busiest device keeps, of what it holds of the parameter.

    Ranks that divide them take equally many of equal matrices, and of all else equally many values, as
    `training.divided` does.
    """
    shares, groups = {}, defaultdict(list)
    for p in held(config):
        ranks, rows = state_ranks(p, parallel, work), muon_rows(p, config)
        if rows is None:
            shares[p.name] = 1 / ranks
        else:
            matrices = local_shape(p, parallel)[0]
            groups[ranks, matrices, p.shape, rows, divided_axis(p)].append(p.name)
    for (ranks, matrices, *_), names in groups.items():
        count = len(names) * matrices
        shares |= dict.fromkeys(names, -(-count // ranks) / count)
    return shares
