"""Sequences: documents packed into sequences of one length, in an order that one integer continues.

Sequence n is the n-th of the whole run: sequence n % len of epoch n // len. It depends on the documents, the length,
the seed and n alone. So the number of sequences that a run has consumed says where it goes on.
"""
import logging
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pangu_ms.errors import PanguError
from pangu_ms.training.data.best_fit import BestFit
from pangu_ms.training.data.documents import Documents

logger = logging.getLogger(__name__)


class Sequence(NamedTuple):
    """What a batch holds of one sequence, [T] each, in the order of a batch's columns."""

    input_ids: np.ndarray  # int32
    labels: np.ndarray  # int32, the token that is to be predicted here
    loss_mask: np.ndarray  # float32, 1.0 where that counts
    position_ids: np.ndarray  # int32, from 0 in each document


COLUMNS = list(Sequence._fields)


class PackedDataset:
    """Documents as sequences of one length, in another order in every epoch. All epochs have as many sequences.

    Texts (`may_be_cut`) are put end to end in the epoch's order and cut every T tokens; the last sequence is padded.
    The sequences are then shuffled, so that a batch does not hold the parts of one long document. A part of a cut
    document has positions of its own, from 0. Its last token still predicts the token that follows in the document, so
    every token but the first of a document is predicted once in an epoch.

    Chats are never cut. They are packed once, best fit, see `best_fit.py`. The rest of a sequence is padding, and an
    epoch is an order of these sequences. Chats longer than T are left out, and a warning counts them. Empty documents
    are left out without a word.

    The last token of a document predicts nothing: its loss_mask is 0. Padding is a document of its own, of pad_id, with
    loss_mask 0.

    Args:
        documents: all documents of the run.
        sequence_length: T, in tokens.
        seed: decides all orders.
        min_length, max_length: documents of fewer or more tokens are left out; None: there is no such bound.

    Attributes:
        dropped (list[str]): names of the chats that are too long.

    Raises:
        PanguError: the sequence length is below 1, or no document fits into it or between the two lengths.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int, min_length: int | None = None,
                 max_length: int | None = None):
        if sequence_length < 1:
            raise PanguError(f"sequence_length is {sequence_length}: wanted at least 1")
        self._documents = documents
        self._sequence_length = sequence_length
        lengths = np.diff(documents.offsets)
        longest = lengths.max(initial=0) if max_length is None else max_length
        wanted = (lengths >= (min_length or 0)) & (lengths <= longest)
        if len(lengths) and not wanted.any():
            raise PanguError(f"none of {len(lengths)} documents has {min_length or 0} to {longest} tokens: they have "
                             f"{lengths.min()} to {lengths.max()}; change min_document_length or max_document_length")
        self._kept = np.flatnonzero(wanted)  # places in `documents`; the packing counts these alone
        lengths = lengths[wanted]
        too_long = np.flatnonzero(lengths > sequence_length) if not documents.may_be_cut else []
        self.dropped = [documents.names[self._kept[i]] for i in too_long]
        if len(self.dropped) == np.count_nonzero(lengths):
            shortest = f", the shortest has {lengths.min()} tokens" if len(lengths) else ""
            raise PanguError(f"sequence_length is {sequence_length}: none of {len(lengths)} documents fits"
                             f"{shortest}: make it longer or bring other documents")
        if self.dropped:
            logger.warning("%d of %d chats are longer than %d tokens and left out, the first of them %s",
                           len(self.dropped), len(lengths), sequence_length, self.dropped[0])
        packing = _EndToEnd if documents.may_be_cut else BestFit
        self._packing = packing(lengths, sequence_length, seed)

    def __len__(self):
        """How many sequences an epoch has."""
        return len(self._packing)

    def __iter__(self):
        """The sequences of the first epoch. An index may be any number from 0: epochs follow without end."""
        return (self[n] for n in range(len(self)))

    def __getitem__(self, n: int) -> Sequence:
        length, source = self._sequence_length, self._documents
        input_ids, labels = np.full((2, length), source.pad_id, np.int32)
        loss_mask, position_ids = np.zeros(length, np.float32), np.zeros(length, np.int32)
        filled = 0
        for document, begin, end in self._parts(n):
            start, beyond = source.offsets[document:document + 2]
            size = end - begin
            following = slice(start + begin + 1, min(start + end + 1, beyond))  # what these tokens predict
            predicting = slice(filled, filled + following.stop - following.start)
            input_ids[filled:filled + size] = source.ids[start + begin:start + end]
            labels[predicting] = source.ids[following]
            loss_mask[predicting] = source.counted[following]
            position_ids[filled:filled + size] = np.arange(size)
            filled += size
        position_ids[filled:] = np.arange(length - filled)
        return Sequence(input_ids, labels, loss_mask, position_ids)

    def documents(self, n: int) -> list[str]:
        """The names of the documents that sequence n holds something of, in its order."""
        return [self._documents.names[document] for document, _, _ in self._parts(n)]

    def _parts(self, n):
        """Which tokens of which documents sequence n holds: [(document, begin, end)]."""
        if n < 0:
            raise IndexError(f"sequence {n}: they are counted from 0")
        return [(int(self._kept[i]), begin, end) for i, begin, end in self._packing.parts(*divmod(n, len(self)))]


class _EndToEnd:
    """Documents end to end in the epoch's order, cut every sequence_length tokens. The cuts have an order of their own.
    """

    def __init__(self, lengths, sequence_length, seed):
        self._lengths, self._sequence_length, self._seed = lengths, sequence_length, seed
        self._total = int(lengths.sum())
        self._order = lru_cache(2)(self._draw)  # of two epochs: readers may stand on both sides of an epoch's end

    def __len__(self):
        return -(-self._total // self._sequence_length)

    def _draw(self, epoch):
        """(the order of the documents, how many tokens of the epoch each of them ends after, the order of the cuts)."""
        draw = np.random.default_rng((self._seed, epoch))
        order = draw.permutation(len(self._lengths))
        return order, np.cumsum(self._lengths[order]), draw.permutation(len(self))

    def parts(self, epoch, i):
        order, ends, cuts = self._order(epoch)
        token = int(cuts[i]) * self._sequence_length  # of the epoch
        stop = min(token + self._sequence_length, self._total)
        found, place = [], int(np.searchsorted(ends, token, side="right"))
        while token < stop:
            document, end = int(order[place]), int(min(ends[place], stop))
            first = int(ends[place] - self._lengths[document])
            if end > token:  # it is not empty
                found.append((document, token - first, end - first))
            token, place = end, place + 1
        return found
