"""Floating-point operations by component, two for each multiply-add of a product.

Products and the short convolutions are counted; norms, softmax, Sinkhorn and other elementwise work are not: memory
bandwidth decides their time.
"""
from collections import defaultdict

import numpy as np

from pangu_ms.estimate.attention import attention_cost
from pangu_ms.estimate.work import Calls, Case
from pangu_ms.model import pieces
from pangu_ms.model.plan import MoE

NO_PRODUCT = ("embedding", "sink")
COUNTED_AS = {"merge": "mhc", "mtp_input": "mtp"}


def forward_flops(case: Case, calls: Calls) -> dict[str, float]:
    """One forward of the rank's sequences, by component; `mtp` holds all of the MTP layers and their heads.

    Every matrix takes 2 * (values on this rank) for each row that passes through it. Experts see the tokens of the
    whole copy of the model, and of those one expert rank's share.
    """
    plan, tokens, found = case.plan, case.sequences * calls.tokens, defaultdict(float)
    costs = {layer.attention: attention_cost(layer.attention, case, calls) for layer in plan.layers}
    for name, p in case.tensors.items():
        component, flops = COUNTED_AS.get(p.component, p.component), 2 * case.counts[name]
        if component == "embedding" and plan.tied_head:
            component = "head"
        if component in NO_PRODUCT or min(p.rows, p.columns) < 2:
            continue
        if component == "expert":
            moe = p.layer.feed_forward
            flops *= calls.total(expert_rows(moe, case, calls)) / (moe.num_experts // case.ranks.expert)
        elif component == "head":
            flops *= case.sequences * calls.total(calls.logits)
            found["mtp"] += flops * len(plan.mtp_layers) * (not calls.cached or calls.decode)
        elif p.layer:
            flops *= case.sequences * calls.total(costs[p.layer.attention].rows_through(name))
        else:
            flops *= tokens
        found["mtp" if p.layer and p.layer.mtp_depth else component] += flops
    for layer, count in case.layers.items():
        for component, flops in costs[layer.attention].flops().items():
            found["mtp" if layer.mtp_depth else component] += count * flops
        if layer.residual:      # reading a sublayer's input off the streams, and mixing them, around both sublayers
            n = layer.residual.streams
            found["mhc"] += count * 2 * tokens * 2 * plan.hidden_size * (n + n * n)
    if plan.residual:                                                           # the merge
        found["mhc"] += tokens * 2 * plan.hidden_size * plan.residual.streams
    return dict(found)


def expert_rows(moe: MoE, case: Case, calls: Calls) -> np.ndarray:
    """Rows of each call through the experts of one rank in one layer, if they are loaded evenly.

    The plain form fills blocks of rows with one expert each and computes one more block for each expert.
    """
    rows = case.group_sequences * calls.rows * moe.experts_per_token / case.ranks.expert
    if not case.work.fused and not calls.decode:
        rows = pieces.BLOCK * (np.ceil(rows / pieces.BLOCK) + moe.num_experts // case.ranks.expert)
    return rows


def train_flops(case: Case, calls: Calls) -> dict[str, float]:
    """Forward and backward. Each product has two more in the backward; recompute does the layers' forward again."""
    found = {name: value * (4 if case.work.recompute and name != "head" else 3)
             for name, value in forward_flops(case, calls).items()}
    losses = [count * attention_cost(layer.attention, case, calls).loss_flops()
              for layer, count in case.layers.items() if layer.attention.indexer]
    return found | ({"indexer_loss": sum(losses)} if losses else {})
