"""Bytes on one rank, by component: what stays (weights, states, cache) and what a step needs beside it."""
from collections import defaultdict

import numpy as np

from pangu_ms.cache.sizes import cache_bytes
from pangu_ms.estimate import optimizer
from pangu_ms.estimate.attention import attention_cost
from pangu_ms.estimate.flops import expert_rows
from pangu_ms.estimate.work import Calls, Case, calls_of
from pangu_ms.model import pieces
from pangu_ms.model.plan import Layer


def memory(case: Case) -> dict[str, dict[str, float]]:
    """Component -> part -> bytes.

    Training: gradients have the parameters' dtype (accumulating them takes as much again). Activations, logits and the
    optimizer's work are not there at the same time, but the graph's memory is planned once: the larger of (activations
    + logits) and the optimizer's work counts. Inference: one layer's intermediate results at once, of the largest call.
    """
    weights = weight_bytes(case)
    if case.train:
        step, updating = train_activations(case) | {"logits": train_logits_bytes(case)}, optimizer.work_bytes(case)
        larger = updating > sum(step.values())
        return {"weights": weights, "gradients": {name: float(value) for name, value in weights.items()},
                "optimizer": optimizer.state_bytes(case),
                **({"optimizer_work": {"newton_schulz": updating}} if larger else {"activations": step})}
    peaks = (largest_call(layer_activations(layer, case, calls))
             for calls in calls_of(case).values() for layer in case.layers)
    cache = cache_bytes(case.plan, case.work.length, case.sequences, tensor=case.ranks.tensor)["total"]
    return {"weights": weights, "cache": {"cache": cache}, "one_layer": max(peaks, key=lambda each: sum(each.values())),
            "logits": {"logits": case.sequences * case.plan.vocab_size * (4 + case.width)}}


def total(parts: dict[str, dict[str, float]]) -> float:
    return float(sum(sum(inner.values()) for inner in parts.values()))


def weight_bytes(case: Case) -> dict[str, int]:
    experts = sum(size for name, size in case.bytes.items() if case.tensors[name].component == "expert")
    return {"experts": experts, "other": sum(case.bytes.values()) - experts}


def largest_call(parts: dict[str, np.ndarray]) -> dict[str, float]:
    at = int(np.argmax(sum(parts.values())))
    return {name: float(value[at]) for name, value in parts.items()}


def layer_activations(layer: Layer, case: Case, calls: Calls) -> dict[str, np.ndarray]:
    """What a layer computes and its backward reads, bytes [C] for each call, by part.

    `d` is a value of the model's dtype, `wide` its copy in float32, which only the plain forms make.
    """
    d, plain, hidden, ranks = case.width, not case.work.fused, case.plan.hidden_size, case.ranks
    tokens, wide = case.sequences * calls.rows, 4 * plain
    inner = 3 * d + 2 * wide                # of SwiGLU's width: gate, up and their product; gate and up wide
    found = {}
    if layer.residual:                      # for each sublayer the streams; wide to be normed, normed, and to be mixed
        found["streams"] = tokens * layer.residual.streams * hidden * 2 * (d + 3 * wide)
    else:                                   # two residuals; of an MTP layer two normed inputs, wide before their norms
        found["streams"] = tokens * hidden * 2 * (d + (d + wide) * (layer.mtp_depth > 0))
    norms = 4 if layer.sandwich else 2                          # each in and out; wide between
    found["norms"] = tokens * hidden * norms * (2 * d + wide)
    found |= attention_cost(layer.attention, case, calls).activations()
    if not layer.moe:
        return found | {"dense_mlp": tokens * layer.feed_forward.intermediate_size // ranks.tensor * inner}
    moe, rows = layer.feed_forward, expert_rows(layer.feed_forward, case, calls)
    width, shared = moe.intermediate_size // ranks.tensor, moe.shared_intermediate_size // ranks.tensor
    # Rows in and out, and out once more wide, for their weighted sum.
    found["experts"] = rows * (hidden * (2 * d + wide) + width * inner)
    # The matrices of an expert: gathered for each row or block of rows; fused, those of all are transposed.
    copies = rows if calls.decode else rows / pieces.BLOCK if plain else moe.num_experts // ranks.expert
    found["expert_copies"] = np.broadcast_to(copies * 3 * hidden * width * d, rows.shape)
    # The router's logits, scores and biased scores are float32.
    found["shared_and_router"] = tokens * (shared * inner + 3 * 4 * moe.num_experts)
    if ranks.expert > 1 and case.train:                                         # all tokens of the copy, and their sums
        found["gathered_tokens"] = case.group_sequences * calls.rows * hidden * 2 * d
    return found


def train_activations(case: Case) -> dict[str, float]:
    """Kept from forward to backward.

    Without recompute: all of every layer, and the scores of every indexer's loss. With it: each layer's input (streams,
    or the hidden rows of a plain residual) and what it hands to the indexer's loss, and all of one layer, the largest,
    and one loss. In both the gradient of the largest single part.
    """
    calls, again, found = calls_of(case)["step"], case.work.recompute, defaultdict(float)
    layers = [({name: calls.total(value) for name, value in layer_activations(layer, case, calls).items()}, count)
              for layer, count in case.layers.items()]
    largest, _ = max(layers, key=lambda parts: sum(parts[0].values()))
    for parts, count in [(largest, 1)] if again else layers:
        for name, value in parts.items():
            found[name] += count * value
    found["gradient_of_largest"] = max(value for parts, _ in layers for value in parts.values())
    inputs = 0
    for layer, count in case.layers.items():
        inputs += count * (layer.residual.streams if layer.residual else 1) * case.plan.hidden_size
        if layer.attention.indexer:
            cost = attention_cost(layer.attention, case, calls)
            inputs += count * cost.loss_input()
            loss = cost.loss_bytes()
            found["indexer_loss"] = max(found["indexer_loss"], loss) if again else found["indexer_loss"] + count * loss
    if again:
        found["layer_inputs"] = case.sequences * calls.tokens * case.width * inputs
    return dict(found)


def train_logits_bytes(case: Case) -> float:
    """The head's output, once for the trunk and once for each MTP depth.

    Plain: the exponentials in float32 stay for the backward of each, and one set of logits, shifted logits and their
    gradient is being worked on. Fused, and where tensor ranks share the vocabulary: a piece at a time, of which logits,
    shares and gradient are there and nothing stays, and the float32 gradient of the head, to which it is added.
    """
    vocab, tokens = case.plan.vocab_size // case.ranks.tensor, case.sequences * case.work.length
    if case.work.fused or case.ranks.tensor > 1:
        return min(tokens, pieces.ROWS) * vocab * (2 * case.width + 12) + 4 * vocab * case.plan.hidden_size
    return tokens * vocab * (4 * (1 + len(case.plan.mtp_layers)) + case.width + 8)
