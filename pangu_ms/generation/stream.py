"""Text generation: prompts in, responses out, a token at a time or several prompts at once."""
import time

import numpy as np

from pangu_ms.cache.state import Cache
from pangu_ms.errors import PanguError
from pangu_ms.generation.chunks import PREFILL_CHUNK
from pangu_ms.generation.engine import Engine
from pangu_ms.generation.request import check_request
from pangu_ms.generation.response import GenerationResponse, logprobs_of
from pangu_ms.generation.sampling import Sampler, Sampling
from pangu_ms.generation.speculative import Sequence, decode
from pangu_ms.text.tokenizer import TextStream


def stream_generate(model, ids, max_new_tokens, *, tokenizer=None, stop=(), sampling=None, num_draft_tokens=0,
                    eos_token_ids=None, prefill_chunk=PREFILL_CHUNK, on_prefill=None, continuation=None, logprobs=None):
    """Continue one sequence, a `GenerationResponse` at a time.

    Args:
        model (PanguForCausalLM):
        ids (list[int]): the prompt.
        max_new_tokens (int): at most this many responses.
        tokenizer: makes text of the ids, see `load_tokenizer`; default: none, and responses have no text.
        stop: strings that end the text, themselves left out; for a tokenizer.
        sampling (Sampling): default: greedy.
        num_draft_tokens (int): tokens that the MTP layers draft in each step, for the model to verify at once.
        eos_token_ids: ids that end the text, themselves given; default: eos_token_id of the config.
        prefill_chunk (int): rows of the prompt computed at once.
        on_prefill: called after each chunk as on_prefill(length): so many tokens of the prompt are done.
        continuation (Continuation): of the calls before, with prompts that this one begins like; the text is the same
            without it.
        logprobs (int): give the probability of each token, and of so many of the likeliest.

    Raises:
        PanguError: see `check_request`; an empty stop string, or any without a tokenizer; at the first response.
    """
    if stop and tokenizer is None:
        raise PanguError(f"stop is {stop!r}, and there is no tokenizer to make text: give one or leave stop out")
    text = tokenizer and TextStream(tokenizer, stop)
    sequence = _sequence(model, ids, max_new_tokens, num_draft_tokens, sampling, eos_token_ids)
    if prefill_chunk < 1:
        raise PanguError(f"prefill_chunk is {prefill_chunk}: wanted at least 1")
    engine = Engine(model, num_draft_tokens=num_draft_tokens, expected=len(ids) + max_new_tokens)
    started = time.perf_counter()
    if continuation is None:
        logits, known = engine.prefill([ids], prefill_chunk, on_prefill), 0
    else:
        logits, known = continuation.prefill(engine, ids, prefill_chunk, on_prefill)
    prefilled = time.perf_counter()
    drafted, accepted, produced = [0] * num_draft_tokens, [0] * num_draft_tokens, 0
    try:
        for step, (new,) in enumerate(decode(engine, [sequence], logits)):
            seconds = time.perf_counter() - prefilled
            drafted = [count + (step > 0) for count in drafted]
            for i, token in enumerate(new, 1):
                if token.draft_depth:
                    accepted[token.draft_depth - 1] += 1
                reason = sequence.finish_reason if i == len(new) else None
                shown = text and text.push(token.token_id, last=reason is not None)
                stopped = text and text.stopped
                yield GenerationResponse(
                    text=shown, token_id=token.token_id, draft_depth=token.draft_depth,
                    finish_reason="stop" if stopped else reason,
                    logprobs=None if logprobs is None else logprobs_of(token.logits, token.token_id, logprobs),
                    tokens_per_second=produced / seconds if produced else 0.0, cache_bytes=engine.cache.bytes,
                    prefill_seconds=prefilled - started, decode_seconds=seconds, prefill_tokens=len(ids) - known,
                    decode_tokens=produced, drafted=tuple(drafted), accepted=tuple(accepted))
                if stopped:
                    return
                produced += 1
    finally:
        if continuation is not None:
            continuation.keep(sequence.ids)


def generate(model, ids, max_new_tokens, **options):
    """The new ids of `stream_generate`, as a list."""
    return [response.token_id for response in stream_generate(model, ids, max_new_tokens, **options)]


def generate_batch(model, prompts, max_new_tokens, *, sampling=None, num_draft_tokens=0, eos_token_ids=None,
                   prefill_chunk=PREFILL_CHUNK):
    """Continue several prompts of any lengths at once -> a list of the new ids of each, as `generate` alone gives.

    Each prompt is prefilled by itself, then all decode together until the last one ends.
    """
    sequences = [_sequence(model, ids, max_new_tokens, num_draft_tokens, sampling, eos_token_ids) for ids in prompts]
    if not sequences:
        return []
    logits, caches, expected = [], [], max(map(len, prompts)) + max_new_tokens
    for ids in prompts:
        engine = Engine(model, num_draft_tokens=num_draft_tokens, expected=expected)
        logits.append(engine.prefill([ids], prefill_chunk)[0])
        caches.append(engine.cache)
    engine.cache = Cache.stack(caches)
    for _ in decode(engine, sequences, np.stack(logits)):
        pass
    return [sequence.ids[len(ids):] for sequence, ids in zip(sequences, prompts)]


def _sequence(model, ids, max_new_tokens, num_draft_tokens, sampling, eos_token_ids):
    """A request that has been checked, as a sequence; its end is that of the config unless `eos_token_ids` says."""
    check_request(model.plan, ids, max_new_tokens, num_draft_tokens)
    found = model.config.eos_token_id if eos_token_ids is None else eos_token_ids
    ends = () if found is None else tuple(found) if isinstance(found, tuple | list) else (found,)
    return Sequence(ids, Sampler(sampling or Sampling(), ids), max_new_tokens, ends)
