"""The experts that each token goes to, plain form."""
from mindspore import ops


def route(small):
    sigmoid, top_k = small("sigmoid"), small("top_k")

    def form(logits, bias, scale, normalise):
        """logits float32 [..., E], bias [E], scale [K], a factor by choice -> ids int32 and weights [..., K]."""
        score = sigmoid(logits)
        ids = top_k(score + bias, scale.shape[0])                               # the bias selects, it does not weigh
        weights = ops.gather_elements(score, -1, ids)
        if normalise:
            weights = weights / (ops.sum(weights, -1, keepdim=True) + 1e-20)
        return ids, weights * scale

    return form
