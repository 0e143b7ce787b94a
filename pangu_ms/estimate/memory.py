"""Bytes on the busiest device, by component: what stays (weights, states, cache) and what a step needs beside it."""
from collections import defaultdict

import numpy as np

from pangu_ms.checkpoint.names import Parameter
from pangu_ms.config import LayerPlan, PanguConfig
from pangu_ms.estimate.flops import (BLOCK, divided_axis, expert_rows, extent, local_count, muon_rows, state_ranks,
                                     state_shares)
from pangu_ms.estimate.work import Calls, Parallel, Work, decode_calls, held, prefill_calls, train_calls

FLOAT32_COMPONENTS = ("mhc", "merge", "router")  # kept float32 by the network whatever its dtype
STACKED = 2 ** 28     # of `training.optimizer`
STREAMED_ROWS = 1024  # of `ops.cross_entropy`, at once


def parameter_bytes(p: Parameter, parallel: Parallel, work: Work) -> int:
    return local_count(p, parallel) * (4 if p.component in FLOAT32_COMPONENTS else work.width)


def weight_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, int]:
    """Of one device: a slice of each parameter, as `checkpoint.layout` cuts it. `experts` and `other`."""
    found = {"experts": 0, "other": 0}
    for p in held(config):
        found["experts" if p.component == "expert" else "other"] += parameter_bytes(p, parallel, work)
    return found


def optimizer_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """Float32 states: a master copy where the parameter is not float32, one moment for Muon's, two for AdamW's.

    The router's selection bias is moved by counts and has none. Sharded: divided among the ranks that hold the same
    values, `dp` for experts and `dp * ep` for everything else; then float32 parameters have masters as well.
    """
    shares = state_shares(config, parallel, work)
    found = {"masters": 0.0, "muon_moments": 0.0, "adamw_moments": 0.0}
    for p in held(config):
        if p.name.endswith("e_score_correction_bias"):
            continue
        count = 4 * local_count(p, parallel) * shares[p.name]
        exact = work.dtype == "float32" or p.component in FLOAT32_COMPONENTS
        if not exact or state_ranks(p, parallel, work) > 1:
            found["masters"] += count
        muon = muon_rows(p, config) is not None
        found["muon_moments" if muon else "adamw_moments"] += count * (1 if muon else 2)
    return found


