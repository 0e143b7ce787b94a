"""What generation gives for each token."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities that the model gives, before anything is done to its logits for sampling.

    Attributes:
        token: of the token that was chosen.
        top: the likeliest ids with theirs, best first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token, and what had been spent when it came. Seconds include the compilation of a first call.

    Attributes:
        text: that the token adds; "" while a character or a stop string is unfinished; None without a tokenizer.
        token_id:
        draft_depth: 0: the model's own token; d: the draft of depth d, accepted by the model.
        finish_reason: None while the text goes on; at the last token "stop" (an end-of-text id or a stop string) or
            "length" (as many tokens as were asked for).
        logprobs (Logprobs): None unless asked for.
        tokens_per_second: of decoding.
        cache_bytes: of the tensors as they lie, spare capacity included.
        prefill_tokens: computed, those that a continuation knows left out.
        decode_tokens: that came out of decoding: the first token comes out of the prefill.
        drafted, accepted: numbers of drafts by depth.
    """

    text: str | None
    token_id: int
    draft_depth: int
    finish_reason: str | None
    logprobs: Logprobs | None
    tokens_per_second: float
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]


def logprobs_of(logits: np.ndarray, token_id: int, count: int) -> Logprobs:
    """Of logits float32 [V]: the chosen token's, and the `count` likeliest."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    best = np.argsort(-wide, kind="stable")[:count]
    return Logprobs(float(wide[token_id]), tuple((int(i), float(wide[i])) for i in best))
