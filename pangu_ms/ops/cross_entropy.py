"""The language model's head with its cross entropy, plain form."""
import mindspore as ms
from mindspore import ops


def cross_entropy(small):
    linear = small("linear")

    def form(hidden, weight, labels, mask):
        """mask * -log softmax(weight . hidden)[label], for each row on its own.

        hidden [..., H], normed, weight [V, H], labels int32 [...] in 0 .. V-1, mask float32 [...] -> float32 [...].
        No gradient for mask.
        """
        logits = ops.cast(linear(hidden, weight), ms.float32)                   # [..., V]
        logits = logits - ops.stop_gradient(ops.ReduceMax(True)(logits, -1))
        chosen = ops.squeeze(ops.gather_elements(logits, -1, ops.expand_dims(labels, -1)), -1)
        return (ops.log(ops.ReduceSum()(ops.exp(logits), -1)) - chosen) * mask

    return form
