"""The decoding state of a batch, as the host keeps it: what each layer remembers, and no more.

Each layer's attention names its tensors (`plan.LatentAttention.cache_tensors`): rings of the last rows, and growing
tensors where a layer sees the whole context. For speculative decoding every ring has `slack` rows more, and there is a
ring of the trunk's last hidden rows, which the MTP layers read.

All are plain tensors that the compiled step updates in place (`pangu_ms.cache.rings`). The state belongs to a length
and nothing else: what lies beyond it is overwritten by the next step, and rolling back up to `slack` rows is making the
length smaller.
"""
import copy

import mindspore as ms
import numpy as np
from mindspore import ops

from pangu_ms.cache.sizes import FIRST_CAPACITY, grown, hidden_rows, tensor_shapes


class Cache:
    """The state of `batch` sequences in some layers of a plan, all empty at first.

    Attributes:
        layers: for each layer its tensors by name, [batch * rows, width] each.
        hidden: the ring of hidden rows [batch * rows, H]; None without slack.
        length: int32 [batch], how many positions of each sequence are real.
        capacity: rows that growing tensors have for one sequence.
    """

    def __init__(self, plan, layers, batch=1, capacity=FIRST_CAPACITY, slack=0, tensor=1):
        dtype = getattr(ms, plan.dtype)
        self.batch, self.capacity, self.length = batch, capacity, np.zeros(batch, np.int32)
        self.growing = [{name for name, each in layer.attention.cache_tensors.items() if each.rows is None}
                        for layer in layers]
        self.layers = [{name: ops.zeros((batch * rows, width), dtype)
                        for name, (rows, width) in tensor_shapes(layer, capacity, slack, tensor).items()}
                       for layer in layers]
        self.hidden = ops.zeros((batch * hidden_rows(slack), plan.hidden_size), dtype) if slack else None

    def reserve(self, length):
        """Make room for `length` positions, doubling the capacity as often as it takes."""
        capacity = grown(self.capacity, length)
        if capacity > self.capacity:
            for names, tensors in zip(self.growing, self.layers):
                tensors |= {name: self._enlarged(tensors[name], capacity) for name in names}
            self.capacity = capacity

    def _enlarged(self, tensor, capacity):
        rows = ops.reshape(tensor, (self.batch, self.capacity, -1))
        room = ops.zeros((self.batch, capacity - self.capacity, rows.shape[2]), tensor.dtype)
        return ops.reshape(ops.cat((rows, room), 1), (self.batch * capacity, -1))

    def copy(self):
        """A snapshot: another cache in the same state. It is whole, so that what goes on from it lacks nothing."""
        return self._with([self])

    @staticmethod
    def stack(caches):
        """One cache of the sequences of several, in their order."""
        for cache in caches:
            cache.reserve(max(other.capacity for other in caches))
        return caches[0]._with(caches)

    def _with(self, caches):
        stacked = copy.copy(self)
        stacked.batch = sum(cache.batch for cache in caches)
        stacked.length = np.concatenate([cache.length for cache in caches])
        stacked.layers = [{name: _joined([tensors[name] for tensors in layer]) for name in layer[0]}
                          for layer in zip(*(cache.layers for cache in caches))]
        if self.hidden is not None:
            stacked.hidden = _joined([cache.hidden for cache in caches])
        return stacked

    @property
    def bytes(self):
        """What the tensors take, spare capacity included."""
        found = sum(tensor.nbytes for tensors in self.layers for tensor in tensors.values())
        return found + (0 if self.hidden is None else self.hidden.nbytes)


def _joined(tensors):
    """Their rows one behind the other, in memory of their own on the device: the state is updated in place."""
    return ops.cat(tensors) if len(tensors) > 1 else tensors[0].copy()
