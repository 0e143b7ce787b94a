"""A projection without bias, and how parameters are made."""
import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal, initializer

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
    """ids int32 [B, T] -> [B, T, H]."""

    def __init__(self, config):
        super().__init__()
        self.weight = parameter((config.vocab_size, config.hidden_size), config)

    def construct(self, ids):
        return ops.gather(self.weight, ids, 0)
