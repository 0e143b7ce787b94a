"""Bytes that the busiest device moves: in its own memory, and to others through collectives."""
import numpy as np

from pangu_ms.config import PanguConfig
from pangu_ms.estimate.flops import BLOCK, divided_axis, expert_rows, extent, local_count, muon_rows, state_shares
from pangu_ms.estimate.memory import (layer_activations, optimizer_bytes, parameter_bytes, total,
                                      train_logits_bytes, weight_bytes)
from pangu_ms.estimate.work import Calls, Parallel, Work, held


def weights_read(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> float:
    """Over all calls: every weight once a call, but of the embedding only rows (not counted), and of the experts some.

    Fused: the experts that some token of the call goes to, E_local * (1 - (1 - K/E)^tokens) if each goes evenly, after
    all of them have been transposed. Plain, and when decoding: one copy for each block of rows, or when decoding for
    each pair, which is read, written and read again.
    """
    used = [p for p in held(config) if p.component != "embedding"
            and (work.phase == "train" or p.plan is None or not p.plan.mtp_depth)]
    always = sum(parameter_bytes(p, parallel, work) for p in used if p.component != "expert")
    local = config.n_routed_experts // parallel.expert
    one_each = sum(parameter_bytes(p, parallel, work) for p in used if p.component == "expert") / local
    if work.fused and not calls.decode:
        tokens = work.group_sequences(parallel) * calls.rows
        touched = local * (2 + 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens)
    else:
        rows = expert_rows(config, parallel, work, calls)
        touched = 3 * (rows if calls.decode else rows / BLOCK)
    return calls.total(always + one_each * touched)


def cache_read(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> float:
    """Over all calls of the trunk: latent rows that the scores are made with, and for DSA every indexer key.

    Where DSA selects, each query gathers rows of its own. Other calls read the keys once for all their queries.
    """
    row = config.kv_lora_rank + config.qk_rope_head_dim
    values = 0.0
    for plan in config.layers[:config.num_hidden_layers]:
        reach = extent(config, plan, calls, work.fused)
        values += calls.total(np.where(reach.selects, calls.rows, 1) * reach.keys) * row
        ends = calls.past + calls.rows if work.fused else calls.capacity
        values += calls.total(ends * reach.selects) * config.index_head_dim
    return work.sequences(parallel) * values * work.width


def activations_moved(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> float:
    """Everything in `layer_activations` written once and read once, over all calls and layers."""
    plans = config.layers if work.phase == "train" else config.layers[:config.num_hidden_layers]
    return sum(2 * calls.total(value) for plan in plans for name, value in
               layer_activations(config, parallel, work, plan, calls).items() if name != "expert_copies")


def infer_bytes(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> dict[str, float]:
    """Memory traffic of the calls, without drafting."""
    return {"weights": weights_read(config, parallel, work, calls),
            "cache": cache_read(config, parallel, work, calls),
            "activations": activations_moved(config, parallel, work, calls)}


def train_bytes(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> dict[str, float]:
    """Memory traffic of forward and backward: weights and activations go by once more for each gradient, and once
    more with recompute; gradients are written once."""
    passes = 4 if work.recompute else 3
    return {"weights": passes * weights_read(config, parallel, work, calls),
            "activations": passes * activations_moved(config, parallel, work, calls),
            "logits": 2 * train_logits_bytes(config, parallel, work),
            "gradients": float(sum(weight_bytes(config, parallel, work).values()))}


def update_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """Memory traffic of the optimizer: states are read and written, gradients read twice (norm, update), weights
    written. Newton-Schulz products are counted as operations alone."""
    weights = float(sum(weight_bytes(config, parallel, work).values()))
    return {"states": 2 * total({"": optimizer_bytes(config, parallel, work)}), "gradients_and_weights": 3 * weights}


def ring(ranks: int) -> float:
    """What each rank sends of a tensor of 1 byte that ranks gather, or scatter sums of; summing for all is twice it."""
    return (ranks - 1) / ranks


def collective_bytes(config: PanguConfig, parallel: Parallel, work: Work, calls: Calls) -> dict[str, float]:
    """What one device sends, by group: `tensor`, `expert`, `data`.

    tensor: a sum over ranks of [tokens, H] after each attention and each MLP, and after the embedding; the head's
    logits are gathered (inference) or stay apart, two float32 a token being summed for the cross entropy (training).
    The backward sums the gradients of what each column-cut projection read: the latents of the query and of the rows,
    the MLP's input, the head's input. Recompute sums the forward's again.

    expert: each MoE layer gathers the tokens of all expert ranks with their choices (id and weight, 8 bytes each), and
    scatters the sums of the experts' outputs. The backward does the same the other way. In inference all have the
    same tokens, and the outputs are summed.

    data: gradients are summed over the ranks that hold the same values: `dp` for experts, `dp * ep` for all else.
    """
    c, train = config, work.phase == "train"
    plans = c.layers if train else c.layers[:c.num_hidden_layers]
    tokens, hidden = work.sequences(parallel) * calls.tokens, c.hidden_size * work.width
    forward = tokens * hidden * (2 * len(plans) + 1)
    if train:
        latents = (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim) * work.width
        heads = 1 + c.num_nextn_predict_layers
        backward = tokens * (len(plans) * (latents + hidden) + heads * hidden)
        summed = forward * (2 if work.recompute else 1) + backward + heads * tokens * 8
        sent = 2 * ring(parallel.tensor) * summed
    else:
        logits = work.sequences(parallel) * calls.total(calls.logits) * c.vocab_size * work.width
        sent = ring(parallel.tensor) * (2 * forward + logits)
    moe = sum(plan.moe for plan in plans)
    group = work.group_sequences(parallel) * calls.tokens
    layer = group * (2 * hidden + 8 * c.num_experts_per_tok * train)
    expert = ring(parallel.expert) * moe * layer * ((3 if work.recompute else 2) if train else 1)
    data = 0.0
    if train:
        weights = weight_bytes(c, parallel, work)
        data = 2 * (ring(parallel.data) * weights["experts"] + ring(parallel.replicas) * weights["other"])
    return {"tensor": sent, "expert": expert, "data": data}


def update_collective_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """What one device sends for the optimizer, by group.

    tensor: the parts of Muon's updates, float32, are exchanged for whole matrices, and back.
    data: with a sharded optimizer, parameters are gathered by those that hold the same.
    """
    shares, weights = state_shares(config, parallel, work), weight_bytes(config, parallel, work)
    updates = sum(4 * local_count(p, parallel) * shares[p.name] for p in held(config)
                  if divided_axis(p) and muon_rows(p, config))
    gathered = ring(parallel.data) * weights["experts"] + ring(parallel.replicas) * weights["other"]
    return {"tensor": 2 * ring(parallel.tensor) * updates, "data": gathered if work.shard_optimizer else 0.0}
