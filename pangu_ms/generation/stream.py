"""Text generation: the loop of drafting, verifying and accepting, and what it yields."""
import time
from dataclasses import dataclass

import numpy as np

from pangu_ms.cache import Cache
from pangu_ms.errors import PanguError
from pangu_ms.generation.engine import Engine
from pangu_ms.generation.request import check_request
from pangu_ms.generation.sampling import Sampler, Sampling
from pangu_ms.generation.text import TextStream


@dataclass(frozen=True)
class Piece:
    """One generated token, and what had been spent when it came. Seconds include the compilation of a first call."""

    token_id: int
    text: str | None  # that it adds; "" while a character or a stop string is unfinished; None without a tokenizer
    source: int  # 0: the model itself; d: the draft of depth d, accepted by it
    tokens_per_second: float  # of decoding
    cache_bytes: int  # of the tensors as they lie, spare capacity included
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int  # computed, those that a continuation knows left out
    decode_tokens: int  # that came out of decoding: the first token comes out of the prefill
    drafted: tuple[int, ...]  # by depth
    accepted: tuple[int, ...]


class Sequence:
    """One sequence of a batch while it is generated."""

    def __init__(self, ids, sampler, max_new_tokens, eos_token_ids):
        self.text, self.sampler, self.room, self.eos_token_ids = list(ids), sampler, max_new_tokens, eos_token_ids

    @property
    def ended(self):
        return self.room == 0

    def accept(self, token_id):
        self.sampler.accept(token_id)
        self.text.append(token_id)
        self.room = 0 if token_id in self.eos_token_ids else self.room - 1


def decode(engine, sequences, logits):
    """Go on from prefilled sequences: yields for each step a list over sequences of their new (token_id, source).

    Greedy or sampled, the text is what it would be without drafts: a draft counts only where the model's own choice,
    made from the same logits, falls on it (`Sampler.verify`). Nothing is undone for the others: the cache's length
    does not include them.
    """
    firsts = []
    for sequence, row in zip(sequences, logits):
        token_id = sequence.sampler.choose(row)
        sequence.accept(token_id)
        firsts.append([(token_id, 0)])
    yield firsts
    while not all(sequence.ended for sequence in sequences):
        last = np.array([sequence.text[-1:] for sequence in sequences], np.int32)           # [B, 1]
        if engine.drafts:
            drafts, _ = engine.draft([sequence.text for sequence in sequences])             # [B, K]
        else:
            drafts = np.empty((len(sequences), 0), np.int32)
        logits = engine.verify(np.concatenate((last, drafts), 1))                           # [B, 1 + K, V]
        kept, news = np.zeros(len(sequences), np.int32), []
        for b, sequence in enumerate(sequences):
            new = []
            if not sequence.ended:
                accepted, own = sequence.sampler.verify(logits[b], drafts[b])
                found = [(int(token_id), depth) for depth, token_id in enumerate(drafts[b][:accepted], 1)] + [(own, 0)]
                for token_id, source in found:
                    if not sequence.ended:
                        sequence.accept(token_id)
                        new.append((token_id, source))
                kept[b] = len(new)
            news.append(new)
        engine.keep(kept)
        yield news


def stream_generate(model, ids, max_new_tokens, *, tokenizer=None, stop=(), sampling=None, num_draft_tokens=0,
                    eos_token_ids=None, prefill_chunk=512, on_prefill=None, continuation=None):
    """Continue one sequence, a `Piece` at a time.

    Args:
        model (PanguForCausalLM):
        ids (list[int]): the prompt.
        max_new_tokens (int): at most this many pieces.
        tokenizer (TextTokenizer): makes text of the ids, see `load_tokenizer`; default: none, and pieces have no text.
        stop: strings that end the text, themselves left out; for a tokenizer.
        sampling (Sampling): default: greedy.
        num_draft_tokens (int): tokens that the MTP layers draft in each step, for the model to verify at once.
        eos_token_ids: ids that end the text, themselves yielded; default: eos_token_id of the config.
        prefill_chunk (int): rows of the prompt computed at once.
        on_prefill: called after each chunk as on_prefill(length): so many tokens of the prompt are done.
        continuation (Continuation): of the calls before, with prompts that this one begins like; the text is the same
            without it.

    Raises:
        PanguError: see `check_request`; an empty stop string, or any without a tokenizer; at the first piece.
    """
    if stop and tokenizer is None:
        raise PanguError(f"stop is {stop!r}, and there is no tokenizer to make text: give one or leave stop out")
    text = tokenizer and TextStream(tokenizer, stop)
    sampling = sampling or Sampling()
    check_request(model.config, ids, max_new_tokens, num_draft_tokens)
    if prefill_chunk < 1:
        raise PanguError(f"prefill_chunk is {prefill_chunk}: wanted at least 1")
    engine = Engine(model, num_draft_tokens=num_draft_tokens, expected=len(ids) + max_new_tokens)
    sequence = Sequence(ids, Sampler(sampling, ids), max_new_tokens, _eos(model.config, eos_token_ids))
    started = time.perf_counter()
    if continuation is None:
        logits, known = engine.prefill([ids], prefill_chunk, on_prefill), 0
    else:
        logits, known = continuation.prefill(engine, ids, prefill_chunk, on_prefill)
    prefilled = time.perf_counter()
    drafted, accepted = np.zeros(num_draft_tokens, int), np.zeros(num_draft_tokens, int)
    produced = 0
    try:
        for step, (new,) in enumerate(decode(engine, [sequence], logits)):
            seconds = time.perf_counter() - prefilled
            drafted += step > 0
            for i, (token_id, source) in enumerate(new, 1):
                if source:
                    accepted[source - 1] += 1
                shown = text and text.push(token_id, last=sequence.ended and i == len(new))
                yield Piece(token_id, shown, source, produced / seconds if produced else 0.0, engine.cache.bytes,
                            prefilled - started, seconds, len(ids) - known, produced,
                            tuple(drafted.tolist()), tuple(accepted.tolist()))
                if text and text.stopped:
                    return
                produced += 1
    finally:
        if continuation is not None:
            continuation.keep(sequence.text)


def generate(model, ids, max_new_tokens, **options):
    """The new ids of `stream_generate`, as a list."""
    return [piece.token_id for piece in stream_generate(model, ids, max_new_tokens, **options)]


def generate_batch(model, prompts, max_new_tokens, *, sampling=None, num_draft_tokens=0, eos_token_ids=None,
                   prefill_chunk=512):
    """Continue several prompts of any lengths at once -> a list of the new ids of each, as `generate` alone gives.

    Each prompt is prefilled by itself, then all decode together until the last one ends.
    """
    sampling = sampling or Sampling()
    caches, logits, sequences = [], [], []
    for ids in prompts:
        check_request(model.config, ids, max_new_tokens, num_draft_tokens)
    expected = max(map(len, prompts), default=0) + max_new_tokens
    for ids in prompts:
        engine = Engine(model, num_draft_tokens=num_draft_tokens, expected=expected)
        logits.append(engine.prefill([ids], prefill_chunk)[0])
        caches.append(engine.cache)
        sequences.append(Sequence(ids, Sampler(sampling, ids), max_new_tokens, _eos(model.config, eos_token_ids)))
    engine.cache = Cache.stack(caches)
    for _ in decode(engine, sequences, logits):
        pass
    return [sequence.text[len(ids):] for sequence, ids in zip(sequences, prompts)]


def _eos(config, eos_token_ids):
    found = config.eos_token_id if eos_token_ids is None else eos_token_ids
    return () if found is None else found if isinstance(found, (tuple, list)) else (found,)
