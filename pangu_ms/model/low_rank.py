"""A frozen matrix with a low-rank pair beside it (LoRA, arXiv 2106.09685): y = W x + scale * B A dropout(x).

Its handle is {"frozen": W, "lora_A": A, "lora_B": B, "scale": alpha / rank, "dropout"}. W, A and B are handles
themselves, {"weight": [O, I]}, [r, I] and [O, r], or stacked [E, ...] for experts. `dropout` is None, or a dictionary
for `dropped`.
"""
from mindspore import ops

from pangu_ms.shaping import arange

MIXERS = (0x45D9F3B, 0x119DE1F3)  # of a hash of 32 bits, each odd


def has_pair(matrix):
    """Whether a matrix, which has no bias around it, has a pair beside it."""
    return "lora_A" in matrix


def with_pair(product, x, matrix):
    """`product(x, handle)` of a matrix and, where it has a pair, of that: a function of x and of {"weight"} alone."""
    if not has_pair(matrix):
        return product(x, matrix)
    low = product(dropped(x, matrix["dropout"]), matrix["lora_A"]) * matrix["scale"]
    return product(x, matrix["frozen"]) + product(low, matrix["lora_B"])


def merged(matrix):
    """W + scale * B A, for formulas that take a matrix apart: there nothing is dropped."""
    return (matrix["frozen"]["weight"]
            + ops.matmul(matrix["lora_B"]["weight"], matrix["lora_A"]["weight"]) * matrix["scale"])


def dropped(x, dropout):
    """x with a share of `rate` of its values zero and the others larger, while a step of training is computed.

    dropout: rate; call, int32 [1], the number of that step, from 1, or below 1 outside of training; salt, a number for
    each matrix. Which values are zero follows from those alone, so that an interrupted run goes on with the same ones.
    """
    if dropout is None:
        return x
    training = dropout["call"] > 0                                              # [1]
    key = _mixed(_mixed(dropout["call"] * MIXERS[0] + dropout["salt"]))
    chance = _mixed(ops.bitwise_xor(arange(x.size) * MIXERS[0], key))           # of all int32, each alike
    kept = chance >= ops.select(training, int((dropout["rate"] - 0.5) * 2 ** 32), -2 ** 31)
    factor = ops.cast(ops.select(training, 1 / (1 - dropout["rate"]), 1.0), x.dtype)
    return x * ops.cast(ops.reshape(kept, x.shape), x.dtype) * factor


def _mixed(bits):
    """int32 -> int32, one round of a hash, of which the upper bits are good: products wrap around."""
    return ops.bitwise_xor(bits, bits // 65536) * MIXERS[1]
