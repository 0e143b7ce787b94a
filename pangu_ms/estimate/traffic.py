"""Bytes that one rank moves: in its own memory, and to others through collectives."""
from pangu_ms.estimate import optimizer
from pangu_ms.estimate.attention import attention_cost
from pangu_ms.estimate.flops import expert_rows
from pangu_ms.estimate.memory import layer_activations, train_logits_bytes, weight_bytes
from pangu_ms.estimate.work import Calls, Case
from pangu_ms.model import pieces
from pangu_ms.training.optimizer.groups import holders_of


def moved_bytes(case: Case, calls: Calls) -> dict[str, float]:
    """In the rank's own memory, without drafting.

    Activations are written once and read once. Training: weights and activations go by once more for each gradient, and
    once more with recompute; gradients are written once.
    """
    layers = [(layer, count) for layer, count in case.layers.items() if case.train or layer.mtp_depth == 0]
    activations = sum(2 * count * calls.total(value) for layer, count in layers
                      for name, value in layer_activations(layer, case, calls).items() if name != "expert_copies")
    if not case.train:
        cache = sum(count * attention_cost(layer.attention, case, calls).cache_read() for layer, count in layers)
        return {"weights": weights_read(case, calls), "cache": cache, "activations": activations}
    passes = 4 if case.work.recompute else 3
    return {"weights": passes * weights_read(case, calls), "activations": passes * activations,
            "logits": 2 * train_logits_bytes(case), "gradients": float(sum(weight_bytes(case).values()))}


def weights_read(case: Case, calls: Calls) -> float:
    """Over all calls: every weight once a call, but of the embedding only rows (not counted) unless it is the head
    too, and of the experts some.

    Fused: the experts that some token of the call goes to, E_local * (1 - (1 - K/E)^tokens) if each goes evenly, after
    all of them have been transposed. Plain, and when decoding: one copy for each block of rows, or when decoding for
    each pair, which is read, written and read again.
    """
    def experts(moe):                                                           # in one call of one layer
        if case.work.fused and not calls.decode:
            missed = (1 - moe.experts_per_token / moe.num_experts) ** (case.group_sequences * calls.rows)
            return moe.num_experts // case.ranks.expert * (2 + 1 - missed)
        return 3 * expert_rows(moe, case, calls) / (1 if calls.decode else pieces.BLOCK)

    times = {layer.feed_forward: calls.total(experts(layer.feed_forward)) / (layer.feed_forward.num_experts
                                                                            // case.ranks.expert)
             for layer in case.layers if layer.moe}
    rows_alone = () if case.plan.tied_head else ("embedding",)
    return sum(case.bytes[name] * (times[p.layer.feed_forward] if p.component == "expert" else calls.total(1))
               for name, p in case.tensors.items()
               if p.component not in rows_alone and (case.train or p.layer is None or p.layer.mtp_depth == 0))


def update_bytes(case: Case) -> dict[str, float]:
    """Memory traffic of the optimizer: states are read and written, gradients read twice (norm, update), weights
    written. Newton-Schulz products are counted as operations alone."""
    return {"states": 2 * sum(optimizer.state_bytes(case).values()),
            "gradients_and_weights": 3.0 * sum(weight_bytes(case).values())}


def ring(ranks: int) -> float:
    """What each rank sends of a tensor of 1 byte that ranks gather, or scatter sums of; summing for all is twice it."""
    return (ranks - 1) / ranks


def sent_bytes(case: Case, calls: Calls) -> dict[str, float]:
    """What one rank sends, by group: `tensor`, `expert`, `data`.

    tensor: a sum over ranks of [tokens, H] after each attention and each MLP, and after the embedding; the head's
    logits are gathered (inference) or stay apart, two float32 a token being summed for the cross entropy (training).
    The backward sums the gradients of what each column-cut projection read: the latents of the query and of the rows,
    the MLP's input, the head's input. Recompute sums the forward's again.

    expert: each MoE layer gathers the tokens of all expert ranks with their choices (id and weight, 8 bytes each), and
    scatters the sums of the experts' outputs. The backward does the same the other way. In inference all have the
    same tokens, and the outputs are summed.

    data: gradients are summed over the ranks that hold the same values.
    """
    plan, ranks, train, forwards = case.plan, case.ranks, case.train, 2 if case.work.recompute else 1
    layers = plan.layers if train else plan.trunk
    tokens, hidden = case.sequences * calls.tokens, plan.hidden_size * case.width
    forward = tokens * hidden * (2 * len(layers) + 1)
    if train:
        heads = 1 + len(plan.mtp_layers)
        copied = sum(attention_cost(layer.attention, case, calls).copied_values() for layer in layers) * case.width
        backward = tokens * (copied + (len(layers) + heads) * hidden)
        tensor = 2 * ring(ranks.tensor) * (forward * forwards + backward + heads * tokens * 8)
    else:
        logits = case.sequences * calls.total(calls.logits) * plan.vocab_size * case.width
        tensor = ring(ranks.tensor) * (2 * forward + logits)
    expert = sum(2 * hidden + 8 * layer.feed_forward.experts_per_token * train for layer in layers if layer.moe)
    expert *= ring(ranks.expert) * case.group_sequences * calls.tokens * (forwards + 1 if train else 1)
    return {"tensor": tensor, "expert": expert, "data": 2 * gathered_bytes(case) if train else 0.0}


def update_sent_bytes(case: Case) -> dict[str, float]:
    """What one rank sends for the optimizer, by group.

    tensor: the parts of Muon's updates, float32, are exchanged for whole matrices, and back.
    data: with a sharded optimizer, parameters are gathered by those that hold the same.
    """
    updates = sum(4 * sum(case.counts[name] for name in names) * optimizer.share(case, group, names)
                  for group, names in case.groups.items() if group.matrix and group.matrix[2])
    return {"tensor": 2 * ring(case.ranks.tensor) * updates,
            "data": gathered_bytes(case) if case.work.shard_optimizer else 0.0}


def gathered_bytes(case: Case) -> float:
    """What a rank sends when the ranks that hold the same values of a weight gather it."""
    return sum(ring(case.ranks.size(holders_of(p))) * case.bytes[name] for name, p in case.tensors.items())
