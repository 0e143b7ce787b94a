"""The decoding state of a batch: what each layer remembers, and no more.

    DSA and full layers   latent rows [B * capacity, kv_lora_rank + qk_rope_head_dim], growing
    DSA layers            indexer keys [B * capacity, index_head_dim], growing
    SWA layers            a ring of the last `window` latent rows
    every layer           rings of the last k-1 inputs of its three convolutions ("taps")

For speculative decoding every ring has `slack` rows more, and there is a ring of the trunk's last hidden rows, which
the MTP layers read.

All are plain tensors that the compiled step updates in place. The row of position p lies at slot p of a growing tensor
and at slot p mod R of a ring of R rows. So the state belongs to a length and nothing else: what lies beyond it is
overwritten by the next step, and rolling back up to `slack` rows is making the length smaller.
"""
import copy

import mindspore as ms
import numpy as np
from mindspore import ops

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


# ---------------------------------------------------------------- inside the compiled step

def growing_slots(position, capacity):
    """position int32 [B, T] -> slots int32 [B, T] in a growing tensor."""
    return position + ops.expand_dims(ops.arange(position.shape[0], dtype=ms.int32) * capacity, 1)


def ring_order(position, size):
    """Slots int32 [B, size] of the `size` rows before this call, oldest first; nothing real lies before position 0."""
    past = position[:, :1] - size + ops.arange(size, dtype=ms.int32)
    return _in_ring(past, size)


def ring_slots(position, size, decode):
    """Slots that `remember` writes: of the new rows when decoding, else of the last `size` rows, new or old."""
    return _in_ring(position if decode else position[:, -1:] - size + 1 + ops.arange(size, dtype=ms.int32), size)


def _in_ring(position, size):
    return position % size + ops.expand_dims(ops.arange(position.shape[0], dtype=ms.int32) * size, 1)


def remember(ring, new, order, slots, decode):
    """Read the rows before `new` [B, T, D] from a ring, then let the ring hold the last rows. -> past [B, R, D]."""
    past = ops.gather(ring, order, 0)
    rows = new if decode else ops.cat((past, new), 1)[:, -order.shape[1]:]
    return ops.depend(past, ops.scatter_update(ring, slots, rows))              # a write nobody uses is dropped


def remember_real(ring, new, order, slots, count):
    """`remember` of a prefill step whose rows from `count` int32 [1] on are padding: the ring holds the last before."""
    past = ops.gather(ring, order, 0)
    last = count + ops.arange(order.shape[1], dtype=ms.int32)
    rows = ops.gather(ops.cat((past, new), 1), last, 1)
    return ops.depend(past, ops.scatter_update(ring, slots, rows))


def grow(tensor, new, slots):
    """Write `new` [B, T, D] into a growing tensor. -> the tensor with the rows in it [B * capacity, D]."""
    return ops.scatter_update(tensor, slots, new)


# ---------------------------------------------------------------- on the host

LATENT, Q_TAPS, KV_TAPS, O_TAPS, INDEX_KEYS = range(5)  # a layer's tensors, in this order; the last for DSA only
GROWING = (LATENT, INDEX_KEYS)  # in layers without a window


def layer_shapes(config, plan, capacity, slack=0, tensor=1):
    """(rows, width) of one layer's tensors for one sequence, on one of `tensor` ranks that share the heads."""
    taps = config.router_sliding_window - 1 + slack
    rows = capacity if plan.window is None else plan.window + slack
    shapes = [(rows, config.kv_lora_rank + config.qk_rope_head_dim), (taps, config.q_lora_rank),
              (taps, config.kv_lora_rank), (taps, config.num_attention_heads // tensor * config.v_head_dim)]
    return shapes + [(rows, config.index_head_dim)] if plan.kind == "dsa" else shapes


def cache_bytes(config, length, batch=1, dtype="float32", slack=0):
    """Bytes that `length` tokens of each of `batch` sequences take in all layers, MTP included.

    -> {"per_token": growing rows of one token of one sequence, "fixed": rings and taps of one sequence, "total"}.
    """
    def size(capacity):
        return DTYPE_BYTES[dtype] * sum(rows * width for plan in config.layers
                                        for rows, width in layer_shapes(config, plan, capacity, slack))
    fixed, per_token = size(0), size(1) - size(0)
    return {"per_token": per_token, "fixed": fixed, "total": batch * (fixed + length * per_token)}


def hidden_rows(slack):
    """Rows of the ring of hidden rows: those the MTP layers read again, and those of a step that may be rolled back."""
    return 2 * slack


class Cache:
    """The state of `batch` sequences in the layers of `plans`, all empty at first.

    Attributes:
        tensors: for each layer a tuple of 2-D tensors (see `layer_shapes`), and with slack a last tuple of the hidden
            ring alone; the argument of a step.
        length: int32 [batch], how many positions of each sequence are real.
        capacity: rows that growing tensors have for one sequence.
    """

    def __init__(self, config, plans, batch=1, capacity=256, dtype="float32", slack=0, tensor=1):
        self.batch, self.capacity, self.length = batch, capacity, np.zeros(batch, np.int32)
        self.growing = [plan.window is None for plan in plans]
        shapes = [layer_shapes(config, plan, capacity, slack, tensor) for plan in plans]
        if slack:
            self.growing.append(False)
            shapes.append([(hidden_rows(slack), config.hidden_size)])
        self.tensors = [tuple(ops.zeros((batch * rows, width), getattr(ms, dtype)) for rows, width in layer)
                        for layer in shapes]

    def reserve(self, length):
        """Make room for `length` positions, doubling the capacity as often as it takes."""
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        if capacity > self.capacity:
            self.tensors = [tuple(self._enlarged(tensor, capacity) if growing and i in GROWING else tensor
                                  for i, tensor in enumerate(tensors))
                            for growing, tensors in zip(self.growing, self.tensors)]
            self.capacity = capacity

    def _enlarged(self, tensor, capacity):
        rows = ops.reshape(tensor, (self.batch, self.capacity, -1))
        room = ops.zeros((self.batch, capacity - self.capacity, rows.shape[2]), tensor.dtype)
        return ops.reshape(ops.cat((rows, room), 1), (self.batch * capacity, -1))

    def copy(self):
        """A snapshot: another cache in the same state. It is whole, so that what goes on from it lacks nothing."""
        return self._with(self.batch, [self])

    @staticmethod
    def stack(caches):
        """One cache of the sequences of several, in their order."""
        for cache in caches:
            cache.reserve(max(other.capacity for other in caches))
        return caches[0]._with(sum(cache.batch for cache in caches), caches)

    def _with(self, batch, caches):
        stacked = copy.copy(self)
        stacked.batch = batch
        stacked.length = np.concatenate([cache.length for cache in caches])
        # numpy's concatenate copies even one: these tensors are updated in place and never shared.
        stacked.tensors = [tuple(ms.Tensor(np.concatenate([tensor.asnumpy() for tensor in tensors])) for tensors in
                                 zip(*layers)) for layers in zip(*(cache.tensors for cache in caches))]
        return stacked

    @property
    def bytes(self):
        """What the tensors take, spare capacity included."""
        return sum(tensor.nbytes for tensors in self.tensors for tensor in tensors)
