"""The compiled steps of a model and the cache they work on."""
import mindspore as ms
import numpy as np

from pangu_ms.cache import DTYPE_BYTES, Cache
from pangu_ms.model.step import SLACK, Draft, Step
from pangu_ms.ops.ascend_attention import gathers_no_rows

# Sparse attention gathers index_topk latent rows for each query of a prefill chunk, and the indexer scores every
# earlier row for each of its heads: chunks are cut so that neither takes more than this, at a few copies of each.
# Not so where fused operators read the rows where they lie.
CHUNK_BYTES = 2 ** 26


class Engine:
    """`batch` sequences of a model.

    Sequences may differ in length: each has its own in `cache.length`. `num_draft_tokens` above 0 prepares for
    `draft`, which costs the MTP layers' share of the cache and of the prefill.

    Where the device wants fixed shapes, a prefill step has exactly `chunk` rows, padded at the end, and the capacity
    belongs to what is compiled. So it is index_topk while DSA layers see everything, and when they begin to select it
    grows at once to what is enough for `expected` positions, which is of no effect otherwise.

    Attributes:
        cache (Cache):
        whole (bool): the cache holds its `length` tokens of each sequence; not so while a step is under way, nor after
            one that was cut short, which may have written over rows that the rings still need.
    """

    def __init__(self, model, batch=1, capacity=256, num_draft_tokens=0, expected=0):
        self.model, self.config, self.drafts = model, model.config, num_draft_tokens
        self.depths = self.config.num_nextn_predict_layers if num_draft_tokens else 0
        plans = self.config.layers[:self.config.num_hidden_layers + self.depths]
        self.selects = any(plan.kind == "dsa" for plan in plans)
        self.fixed, self.expected = wants_fixed_shapes(), expected + num_draft_tokens
        if self.fixed and self.selects:
            capacity = self.config.index_topk
        self.cache = Cache(self.config, plans, batch, capacity, self.config.compute_dtype, SLACK if self.drafts else 0,
                           model.parallel.tensor)
        self.whole = True

    def prefill(self, ids, chunk=512, on_prefill=None):
        """Append ids int32 [B, T] to every sequence -> logits float32 [B, V] of their last token.

        In chunks of at most `chunk` rows; `on_prefill(length)` is called after each, with the length of the longest.
        """
        done, total = 0, len(ids[0])
        self.expected = max(self.expected, int(self.cache.length.max()) + total + chunk)        # padding included
        ahead = np.pad(ids, ((0, 0), (0, self.depths + chunk)))                 # what a drafting step reads ahead
        while done < total:
            rows = self._rows(chunk, total - done)
            logits = self._step(ahead[:, done:done + rows + self.depths], rows, min(rows, total - done))
            self.keep(min(rows, total - done))
            done += rows
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
        # Before the beginning of a short text the window holds rows that mean nothing and are seen by none.
        tokens = np.array([([0] * window + text[1:])[-window:] for text in texts], np.int32)
        starts = np.array([[len(text) - 1 - window] for text in texts], np.int32)
        step = self.model.function(Draft, self.cache.batch, self.drafts)
        trunk = self.config.num_hidden_layers
        memory = self.cache.tensors[trunk:][:min(self.drafts, self.depths)] + self.cache.tensors[-1:]
        drafts, logits = step(ms.Tensor(tokens), ms.Tensor(starts), ms.mutable(memory))
        return drafts.asnumpy(), logits

    def _rows(self, chunk, left):
        """How many rows the next step of a prefill has, padding included.

        DSA selects for all of them or for none, and memory is bounded.
        """
        rows, config = chunk if self.fixed else min(chunk, left), self.config
        if not self.selects or self.fixed and gathers_no_rows(config):
            return rows
        length = int(self.cache.length.max())
        if self.fixed:
            if max(length + rows, self.cache.capacity) <= config.index_topk:
                return rows
            self.cache.reserve(self.expected)
        elif length < config.index_topk:
            return min(rows, config.index_topk - length)
        gathered = config.index_topk * (config.kv_lora_rank + config.qk_rope_head_dim)
        gathered *= DTYPE_BYTES[config.compute_dtype]
        scored = self.cache.capacity * config.index_n_heads * DTYPE_BYTES["float32"]
        return min(rows, max(1, CHUNK_BYTES // (self.cache.batch * max(gathered, scored))))

    def _step(self, ids, rows, count=None):
        """`rows` more rows; of a prefill, the first `count` are real."""
        self.whole = False
        end = int(self.cache.length.max()) + rows
        sparse = self.selects and end > self.config.index_topk
        length, fixed, counted = rows if count is None else None, None, ()
        if self.fixed:
            sparse = sparse or self.selects and self.cache.capacity > self.config.index_topk
            self.cache.reserve(max(end, self.expected) if sparse or not self.selects else end)
            fixed = (None, self.cache.capacity) if count is None else (rows, self.cache.capacity)
            counted = () if count is None else (ms.Tensor([count], ms.int32),)
        else:
            self.cache.reserve(end)
        step = self.model.function(Step, self.cache.batch, length, sparse, self.drafts > 0, fixed)
        starts = ms.Tensor(np.ascontiguousarray(self.cache.length[:, None], np.int32))
        memory = self.cache.tensors
        if count is None and self.drafts:                                       # the MTP layers wait for `draft`
            memory = memory[:self.config.num_hidden_layers] + memory[-1:]
        logits = step(ms.Tensor(np.ascontiguousarray(ids, np.int32)), starts, ms.mutable(memory), *counted)
        return logits.asnumpy()


def wants_fixed_shapes():
    """Ascend works best on a graph whose every shape is known; on a CPU padding would cost more than it saves."""
    return ms.get_context("device_target") == "Ascend"
