"""Which lengths a graph is compiled for: all of them at once, or each by itself.

A policy says how the prompt is cut and makes room in the cache. `rows(cache, chunk, left)` are those of the next step
of a prefill, padding included; `compiled(cache, rows, prefill)` makes room for so many more rows and gives what the
step is compiled for: whether DSA layers select, the rows of a prefill, and the capacity; None for what is left open.
"""
from pangu_ms import device
from pangu_ms.generation.chunks import chunk_rows, selecting_rows


class OpenShapes:
    """For a CPU, where padding would cost more than it saves: a graph takes any length, and any capacity."""

    def __init__(self, plan, capacity, expected):
        self.plan, self.capacity = plan, capacity

    def expect(self, length):
        """Nothing is made for a length that is still to come."""

    def rows(self, cache, chunk, left):
        return chunk_rows(self.plan, cache.batch, int(cache.length.max()), cache.capacity, min(chunk, left))

    def compiled(self, cache, rows, prefill):
        end = int(cache.length.max()) + rows
        cache.reserve(end)
        return self.plan.indexer is not None and end > self.plan.indexer.topk, None, None


class FixedShapes:
    """For a device that wants every shape known: a prefill step has exactly `chunk` rows, padded at the end.

    The capacity belongs to what is compiled. So it is the indexer's topk while DSA layers see everything, and when they
    begin to select it grows at once to what is enough for `expected` positions.
    """

    def __init__(self, plan, capacity, expected):
        self.plan, self.expected = plan, expected
        self.topk = plan.indexer.topk if plan.indexer else None
        self.capacity = self.topk or capacity

    def expect(self, length):
        """So many positions will be asked for, padding included."""
        self.expected = max(self.expected, length)

    def rows(self, cache, chunk, left):
        if self.topk is None or device.gathers_no_rows(self.plan):
            return chunk
        if max(int(cache.length.max()) + chunk, cache.capacity) <= self.topk:
            return chunk
        cache.reserve(self.expected)
        return min(chunk, selecting_rows(self.plan, cache.batch, cache.capacity))

    def compiled(self, cache, rows, prefill):
        end = int(cache.length.max()) + rows
        sparse = self.topk is not None and max(end, cache.capacity) > self.topk
        cache.reserve(max(end, self.expected) if sparse or self.topk is None else end)
        return sparse, rows if prefill else None, cache.capacity
