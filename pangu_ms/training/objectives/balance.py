"""The routers' losses, each a float32 scalar, and how the experts were loaded (section 11)."""
import mindspore as ms
from mindspore import ops

from pangu_ms.model.router import expert_scores
from pangu_ms.shaping import arange


def expert_load(ids, experts, real):
    """ids int32 [B, T, K], real [B, T] of `real_rows` -> tokens of each expert in each sequence, float32 [B, E]."""
    hit = ops.expand_dims(ids, -1) == arange(experts)                           # [B, T, K, E]
    return ops.sum(ops.cast(hit, ms.float32) * ops.reshape(real, real.shape + (1, 1)), (1, 2))


def balance_loss(load, logits, real, scoring="sigmoid"):
    """How far the routing of each sequence is from even: 1 for an even one, 0 for one of padding.

    The sum over the experts of f * P: f is an expert's load against an even one, P the mean over the tokens of its
    share of the scores, which sum to one already where they are a softmax (section 3 of the family).

    load [B, E] of `expert_load`, logits [B, T, E], real [B, T]; scoring of `expert_scores`. Only P has a gradient, the
    count of tokens none.
    """
    score = expert_scores(logits, scoring)
    share = score / ops.sum(score, -1, keepdim=True) * ops.expand_dims(real, -1)
    share = ops.sum(share, 1) / ops.maximum(ops.sum(real, 1, keepdim=True), 1.0)                # [B, E]
    even = ops.maximum(ops.sum(load, -1, keepdim=True), 1.0) / load.shape[-1]
    return ops.mean(ops.sum(ops.stop_gradient(load / even) * share, -1))


def z_loss(logits, weight):
    """logits [B, T, E], weight [B, T] of each row: the square of their log-sum-exp, which keeps them small."""
    return ops.sum(ops.square(ops.logsumexp(logits, -1)) * weight)
