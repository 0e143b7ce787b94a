"""What depends on positions alone: computed once for a call, shared by all layers.

A call handles T new rows of B sequences. Without a cache those are all rows there are. With one, each layer sees
earlier rows through its rings and its growing tensors, and this file says where they lie and which of them each new row
may see.
"""
from mindspore import nn, ops

from pangu_ms.cache.rings import in_ring, ring_slots
from pangu_ms.model.rope import RotaryAngles
from pangu_ms.model.sinks import with_sinks
from pangu_ms.shaping import arange, part


class StepInfo(nn.Cell):
    """Builds the dictionary that every layer reads:

    position    int32 [B, T]
    rope        cos and sin, float32 [B, T, 1, rope_dim / 2], and `interleaved`: what `apply_rope` takes
    conv_mask   bool [B, T, 1]: where convolutions act, the start rule
    causal      bool [B, T, S], for layers that see the whole context: S are the rows of a growing tensor, or the T rows
    visible     window, or 0 for none -> bool [B, T, 1, sinks + S]: what attention may see, the sinks always
    slots       int32 [B, T]: where the new rows go in growing tensors; with a cache
    taps        `ring_slots` of the convolutions' inputs; with a cache, where there are convolutions
    rings       window -> `ring_slots` of the latent rows; with a cache
    decode, sparse, largest_logits   constants of the compiled function. Decode: few rows, read where they lie in the
                cache. Sparse: DSA layers see what their indexer selects, otherwise all there is. Largest logits:
                attention without a cache hands out those of its heads

    What nobody reads is dropped when the graph is compiled.

    Args:
        layers: of the plan, those that the call runs.
        slack: rows that rings have beyond a window, for drafts to be rolled back.
    """

    def __init__(self, plan, layers, slack=0):
        super().__init__()
        self.angles, self.interleaved = RotaryAngles(plan), plan.rope_interleaved
        attention = layers[0].attention
        self.sinks, self.taps, self.slack = attention.sinks, attention.conv_width - 1, slack
        self.windows = tuple(sorted({layer.attention.window for layer in layers} - {None}))

    def construct(self, position, capacity, decode, sparse, count=None, largest_logits=False):
        """
        Args:
            position: int32 [B, T].
            capacity: rows that a growing tensor holds for one sequence; None without a cache.
            count: int32 [1], how many of a padded step's rows are real; None: all.
        """
        real = position
        if count is not None:                                                   # padding may lie past the last angles
            real = ops.minimum(position, part(position, 1, 0, 1) + count - 1)
        cos, sin = self.angles(real)
        row = arange(position.shape[1])                                         # [T]
        at = ops.expand_dims(position, 2)                                       # [B, T, 1]
        slots, taps, visible, rings = None, None, {}, {}
        if capacity is None:
            distance = ops.expand_dims(row, 1) - row                            # from query to key
            causal = _within(distance, at, None)
            for window in self.windows:
                visible[window] = with_sinks(_within(distance, at, window), self.sinks)
        else:
            # Rows before the text see its first: a row that sees nothing would be no number, and spread.
            seen_from = ops.maximum(at, 0)
            causal = _within(seen_from - arange(capacity), seen_from, None)
            slots = in_ring(position, capacity)
            if self.taps > 0:
                taps = ring_slots(position, self.taps + self.slack, decode, count)
            for window in self.windows:
                size = window + self.slack
                # The keys are the ring's rows in order, then the new ones.
                distance = ops.expand_dims(row, 1) + size - arange(row.shape[0] + size)
                visible[window] = with_sinks(_within(distance, at, window), self.sinks)
                rings[window] = ring_slots(position, size, decode, count)
        visible[0] = with_sinks(causal, self.sinks)
        return {"position": position, "rope": {"cos": cos, "sin": sin, "interleaved": self.interleaved},
                "conv_mask": ops.expand_dims(position >= self.taps, 2), "causal": causal, "visible": visible,
                "slots": slots, "taps": taps, "rings": rings, "decode": decode, "sparse": sparse,
                "largest_logits": largest_logits}


def _within(distance, at, window):
    """Distance from query to key -> bool [B, T, S]: not ahead, within the sequence, within the window."""
    inside = ops.logical_and(distance >= 0, distance <= at)
    return inside if window is None else ops.logical_and(inside, distance < window)


def positions(ids):
    """ids [B, T], one sequence a row from its start -> int32 [B, T]."""
    return ops.tile(ops.expand_dims(arange(ids.shape[1]), 0), (ids.shape[0], 1))
