"""The experts that each token goes to (section 7; section 3 of the family)."""
import mindspore as ms
from mindspore import ops

from pangu_ms.device import replaceable
from pangu_ms.model.elementary import sigmoid, softmax, top_k
from pangu_ms.model.linear import linear
from pangu_ms.shaping import arange


def route(x, router):
    """x [..., H] -> {"ids" int32 [..., K], "weights" float32 [..., K], "logits" float32 [..., E]}.

    router: gate, a matrix [E, H], computed in float32; factor [1, E], learned, of the weights of the chosen, or None;
    and what `choose_experts` takes.
    """
    logits = linear(ops.cast(x, ms.float32), router["gate"])
    ids, weights = choose_experts(logits, router)
    if router["factor"] is not None:
        weights = weights * ops.gather(ops.reshape(router["factor"], (-1,)), ids, 0)
    return {"ids": ids, "weights": weights, "logits": logits}


@replaceable
def choose_experts(logits, router):
    """The best K by score + bias, of all or one of each group -> ids int32 and weights [..., K].

    logits float32 [..., E]. router: scoring, see `expert_scores`; bias [E], which chooses and does not weigh; grouped:
    the best of each of K equal groups, in the order of the groups; kept, a number or None: of a group only that many,
    see `most_voted`; scale [K], a factor by choice; normalise: the weights are divided by their sum.
    """
    score, scale = expert_scores(logits, router["scoring"]), router["scale"]
    if router["kept"] is not None:
        ids = best_of_groups(most_voted(score + router["bias"], scale.shape[0], router["kept"]), scale.shape[0])
    elif router["grouped"]:
        ids = best_of_groups(score + router["bias"], scale.shape[0])
    else:
        ids = top_k(score + router["bias"], scale.shape[0])
    weights = ops.gather_elements(score, -1, ids)
    if router["normalise"]:
        weights = weights / (ops.sum(weights, -1, keepdim=True) + 1e-20)
    return ids, weights * scale


def expert_scores(logits, scoring):
    """float32 [..., E] -> the scores: "sigmoid" of each logit, or "softmax" over all experts."""
    return softmax(logits) if scoring == "softmax" else sigmoid(logits)


def most_voted(score, groups, kept):
    """[..., E] -> the same, with no chance for an expert that is not among the `kept` of its group which are the best
    one for the most tokens (of equal votes: the first).

    All tokens of a step together then need `kept` experts of a group at most. This is how openPangu Pro MoE decodes
    batches on Atlas 300I Duo, not what the model computes.
    """
    size = score.shape[-1] // groups
    best = ops.reshape(best_of_groups(score, groups), (-1, 1))                  # [N * groups, 1]
    votes = ops.sum(ops.cast(best == arange(groups * size), ms.float32), 0)     # [E]
    votes = ops.reshape(votes, (groups, size)) * size - ops.cast(arange(size), ms.float32)   # none are equal
    winners = top_k(votes, kept) + ops.reshape(arange(groups) * size, (-1, 1))  # [groups, kept]
    won = ops.sum(ops.cast(ops.reshape(winners, (-1, 1)) == arange(groups * size), ms.float32), 0) > 0        # [E]
    return ops.select(won, score, ops.full_like(score, -1.0))                   # a score by softmax is positive


def best_of_groups(score, groups):
    """[..., E] -> int32 [..., groups]: the largest of each of so many equal groups of neighbours, in their order."""
    size = score.shape[-1] // groups
    best = top_k(ops.reshape(score, score.shape[:-1] + (groups, size)), 1)      # [..., groups, 1]
    return ops.squeeze(best, -1) + arange(groups) * size
