"""The language model's head with its cross entropy: the formula, and a form that keeps no logits."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.device import replaceable
from pangu_ms.model.linear import dense_weight, linear
from pangu_ms.model.pieces import ROWS


@replaceable
def cross_entropy(hidden, head, labels, mask):
    """mask * -log softmax(head . hidden)[label], for each row on its own.

    hidden [..., H], normed, head, a matrix [V, H], labels int32 [...] in 0 .. V-1, mask float32 [...] -> float32 [...].
    No gradient for mask.
    """
    logits = ops.cast(linear(hidden, head), ms.float32)                         # [..., V]
    logits = logits - ops.stop_gradient(ops.ReduceMax(True)(logits, -1))
    chosen = ops.squeeze(ops.gather_elements(logits, -1, ops.expand_dims(labels, -1)), -1)
    return (ops.log(ops.ReduceSum()(ops.exp(logits), -1)) - chosen) * mask


class LogShare(nn.Cell):
    """hidden [N, H], weight [V, H], labels int32 [N] -> float32 [2, N]: -log softmax(weight . hidden)[label], and the
    logarithm of that softmax's denominator, which has no gradient. (Of two outputs MindSpore would find none.)

    ROWS rows at a time, one piece after the other, so that no two pieces' logits are there at once; the gradient
    computes them again.

    Args:
        first: where ranks share the vocabulary, the first token of `weight`.
        total, largest: sum and maximum of float32 [N] over those ranks.
    """

    def __init__(self, first=0, total=None, largest=None):
        super().__init__()
        self.first, self.total, self.largest = first, total, largest
        self.by_columns, self.sum, self.one_hot = ops.MatMul(transpose_a=True), ops.ReduceSum(), ops.OneHot()
        self.on, self.off = ms.Tensor(1.0, ms.float32), ms.Tensor(0.0, ms.float32)

    def construct(self, hidden, weight, labels):
        denominators, chosen = (), ()
        for first in range(0, hidden.shape[0], ROWS):
            logits, hit = self._logits(hidden, weight, labels, first)
            top = ops.ReduceMax(True)(logits, -1)
            denominators = denominators + (ops.log(self.sum(ops.exp(logits - top), -1)) + ops.squeeze(top, -1),)
            chosen = chosen + (self.sum(logits * hit, -1),)
            weight = ops.depend(weight, (denominators[-1], chosen[-1]))
        denominator, chosen = ops.cat(denominators), ops.cat(chosen)
        if self.total is not None:
            top = self.largest(denominator)
            denominator, chosen = ops.log(self.total(ops.exp(denominator - top))) + top, self.total(chosen)
        return ops.stack((denominator - chosen, denominator))

    def bprop(self, hidden, weight, labels, out, dout):
        given, denominator = ops.expand_dims(dout[0], -1), ops.expand_dims(out[1], -1)          # [N, 1]
        of_hidden, of_weight, dtype = (), ops.zeros(weight.shape, ms.float32), weight.dtype
        for first in range(0, hidden.shape[0], ROWS):
            logits, hit = self._logits(hidden, weight, labels, first)
            share = ops.exp(logits - denominator[first:first + ROWS]) - hit
            of_logits = ops.cast(share * given[first:first + ROWS], dtype)
            of_hidden = of_hidden + (ops.matmul(of_logits, weight),)
            of_weight = of_weight + ops.cast(self.by_columns(of_logits, hidden[first:first + ROWS]), ms.float32)
            weight = ops.depend(weight, (of_hidden[-1], of_weight))
        return ops.cat(of_hidden), ops.cast(of_weight, dtype), ops.zeros_like(labels)

    def _logits(self, hidden, weight, labels, first):
        """Of a piece, float32 [ROWS, V], and one where its labels are. By primitives: a function with branches that
        both graphs use, MindSpore has taken apart when it comes to the second."""
        logits = ops.cast(ops.dense(hidden[first:first + ROWS], weight), ms.float32)
        place, count = labels[first:first + ROWS] - self.first, weight.shape[0]
        own = ops.logical_and(place >= 0, place < count)
        hit = self.one_hot(place * ops.cast(own, ms.int32), count, self.on, self.off)
        return logits, hit * ops.expand_dims(ops.cast(own, ms.float32), -1)


_LOG_SHARE = LogShare()


def streamed_cross_entropy(hidden, head, labels, mask):
    """As `cross_entropy`, keeping no logits."""
    flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
    share = _LOG_SHARE(flat, dense_weight(head), ops.reshape(labels, (-1,)))[0]
    return ops.reshape(share, labels.shape) * mask
