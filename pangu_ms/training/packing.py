"""Sequences: documents packed into rows of one length, in an order that one integer continues.

Sequence n is the n-th of the whole run: sequence n % len of epoch n // len. It depends on the documents, the length,
the seed and n alone, so the number of sequences consumed says where a run goes on.
"""
import logging
from bisect import bisect_left, insort
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pangu_ms.errors import PanguError
from pangu_ms.training.data import Documents

logger = logging.getLogger(__name__)


class Sequence(NamedTuple):
    """One row of a batch, [T] each; the columns of a batch in their order."""

    input_ids: np.ndarray  # int32
    labels: np.ndarray  # int32: the token that this row predicts
    loss_mask: np.ndarray  # float32: 1.0 where that counts
    position_ids: np.ndarray  # int32: from 0 in each document


class PackedDataset:
    """Documents as sequences of one length, in every epoch in another order.

    Texts (`may_be_cut`) follow each other in the epoch's order, and the stream is cut every T tokens: a sequence begins
    and ends where it falls, and one of an epoch is padded. Then the sequences are put in another order, or a batch
    would hold parts of one long document. The parts of a cut document have positions of
    their own, from 0; the last row of a part still predicts the token that follows in the document, so every token but
    the first of a document is predicted once in an epoch. All epochs have the same tokens, so as many sequences.

    Chats are never cut. They are put together once (each where it leaves the least room, in an order drawn from the
    seed), the rest of a sequence is padding, and an epoch is an order of these sequences: their number stays the same.
    Chats longer than T are left out, and a warning counts them.

    The last row of a document has loss_mask 0. Padding is a document of its own, with pad_id and loss_mask 0.

    Args:
        sequence_length: T, in tokens.
        seed: of all orders.

    Attributes:
        dropped (list[str]): names of chats that are too long.

    Raises:
        PanguError: no sequence length, or no document that fits into it.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int):
        if sequence_length < 1:
            raise PanguError(f"sequence_length is {sequence_length}: wanted at least 1")
        self._documents = documents
        self._sequence_length = sequence_length
        lengths = np.diff(documents.offsets)
        too_long = np.flatnonzero(lengths > sequence_length) if not documents.may_be_cut else []
        self.dropped = [documents.names[i] for i in too_long]
        if len(self.dropped) == len(lengths):
            shortest = f", the shortest has {lengths.min()} tokens" if len(lengths) else ""
            raise PanguError(f"sequence_length is {sequence_length}: none of {len(lengths)} documents fits"
                             f"{shortest}: make it longer or bring other documents")
        if self.dropped:
            logger.warning("%d of %d chats are longer than %d tokens and left out, the first of them %s",
                           len(self.dropped), len(lengths), sequence_length, self.dropped[0])
        layout = _Stream if documents.may_be_cut else _Whole
        self._layout = layout(lengths, sequence_length, seed)

    def __len__(self):
        """Sequences in an epoch."""
        return len(self._layout)

    def __iter__(self):
        """The first epoch. Indices go on behind it, without end."""
        return (self[n] for n in range(len(self)))

    def __getitem__(self, n: int) -> Sequence:
        length, source = self._sequence_length, self._documents
        input_ids, labels = np.full((2, length), source.pad_id, np.int32)
        loss_mask, position_ids = np.zeros(length, np.float32), np.zeros(length, np.int32)
        row = 0
        for document, begin, end in self._parts(n):
            start, beyond = source.offsets[document:document + 2]
            size = end - begin
            following = slice(start + begin + 1, min(start + end + 1, beyond))  # what these rows predict
            predicting = slice(row, row + following.stop - following.start)
            input_ids[row:row + size] = source.ids[start + begin:start + end]
            labels[predicting] = source.ids[following]
            loss_mask[predicting] = source.counted[following]
            position_ids[row:row + size] = np.arange(size)
            row += size
        position_ids[row:] = np.arange(length - row)
        return Sequence(input_ids, labels, loss_mask, position_ids)

    def documents(self, n: int) -> list[str]:
        """Names of the documents of which sequence n holds something, in order."""
        return [self._documents.names[document] for document, _, _ in self._parts(n)]

    def _parts(self, n):
        """[(document, begin, end)]: which tokens of which documents sequence n holds."""
        if n < 0:
            raise IndexError(f"sequence {n}: they are counted from 0")
        return self._layout.parts(*divmod(n, len(self)))


class _Stream:
    """Documents end to end in an order of the epoch, cut every sequence_length tokens; then an order of the cuts."""

    def __init__(self, lengths, sequence_length, seed):
        self._lengths, self._sequence_length, self._seed = lengths, sequence_length, seed
        self._total = int(lengths.sum())
        self._order = lru_cache(2)(self._draw)  # readers may stand on both sides of an epoch's end

    def __len__(self):
        return -(-self._total // self._sequence_length)

    def _draw(self, epoch):
        """The order of the documents, the token of the epoch with which each of them ends, the order of the cuts."""
        draw = np.random.default_rng((self._seed, epoch))
        order = draw.permutation(len(self._lengths))
        return order, np.cumsum(self._lengths[order]), draw.permutation(len(self))

    def parts(self, epoch, i):
        order, ends, cuts = self._order(epoch)
        at = int(cuts[i]) * self._sequence_length
        stop = min(at + self._sequence_length, self._total)
        found, place = [], int(np.searchsorted(ends, at, side="right"))
        while at < stop:
            document, end = int(order[place]), int(min(ends[place], stop))
            first = int(ends[place] - self._lengths[document])
            found.append((document, at - first, end - first))
            at, place = end, place + 1
        return found


class _Whole:
    """Whole documents that fit, put together once, best fit; an epoch is an order of these sequences."""

    def __init__(self, lengths, sequence_length, seed):
        self._lengths, self._seed = lengths, seed
        self._sequences = []
        rooms = []  # (tokens left, sequence), least room first
        for document in np.random.default_rng(seed).permutation(np.flatnonzero(lengths <= sequence_length)):
            length = int(lengths[document])
            place = bisect_left(rooms, (length, 0))
            if place == len(rooms):
                room, sequence = sequence_length, len(self._sequences)
                self._sequences.append([])
            else:
                room, sequence = rooms.pop(place)
            self._sequences[sequence].append(int(document))
            if room > length:
                insort(rooms, (room - length, sequence))
        self._order = lru_cache(2)(self._draw)

    def __len__(self):
        return len(self._sequences)

    def _draw(self, epoch):
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._sequences))

    def parts(self, epoch, i):
        return [(document, 0, int(self._lengths[document])) for document in self._sequences[self._order(epoch)[i]]]
