"""The compiled steps of a model and the cache they work on."""
import mindspore as ms
import numpy as np

from pangu_ms import device
from pangu_ms.cache.sizes import FIRST_CAPACITY
from pangu_ms.cache.state import Cache
from pangu_ms.generation.chunks import PREFILL_CHUNK
from pangu_ms.generation.shapes import FixedShapes, OpenShapes
from pangu_ms.generation.steps import SLACK, Draft, Step, first_growing


class Engine:
    """`batch` sequences of a model.

    Sequences may differ in length: each has its own in `cache.length`.

    Args:
        capacity: rows that the cache's growing tensors have at first, for one sequence.
        num_draft_tokens: above 0 it prepares for `draft`, which costs the MTP layers' share of cache and prefill.
        expected: positions that will be asked for; where shapes are fixed, room for them is made at once.

    Attributes:
        cache (Cache):
        whole (bool): the cache holds its `length` tokens of each sequence; not so while a step is under way, nor after
            one that was cut short, which may have written over rows that the rings still need.
    """

    def __init__(self, model, batch=1, capacity=FIRST_CAPACITY, num_draft_tokens=0, expected=0):
        self.model, self.drafts = model, num_draft_tokens
        plan = model.plan
        self.depths = len(plan.mtp_layers) if num_draft_tokens else 0
        self.drafts_grow = first_growing(plan.mtp_layers) is not None
        if num_draft_tokens:                                                   # rows before a short text lie at the end
            capacity = max(capacity, SLACK)
        policy = FixedShapes if device.wants_fixed_shapes() else OpenShapes
        self.shapes = policy(plan, capacity, expected + num_draft_tokens)
        self.cache = Cache(plan, plan.layers[:len(plan.trunk) + self.depths], batch, self.shapes.capacity,
                           SLACK if self.drafts else 0, model.ranks.tensor)
        self.whole = True

    def prefill(self, ids, chunk=PREFILL_CHUNK, on_prefill=None):
        """Append ids int32 [B, T] to every sequence -> logits float32 [B, V] of their last token.

        In chunks of at most `chunk` rows; `on_prefill(length)` is called after each, with the length of the longest.
        """
        done, total = 0, len(ids[0])
        self.shapes.expect(int(self.cache.length.max()) + total + chunk)
        ahead = np.pad(ids, ((0, 0), (0, self.depths + chunk)))                 # what a drafting step reads ahead
        while done < total:
            rows = self.shapes.rows(self.cache, chunk, total - done)
            count = min(rows, total - done)                                     # the others are padding
            logits = self._step(ahead[:, done:done + rows + self.depths], rows, count)
            self.keep(count)
            done += count
            if on_prefill is not None:
                on_prefill(int(self.cache.length.max()))
        return logits[:, -1]

    def decode(self, ids):
        """Append one token to each sequence, ids int32 [B, 1] -> logits float32 [B, V]."""
        logits = self.verify(ids)
        self.keep(1)
        return logits[:, -1]

    def verify(self, ids):
        """Logits float32 [B, T, V] of ids int32 [B, T] behind each sequence, which do not count as part of it yet.

        The caller says how many are to stay (`keep`); the next step overwrites the others.
        """
        return self._step(ids, ids.shape[1])

    def keep(self, count):
        """The first `count` tokens of the last step, an int or int32 [B], become part of the sequences."""
        self.cache.length = self.cache.length + count
        self.whole = True

    def step_back(self):
        """Shorten the one sequence to where a prefill can go on, with tokens that were not known before -> its length.

        A drafting engine computes the MTP layers' last rows anew, which have read guesses in their place; the rings
        have room for that.
        """
        self.cache.length = np.maximum(self.cache.length - Draft.window(self.drafts, self.depths), 0)
        return int(self.cache.length[0])

    def draft(self, texts):
        """Drafts int32 [B, num_draft_tokens] of what follows each text, and their logits float32 [B, drafts, V].

        texts: the known ids of each sequence, of which all but the last are in the cache.
        """
        window = Draft.window(self.drafts, self.depths)
        # In tensors that grow drafts take room, as much as verifying them will.
        _, _, capacity = self.shapes.compiled(self.cache, 1 + self.drafts, False)
        # Before the beginning of a short text the window holds rows that mean nothing and are seen by none.
        tokens = np.array([([0] * window + text[1:])[-window:] for text in texts], np.int32)
        starts = np.array([[len(text) - 1 - window] for text in texts], np.int32)
        step = self.model.function(Draft, self.cache.batch, self.drafts, capacity if self.drafts_grow else None)
        drafts, logits = step(ms.Tensor(tokens), ms.Tensor(starts), step.arguments(self.cache))
        return drafts.asnumpy(), logits

    def _step(self, ids, rows, count=None):
        """`rows` more rows; of a prefill, the first `count` are real."""
        self.whole = False
        prefill = count is not None
        sparse, chunk, capacity = self.shapes.compiled(self.cache, rows, prefill)
        step = self.model.function(Step, self.cache.batch, None if prefill else rows, sparse, self.drafts > 0, chunk,
                                   capacity)
        starts = ms.Tensor(np.ascontiguousarray(self.cache.length[:, None], np.int32))
        counted = () if chunk is None else (ms.Tensor([count], ms.int32),)
        logits = step(ms.Tensor(np.ascontiguousarray(ids, np.int32)), starts, step.arguments(self.cache), *counted)
        return logits.asnumpy()
