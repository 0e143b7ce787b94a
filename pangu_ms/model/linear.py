"""Projections, and the handle by which formulas take a matrix.

A matrix is a dictionary of parameters: {"weight": [O, I]}, or stacked [E, O, I] for experts. Another kind of matrix
(a frozen matrix with a low-rank pair beside it, `low_rank.py`; int8 with a scale for each row; or {"matrix", "bias"}:
any matrix with a bias for what it gives) has other keys and no "weight": `linear` and `dense_weight` understand it, and
an operator that takes a weight refuses it when the graph is compiled. No cell reads the weight of another past its
handle. Handles of larger parts are dictionaries of these, put together when a cell is made: in a graph they cost
nothing.
"""
import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal, initializer

from pangu_ms.device import replaceable
from pangu_ms.model.low_rank import has_pair, merged, with_pair
from pangu_ms.parallel import collectives


@replaceable
def linear(x, matrix):
    """x [..., I] -> [..., O], in the dtype of both."""
    return add_bias(with_pair(_product, x, without_bias(matrix)), matrix)


def _product(x, matrix):
    return ops.dense(x, matrix["weight"])


def without_bias(matrix):
    """The matrix alone."""
    return matrix["matrix"] if "bias" in matrix else matrix


def add_bias(y, matrix):
    """What the product with a matrix has given, y [..., O], with the matrix's bias where it has one."""
    return y + matrix["bias"] if "bias" in matrix else y


def dense_weight(matrix):
    """The numbers of a matrix [O, I] or [E, O, I], for formulas that take it apart."""
    return merged(matrix) if has_pair(matrix) else matrix["weight"]


def parameter(shape, plan, dtype=None, init=None):
    """A trainable Parameter, by default of the plan's dtype and drawn from normal(0, initializer_range)."""
    dtype = getattr(ms, plan.dtype) if dtype is None else dtype
    return ms.Parameter(initializer(Normal(plan.initializer_range) if init is None else init, shape, dtype))


class Linear(nn.Cell):
    """Holds `weight` [O, I], the orientation of the checkpoint, and where wanted `bias` [O]; formulas take `matrix`."""

    def __init__(self, in_features, out_features, plan, dtype=None, bias=False):
        super().__init__()
        self.weight = parameter((out_features, in_features), plan, dtype)
        self.matrix = {"weight": self.weight}
        if bias:
            self.bias = parameter((out_features,), plan, dtype, "zeros")
            self.matrix = {"matrix": self.matrix, "bias": self.bias}


class Embedding(nn.Cell):
    """ids int32 [B, T] -> [B, T, H]. Of several tensor parallel ranks each has a range of the ids."""

    def __init__(self, plan, ranks):
        super().__init__()
        self.count, self.sharded = plan.vocab_size // ranks.tensor, ranks.tensor > 1
        self.first, self.reduce = ranks.tensor_rank * self.count, collectives.reduce(ranks, "tensor")
        self.weight = parameter((self.count, plan.hidden_size), plan)
        self.matrix = {"weight": self.weight}                                   # of a head that is tied to it

    def construct(self, ids):
        if not self.sharded:
            return ops.gather(self.weight, ids, 0)
        place = ids - self.first
        own = ops.logical_and(place >= 0, place < self.count)
        rows = ops.gather(self.weight, ops.select(own, place, ops.zeros_like(place)), 0)
        return self.reduce(rows * ops.cast(ops.expand_dims(own, -1), rows.dtype))
