"""The experts that each token goes to (section 7)."""
import mindspore as ms
from mindspore import ops

from pangu_ms.device import replaceable
from pangu_ms.model.elementary import sigmoid, top_k
from pangu_ms.model.linear import linear


def route(x, router):
    """x [..., H] -> {"ids" int32 [..., K], "weights" float32 [..., K], "logits" float32 [..., E]}.

    router: gate, a matrix [E, H], computed in float32; and what `choose_experts` takes.
    """
    logits = linear(ops.cast(x, ms.float32), router["gate"])
    ids, weights = choose_experts(logits, router["bias"], router["scale"], router["normalise"])
    return {"ids": ids, "weights": weights, "logits": logits}


@replaceable
def choose_experts(logits, bias, scale, normalise):
    """The best K by sigmoid(logits) + bias -> ids int32 and weights [..., K].

    logits float32 [..., E]; bias [E] chooses and does not weigh; scale [K], a factor by choice; normalise: the weights
    are divided by their sum.
    """
    score = sigmoid(logits)
    ids = top_k(score + bias, scale.shape[0])
    weights = ops.gather_elements(score, -1, ids)
    if normalise:
        weights = weights / (ops.sum(weights, -1, keepdim=True) + 1e-20)
    return ids, weights * scale