def optimizer_work_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> float:
    """Three float32 copies while Muon orthogonalises: the update, its powers' sum, their product.

    Equal parameters are stacked and treated at once, up to STACKED values. Ranks that divide the states stack the
    gradients of all, and keep their share of that.
    """
    groups = defaultdict(list)
    for p in held(config):
        rows = muon_rows(p, config)
        if rows is not None:
            groups[p.shape, rows, divided_axis(p)].append(p)
    largest = 0.0
    for p, *others in groups.values():
        ranks, size = state_ranks(p, parallel, work), local_count(p, parallel)
        at_once = min(1 + len(others), max(1, STACKED // (ranks * size)) * ranks)
        largest = max(largest, 12 * -(-at_once // ranks) * size + work.width * at_once * size * (ranks > 1))
    return largest


def cache_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> int:
    """`pangu_ms.cache.cache_bytes` of the device's sequences. Latent rows serve all heads, so that every tensor rank
    holds them whole; of the o taps it holds its heads' share.
    The engine rounds `length` up to 256 times a power of two."""
    row, taps = config.kv_lora_rank + config.qk_rope_head_dim, config.router_sliding_window - 1
    heads = config.num_attention_heads // parallel.tensor
    total = 0
    for plan in config.layers:
        total += (work.length if plan.window is None else plan.window) * row
        total += work.length * config.index_head_dim * (plan.kind == "dsa")
        total += taps * (config.q_lora_rank + config.kv_lora_rank + heads * config.v_head_dim)
    return work.sequences(parallel) * total * work.width


def layer_activations(config: PanguConfig, parallel: Parallel, work: Work, plan: LayerPlan,
                      calls: Calls) -> dict[str, np.ndarray]:
    """What a layer computes and its backward reads, bytes [C] for each call, by part.

    Fused: the inputs of each product and norm in the model's dtype, the experts' matrices transposed, and where DSA
    selects for many rows the cache in two parts. Plain: beside the inputs the float32 copies that the plain forms make,
    the scores [heads, keys] of each query (float32 for the softmax, once more in the model's dtype), the indexer's
    scores of each of its heads, and one copy of an expert's three matrices for each block of rows, or when decoding,
    fused as well, for each (token, choice) pair.
    """
    c, d, plain = config, work.width, not work.fused
    sequences = work.sequences(parallel)
    tokens, reach = sequences * calls.rows, extent(config, plan, calls, work.fused)
    heads, hidden = c.num_attention_heads // parallel.tensor, c.hidden_size
    row, wide = c.kv_lora_rank + c.qk_rope_head_dim, 4 * plain  # a float32 copy, where the form makes one
    qk, nope_v = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
    found = {}
    if plan.mtp_depth:
        found["streams"] = tokens * hidden * (4 * d + 2 * wide)         # both inputs of eh_proj, and two residuals
    else:                                                               # flattened, normed and mixed in float32
        found["streams"] = tokens * c.mhc_num_stream * hidden * 2 * (d + 3 * wide)
    found["norms"] = tokens * hidden * 4 * (2 * d + wide)
    found["projections"] = tokens * ((c.q_lora_rank + row) * (3 * d + 2 * wide)
                                     + heads * (qk * (2 * d + wide) + c.v_head_dim * (2 * d + wide)))
    found["keys_values"] = sequences * reach.kv_b_rows * np.where(reach.absorbed, row, nope_v) * heads * d
    scores = heads * reach.pairs * (4 + d) if plain else heads * calls.rows * 4
    found["scores"] = sequences * scores
    if plan.kind == "dsa":
        queries = reach.index_rows * c.index_n_heads * c.index_head_dim * 2 * d
        scored = reach.index_pairs * (c.index_n_heads * (4 + d) + 4) if plain else reach.index_rows * c.index_topk * 4
        gathered = 2 * reach.index_rows * c.index_topk * row * d * (plain and calls.cached)
        found["indexer"] = sequences * (queries + scored + gathered)
        if calls.cached and not (plain or calls.decode):
            found["split_cache"] = sequences * reach.selects * calls.capacity * row * d
    if plan.moe:
        width, shared = c.moe_intermediate_size // parallel.tensor, c.n_shared_experts
        rows = expert_rows(c, parallel, work, calls)
        found["experts"] = rows * (2 * hidden * d + width * (3 * d + 2 * wide) + hidden * wide)
        transposed = np.full_like(rows, c.n_routed_experts // parallel.expert)
        copies = rows if calls.decode else rows / BLOCK if plain else transposed
        found["expert_copies"] = copies * 3 * hidden * width * d
        found["shared_and_router"] = tokens * (shared * width * (3 * d + 2 * wide) + 3 * 4 * c.n_routed_experts)
        if parallel.expert > 1 and work.phase == "train":               # all tokens of the copy, and their sums
            found["gathered_tokens"] = work.group_sequences(parallel) * calls.rows * hidden * 2 * d
    else:
        found["dense_mlp"] = tokens * c.intermediate_size // parallel.tensor * (3 * d + 2 * wide)
    return found


def train_activations(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, float]:
    """Kept from forward to backward.

    Without recompute: all of every layer. With it: each layer's input (streams, or the hidden rows of an MTP layer)
    and what a DSA layer hands to the indexer's loss, and all of one layer, the largest. In both the gradient of the
    largest single part. Without recompute the indexer's loss keeps its own scores, over half of all pairs.
    """
    calls, tokens = train_calls(work), work.sequences(parallel) * work.length
    layers = [{name: calls.total(value) for name, value in
               layer_activations(config, parallel, work, plan, calls).items()} for plan in config.layers]
    found: dict[str, float] = defaultdict(float)
    largest = max(layers, key=lambda parts: sum(parts.values()))
    for parts in [largest] if work.recompute else layers:
        for name, value in parts.items():
            found[name] += value
    found["gradient_of_largest"] = max(value for parts in layers for value in parts.values())
    heads = config.num_attention_heads // parallel.tensor
    qk, row = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    handed = config.hidden_size + config.q_lora_rank + heads * qk + row
    loss = work.sequences(parallel) * work.length ** 2 / 2 * config.index_n_heads * (4 + work.width) * (not work.fused)
    count = len(config.dsa_layers)
    if work.recompute:
        inputs = sum(config.hidden_size * (1 if plan.mtp_depth else config.mhc_num_stream) for plan in config.layers)
        found["layer_inputs"] = tokens * work.width * (inputs + count * handed)
    found["indexer_loss"] = loss * (min(count, 1) if work.recompute else count)
    return dict(found)


def train_logits_bytes(config: PanguConfig, parallel: Parallel, work: Work) -> float:
    """The head's output, once for the trunk and once for each MTP depth.

    Plain: the exponentials in float32 stay for the backward of each, and one set of logits, shifted logits and their
    gradient is being worked on. Fused, and where tensor ranks share the vocabulary: a piece at a time, of which logits,
    shares and gradient are there and nothing stays, and the float32 gradient of the head, to which it is added.
    """
    vocab = config.vocab_size // parallel.tensor
    tokens = work.sequences(parallel) * work.length
    if work.fused or parallel.tensor > 1:
        return min(tokens, STREAMED_ROWS) * vocab * (2 * work.width + 12) + 4 * vocab * config.hidden_size
    return tokens * vocab * (4 * (1 + config.num_nextn_predict_layers) + work.width + 8)


def train_memory(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, dict[str, float]]:
    """Component -> part -> bytes. Gradients have the parameters' dtype (accumulating them takes as much again).

    Activations, logits and the optimizer's work are not there at the same time, but the graph's memory is planned
    once: the larger of (activations + logits) and the optimizer's work counts.
    """
    weights = weight_bytes(config, parallel, work)
    activations = train_activations(config, parallel, work) | {"logits": train_logits_bytes(config, parallel, work)}
    updating = optimizer_work_bytes(config, parallel, work)
    larger = updating > sum(activations.values())
    return {"weights": weights, "gradients": {name: float(value) for name, value in weights.items()},
            "optimizer": optimizer_bytes(config, parallel, work),
            **({"optimizer_work": {"newton_schulz": updating}} if larger else {"activations": activations})}


def infer_memory(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, dict[str, float]]:
    """Component -> part -> bytes. One layer's intermediate results at once, of the largest call of either kind."""
    def peak(calls: Calls) -> dict[str, float]:
        def largest(plan):
            parts = layer_activations(config, parallel, work, plan, calls)
            at = int(np.argmax(sum(parts.values())))
            return {name: float(value[at]) for name, value in parts.items()}
        distinct = {(plan.kind, plan.window, plan.moe, plan.mtp_depth > 0): plan for plan in config.layers}
        return max(map(largest, distinct.values()), key=lambda parts: sum(parts.values()))
    layer = max((peak(prefill_calls(config, parallel, work)), peak(decode_calls(work))),
                key=lambda parts: sum(parts.values()))
    logits = work.sequences(parallel) * config.vocab_size * (4 + work.width)
    return {"weights": weight_bytes(config, parallel, work), "cache": {"cache": cache_bytes(config, parallel, work)},
            "one_layer": layer, "logits": {"logits": logits}}


def memory(config: PanguConfig, parallel: Parallel, work: Work) -> dict[str, dict[str, float]]:
    return (train_memory if work.phase == "train" else infer_memory)(config, parallel, work)


def total(parts: dict[str, dict[str, float]]) -> float:
    return float(sum(sum(inner.values()) for inner in parts.values()))
