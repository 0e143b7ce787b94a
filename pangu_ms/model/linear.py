"""A projection without bias, and how parameters are made."""
import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal, initializer

from pangu_ms.model.parallel import own_part
from pangu_ms.ops import operator


def parameter(shape, config, dtype=None, init=None):
    """A trainable Parameter, by default of the model's compute dtype and drawn from normal(0, initializer_range)."""
    dtype = getattr(ms, config.compute_dtype) if dtype is None else dtype
    return ms.Parameter(initializer(Normal(config.initializer_range) if init is None else init, shape, dtype))


class Linear(nn.Cell):
    """x [..., I] -> [..., O] with `weight` [O, I], the orientation of the checkpoint."""

    def __init__(self, in_features, out_features, config, dtype=None):
        super().__init__()
        self.weight = parameter((out_features, in_features), config, dtype)
        self.linear = operator("linear", self.weight.dtype)

    def construct(self, x):
        return self.linear(x, self.weight)


class Embedding(nn.Cell):
    """ids int32 [B, T] -> [B, T, H]. Of several tensor parallel ranks each has a range of the ids."""

    def __init__(self, config, parallel):
        super().__init__()
        self.count, self.divided = config.vocab_size // parallel.tensor, parallel.tensor > 1
        self.first, self.reduce = parallel.tensor_rank * self.count, parallel.reduce("tensor")
        self.weight = parameter((self.count, config.hidden_size), config)

    def construct(self, ids):
        if not self.divided:
            return ops.gather(self.weight, ids, 0)
        own, place = own_part(ids, self.first, self.count)
        rows = ops.gather(self.weight, place, 0)
        return self.reduce(rows * ops.cast(ops.expand_dims(own, -1), rows.dtype))
