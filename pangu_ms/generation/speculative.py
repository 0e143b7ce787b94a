"""Draft, verify, accept: the loop of decoding (section 8).

Greedy or sampled, the text is what it would be without drafts: a draft counts only where the model's own choice, made
from the same logits, falls on it (`Sampler.verify`). Nothing is undone for the others: the cache's length does not
include them.
"""
from typing import NamedTuple

import numpy as np


class Token(NamedTuple):
    """A new token of a sequence: its depth among the drafts, 0 for the model's own, and the logits [V] it came from."""

    token_id: int
    draft_depth: int
    logits: np.ndarray


class Sequence:
    """One sequence of a batch while it is generated.

    Args:
        ids: the prompt.
        max_new_tokens: so many tokens may follow it.
        eos_token_ids: end the text, themselves part of it.

    Attributes:
        ids: prompt and what has come.
        finish_reason: None while it goes on, then "stop" or "length".
    """

    def __init__(self, ids, sampler, max_new_tokens, eos_token_ids):
        self.ids, self.sampler, self.room, self.eos_token_ids = list(ids), sampler, max_new_tokens, eos_token_ids
        self.finish_reason = None

    def append(self, token_id):
        self.sampler.accept(token_id)
        self.ids.append(token_id)
        self.room -= 1
        self.finish_reason = "stop" if token_id in self.eos_token_ids else None if self.room else "length"

    def choose(self, logits):
        """The model's own next token, from logits float32 [V] -> [Token]."""
        token = Token(self.sampler.choose(logits), 0, logits)
        self.append(token.token_id)
        return [token]

    def accept(self, logits, drafts):
        """What becomes of drafts [K], from logits float32 [1 + K, V]: those accepted, then the model's own token."""
        if self.finish_reason:
            return []
        accepted, own = self.sampler.verify(logits, drafts)
        found = [Token(int(token_id), depth, logits[depth - 1]) for depth, token_id in enumerate(drafts[:accepted], 1)]
        new = []
        for token in found + [Token(own, 0, logits[accepted])]:
            if not self.finish_reason:
                self.append(token.token_id)
                new.append(token)
        return new


def decode(engine, sequences, logits):
    """Go on from prefilled sequences, whose last tokens gave logits [B, V]; yields a list over sequences of [Token]."""
    yield [sequence.choose(row) for sequence, row in zip(sequences, logits)]
    while not all(sequence.finish_reason for sequence in sequences):
        last = np.array([sequence.ids[-1:] for sequence in sequences], np.int32)            # [B, 1]
        drafts = np.empty((len(sequences), 0), np.int32)
        if engine.drafts:
            drafts, _ = engine.draft([sequence.ids for sequence in sequences])              # [B, K]
        logits = engine.verify(np.concatenate((last, drafts), 1))               # [B, 1 + K, V]
        news = [sequence.accept(*rows) for sequence, *rows in zip(sequences, logits, drafts)]
        engine.keep(np.array([len(new) for new in news], np.int32))
        yield news
