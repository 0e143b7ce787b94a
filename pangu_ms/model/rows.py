"""What depends on positions alone: computed once for a call, shared by all layers.

A call handles T new rows of B sequences. Without a cache those are all rows there are. With one, each layer sees
earlier rows through its rings and its growing rows (`pangu_ms.cache`), and this file says where they lie and which of
them each new row may see.
"""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache import growing_slots, ring_order, ring_slots
from pangu_ms.model.rope import RotaryAngles
from pangu_ms.ops.attention import with_sinks


class Rows(nn.Cell):
    """Builds the dictionary that every layer reads.

    "position" int32 [B, T]; "cos", "sin" float32 [B, T, 1, D/2]; "conv_open" bool [B, T, 1], the start rule of the
    convolutions; "causal" bool [B, T, S] for layers that see the whole context; f"visible_{window}" (and
    "visible_None") bool [B, T, 1, sinks + S], what attention may see, the sinks always; with a cache also the slots and
    orders of its tensors; "count" int32 [1], where a step is padded at its end how many rows are real, else None; and
    the constants "decode" and "sparse" of the compiled function. Sparse: DSA layers see what their indexer selects,
    otherwise all there is. Decoding reads the first few alone: its operators find places by position, and what nobody
    reads is dropped when the graph is compiled.
    """

    def __init__(self, config, plans, slack=0):
        super().__init__()
        self.angles = RotaryAngles(config)
        self.sinks = config.param_sink_number
        self.taps = config.router_sliding_window - 1
        self.slack = slack
        self.windows = tuple(sorted({plan.window for plan in plans if plan.window is not None}))
        self.keys = tuple(f"_{window}" for window in self.windows)

    def construct(self, position, capacity, decode, sparse, count=None):
        """position int32 [B, T]; capacity: rows a growing tensor holds for one sequence, None without a cache."""
        last = position[:, -1:] if count is None else position[:, :1] + count - 1               # [B, 1]
        # Padding may lie past the last position that there are angles for.
        cos, sin = self.angles(position if count is None else ops.minimum(position, last))
        rows = {"position": position, "cos": cos, "sin": sin,
                "conv_open": ops.expand_dims(position >= self.taps, 2), "decode": decode, "sparse": sparse,
                "count": count}
        length = position.shape[1]
        row = ops.arange(length, dtype=ms.int32)                                                # [T]
        at = ops.expand_dims(position, 2)                                       # [B, T, 1]
        if capacity is None:
            rows["causal"] = self._within(ops.expand_dims(row, 1) - row, at, None)
            for window, key in zip(self.windows, self.keys):
                rows["visible" + key] = with_sinks(self._within(ops.expand_dims(row, 1) - row, at, window), self.sinks)
        else:
            rows["causal"] = self._within(at - ops.arange(capacity, dtype=ms.int32), at, None)
            rows["slot"] = growing_slots(position, capacity)
            rows["tap_order"], rows["tap_slot"] = self._ring(position, last, self.taps + self.slack)
            for window, key in zip(self.windows, self.keys):
                size = window + self.slack
                # The keys are the ring's rows in order, then the new ones.
                distance = ops.expand_dims(row, 1) + size - ops.arange(length + size, dtype=ms.int32)
                rows["visible" + key] = with_sinks(self._within(distance, at, window), self.sinks)
                rows["order" + key], rows["slot" + key] = self._ring(position, last, size)
        rows["visible_None"] = with_sinks(rows["causal"], self.sinks)
        return rows

    def _within(self, distance, at, window):
        """Distance from query to key -> bool [B, T, S]: not ahead, within the sequence, within the window."""
        inside = ops.logical_and(distance >= 0, distance <= at)
        return inside if window is None else ops.logical_and(inside, distance < window)

    def _ring(self, position, last, size):
        return ring_order(position, size), ring_slots(last, size, False)


def positions(ids):
    """ids [B, T], one sequence a row from its start -> int32 [B, T]."""
    return ops.tile(ops.expand_dims(ops.arange(ids.shape[1], dtype=ms.int32), 0), (ids.shape[0], 1))
