"""The routed experts' product: y[n] = sum over k of weight[n, k] * expert[id[n, k]](x[n]).

Two plain forms of one function, both exact for every routing: nothing is dropped, however skewed the load; of a choice
whose id is not one of the E, an expert of another rank, there is nothing to add. Then the product of one expert that
all tokens go through.

    x [..., H], ids int32 [..., K], weights [..., K] float32, gate and up [E, F, H], down [E, H, F] -> [..., H]
"""
import mindspore as ms
from mindspore import ops

BLOCK = 64


def few_tokens(small):
    feed_forward = _by_matrix(small("swiglu"))

    def form(x, ids, weights, gate, up, down):
        """For decoding: each (token, choice) pair gathers its expert. Moves N * K experts' weights."""
        k = ids.shape[-1]
        ids, weights = _of_these(ids, weights, gate.shape[0])
        chosen = ops.reshape(ids, (-1,))                                        # [P], P pairs of token and choice
        rows = ops.tile(ops.reshape(x, (-1, 1, x.shape[-1])), (1, k, 1))        # [N, K, H], N tokens
        rows = ops.reshape(rows, (-1, 1, x.shape[-1]))                          # [P, 1, H]
        y = feed_forward(rows, ops.gather(gate, chosen, 0), ops.gather(up, chosen, 0), ops.gather(down, chosen, 0))
        return weighted_sum(y, weights, x)

    return form


def many_tokens(small):
    feed_forward = _by_matrix(small("swiglu"))

    def form(x, ids, weights, gate, up, down):
        """For prefill and training: pairs sorted by expert into blocks of BLOCK rows, each block with one expert.

        An expert with c tokens fills ceil(c / BLOCK) blocks; empty rows compute on a zero token. Moves one expert's
        weights for each block, of which there are at most P / BLOCK + E.
        """
        k = ids.shape[-1]
        tokens = ops.reshape(x, (-1, x.shape[-1]))                              # [N, H]
        n = tokens.shape[0]
        count = gate.shape[0]
        ids, weights = _of_these(ids, weights, count)
        chosen = ops.reshape(ids, (-1,))                                        # [P]
        pairs = chosen.shape[0]
        blocks = (pairs + BLOCK - 1) // BLOCK + count
        # Where each pair goes: its expert's first row plus the number of earlier pairs of that expert.
        of_expert = ops.cast(ops.expand_dims(chosen, 1) == ops.arange(count, dtype=ms.int32), ms.float32)  # [P, E]
        before = ops.cumsum(of_expert, 0) - of_expert
        load = ops.cast(ops.sum(of_expert, 0), ms.int32)                        # [E]
        end = ops.cumsum((load + BLOCK - 1) // BLOCK, 0)                        # [E], in blocks
        first = (end - (load + BLOCK - 1) // BLOCK) * BLOCK                     # [E], in rows
        rank = ops.cast(ops.sum(before * of_expert, 1), ms.int32)               # [P]
        row = ops.gather(first, chosen, 0) + rank                               # [P]
        ended = ops.cast(ops.expand_dims(ops.arange(blocks, dtype=ms.int32), 1) >= end, ms.int32)  # [blocks, E]
        expert = ops.minimum(ops.sum(ended, 1), count - 1)
        # Row -> token; rows that no pair fills read the zero token at the end.
        token = ops.arange(pairs, dtype=ms.int32) // k
        source = ops.tensor_scatter_update(ops.full((blocks * BLOCK,), n, dtype=ms.int32), ops.expand_dims(row, 1),
                                           ops.cast(token, ms.int32))
        padded = ops.cat((tokens, ops.zeros((1, x.shape[-1]), x.dtype)), 0)          # [N + 1, H]
        rows = ops.reshape(ops.gather(padded, source, 0), (-1, BLOCK, x.shape[-1]))             # [blocks, BLOCK, H]
        y = feed_forward(rows, ops.gather(gate, expert, 0), ops.gather(up, expert, 0), ops.gather(down, expert, 0))
        y = ops.gather(ops.reshape(y, (-1, x.shape[-1])), row, 0)               # [P, H]
        return weighted_sum(y, weights, x)

    return form


def _of_these(ids, weights, count):
    """Choices of experts that are not here become choices of the first one, with no weight."""
    here = ops.logical_and(ids >= 0, ids < count)
    return ops.select(here, ids, ops.zeros_like(ids)), ops.select(here, weights, ops.zeros_like(weights))


def feed_forward(small):
    linear, swiglu = small("linear"), small("swiglu")

    def form(x, gate, up, down):
        """One expert for all: x [..., H], gate and up [F, H], down [H, F] -> [..., H]."""
        return linear(swiglu(linear(x, gate), linear(x, up)), down)

    return form


def _by_matrix(swiglu):
    def form(rows, gate, up, down):
        """rows [G, M, H] through one expert each: gate and up [G, F, H], down [G, H, F] -> [G, M, H]."""
        product = ops.BatchMatMul(transpose_b=True)
        return product(swiglu(product(rows, gate), product(rows, up)), down)

    return form


def weighted_sum(y, weights, x):
    """y [P, ..., H], weights [..., K] -> shaped like x [..., H], summed in float32."""
    k = weights.shape[-1]
    y = ops.cast(ops.reshape(y, (-1, k, y.shape[-1])), ms.float32)
    total = ops.sum(y * ops.reshape(weights, (-1, k, 1)), 1)
    return ops.cast(ops.reshape(total, x.shape), x.dtype)
