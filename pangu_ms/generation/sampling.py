"""Choosing tokens: from logits to probabilities to an id, alone or with drafts to verify. numpy on the host."""
import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from pangu_ms.errors import PanguError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    Raises:
        PanguError: a field is out of its range; names the first.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep this many of the likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest whose probabilities reach this together
    min_p: float = 0.0  # drop what is less probable than this share of the likeliest
    repetition_penalty: float = 1.0  # above 1: what the text already holds becomes less likely
    seed: int = 0
    vocab_size: int | None = None  # ids of the tokenizer: the model's vocabulary is padded past them; None: not padded

    def __post_init__(self):
        for name, kind, fits, wanted in (
                ("temperature", Real, lambda x: 0 <= x < math.inf, "0 (greedy) or a positive number"),
                ("top_k", Integral, lambda x: x >= 0, "0 (no limit) or a positive integer"),
                ("top_p", Real, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
                ("min_p", Real, lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
                ("repetition_penalty", Real, lambda x: 0 < x < math.inf, "a positive number (1 is no penalty)"),
                ("seed", Integral, lambda x: x >= 0, "0 or a positive integer"),
                ("vocab_size", Integral | None, lambda x: x is None or x >= 1, "None or a positive integer")):
            found = getattr(self, name)
            if not isinstance(found, kind) or not fits(found):
                raise PanguError(f"{name} is {found!r}: wanted {wanted}")


class Sampler:
    """Chooses the tokens of one sequence, and knows what the sequence holds so far.

    Its random numbers depend on the seed alone, one for each token of the text: the same seed and prompt give the same
    text in a batch of any size, at any row, and with and without drafts.

    Args:
        sampling (Sampling):
        prompt_ids: what the repetition penalty sees before the first new token.
    """

    def __init__(self, sampling, prompt_ids):
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._history = set(map(int, prompt_ids))

    def accept(self, token_id):
        """The sequence goes on with this token: for each one that `choose` and `verify` gave, in order."""
        self._history.add(int(token_id))

    def choose(self, logits):
        """The next token of plain decoding, from logits float32 [V]."""
        return self._draw(self.probabilities(logits, self._history))

    def verify(self, target_logits, drafts):
        """How many of the drafts to keep, and the token behind them.

        The target's own token is drawn for each row, and the longest prefix of the drafts that agrees is kept: a draft
        with the probability that it has in the target, and in its place, where it is refused, comes a token of the
        same distribution without it. So the text is what plain sampling would have it, whatever the drafts are.

        Args:
            target_logits: float32 [1 + k, V]; row i has seen the drafts before i.
            drafts: k token ids.

        Returns:
            (accepted_count, next_token); the history is left alone.
        """
        history = set(self._history)
        for i, draft in enumerate(drafts):
            own = self._draw(self.probabilities(target_logits[i], history))
            if own != draft:
                return i, own
            history.add(own)
        return len(drafts), self._draw(self.probabilities(target_logits[len(drafts)], history))

    def probabilities(self, logits, history):
        """Logits float32 [V] after every processor: float64 [V].

        In order: ids beyond vocab_size out; repetition penalty (logits of ids in `history` divided by it where
        positive, else multiplied); temperature; top-k; top-p; min-p. Of equals the lowest ids are kept. Greedy is one
        at the largest logit after the penalty.
        """
        sampling, x = self.sampling, np.array(logits, np.float64)
        if sampling.vocab_size is not None:
            x[sampling.vocab_size:] = -np.inf
        if sampling.repetition_penalty != 1:
            seen = np.fromiter(history, np.int64)
            x[seen] *= np.where(x[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return _one_hot(x.argmax(), len(x))
        with np.errstate(over="ignore"):  # a temperature next to 0 sends all but the likeliest to -inf, as it should
            x = (x - x.max()) / sampling.temperature
        if 0 < sampling.top_k < len(x):
            x[~_top_k(x, sampling.top_k)] = -np.inf
        p = np.exp(x)
        p /= p.sum()
        if sampling.top_p < 1:
            p[~_top_p(p, sampling.top_p)] = 0
        p[p < sampling.min_p * p.max()] = 0
        return p / p.sum()

    def _draw(self, weights):
        """An id drawn in proportion to weights [V], which need not sum to 1."""
        support = np.flatnonzero(weights)
        sums = np.cumsum(weights[support])
        place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        return int(support[min(place, len(support) - 1)])  # the product may round up to the sum itself


def _top_k(x, k):
    """Which k of x [V] are largest."""
    threshold = np.partition(x, -k)[-k]
    keep = x > threshold
    keep[np.flatnonzero(x == threshold)[:k - keep.sum()]] = True
    return keep


def _top_p(p, share):
    """Which of p [V], largest first, reach `share` together."""
    # Those of at most (1 - share) / V sum to at most 1 - share: the others reach it, and they are few to sort.
    candidates = np.flatnonzero(p > (1 - share) / len(p))
    candidates = candidates[np.argsort(-p[candidates], kind="stable")]
    before = np.cumsum(p[candidates]) - p[candidates]
    keep = np.zeros(len(p), bool)
    keep[candidates[before < share]] = True
    return keep


def _one_hot(token_id, size):
    p = np.zeros(size)
    p[token_id] = 1
    return p
