"""Generation with a cache: chunks of the prompt through one compiled step, then a token at a time."""
import time
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from pangu_ms.cache import DTYPE_BYTES, Cache
from pangu_ms.errors import PanguError
from pangu_ms.generation.request import check_request
from pangu_ms.model.step import Step

# Sparse attention gathers index_topk latent rows for each query of a prefill chunk: chunks are cut to hold them here.
GATHERED_BYTES = 2 ** 28


@dataclass(frozen=True)
class Piece:
    """One generated token, and what had been spent when it came. Seconds include the compilation of a first call."""

    token_id: int
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int  # that came out of decoding: the first token comes out of the prefill


class Engine:
    """A model and the cache of `batch` sequences of one length."""

    def __init__(self, model, batch=1, capacity=256):
        self.model, self.config = model, model.config
        self.plans = self.config.layers[:self.config.num_hidden_layers]
        self.cache = Cache(self.config, self.plans, batch, capacity, self.config.compute_dtype)
        self.selects = any(plan.kind == "dsa" for plan in self.plans)

    def prefill(self, ids, chunk=512, on_prefill=None):
        """Append ids int32 [B, T] to the sequences -> logits float32 [B, V] of their last token.

        In chunks of at most `chunk` rows; `on_prefill(done, total)` is called after each.
        """
        done, total = 0, ids.shape[1]
        while done < total:
            rows = self._rows(min(chunk, total - done))
            logits = self._step(ids[:, done:done + rows], decode=False)
            done += rows
            if on_prefill is not None:
                on_prefill(done, total)
        return logits

    def decode(self, ids):
        """Append one token to each sequence, ids int32 [B, 1] -> logits float32 [B, V]."""
        return self._step(ids, decode=True)

    def _rows(self, rows):
        """How many rows one step may take: DSA selects for all of them or for none, and memory is bounded."""
        if not self.selects:
            return rows
        dense = self.config.index_topk - self.cache.length
        if dense > 0:
            return min(rows, dense)
        row_bytes = (self.config.kv_lora_rank + self.config.qk_rope_head_dim) * DTYPE_BYTES[self.config.compute_dtype]
        return min(rows, max(1, GATHERED_BYTES // (self.cache.batch * self.config.index_topk * row_bytes)))

    def _step(self, ids, decode):
        start, end = self.cache.length, self.cache.length + ids.shape[1]
        self.cache.reserve(end)
        step = self.model.function(Step, self.cache.batch, decode, self.selects and end > self.config.index_topk)
        starts = ms.Tensor(np.full((self.cache.batch, 1), start, np.int32))
        logits = step(ms.Tensor(np.ascontiguousarray(ids, np.int32)), starts, ms.mutable(self.cache.tensors))
        self.cache.length = end
        return logits.asnumpy()[:, -1]


def stream_generate(model, ids, max_new_tokens, *, eos_token_ids=None, prefill_chunk=512, on_prefill=None):
    """Continue one sequence greedily, a `Piece` at a time.

    Args:
        model (PanguForCausalLM):
        ids (list[int]): the prompt.
        max_new_tokens (int): at most this many pieces.
        eos_token_ids: ids that end the text, themselves yielded; default: eos_token_id of the config.
        prefill_chunk (int): rows of the prompt computed at once.
        on_prefill: called as on_prefill(done, total) after each chunk.

    Raises:
        PanguError: see `check_request`; at the first piece.
    """
    check_request(model.config, ids, max_new_tokens)
    if prefill_chunk < 1:
        raise PanguError(f"prefill_chunk is {prefill_chunk}: wanted at least 1")
    if eos_token_ids is None:
        found = model.config.eos_token_id
        eos_token_ids = found if isinstance(found, tuple) else (found,)
    engine = Engine(model)
    started = time.perf_counter()
    logits = engine.prefill(np.array([ids], np.int32), prefill_chunk, on_prefill)
    prefilled = time.perf_counter()
    for produced in range(max_new_tokens):
        token_id = int(logits[0].argmax())
        yield Piece(token_id, engine.cache.bytes, prefilled - started, time.perf_counter() - prefilled,
                    len(ids), produced)
        if token_id in eos_token_ids or produced + 1 == max_new_tokens:
            return
        logits = engine.decode(np.array([[token_id]], np.int32))


def generate(model, ids, max_new_tokens, **options):
    """The new ids of `stream_generate`, as a list."""
    return [piece.token_id for piece in stream_generate(model, ids, max_new_tokens, **options)]
