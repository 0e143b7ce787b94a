"""Best fit: whole documents packed into sequences that leave little room, by their lengths alone.

The packing is made of lengths and how many documents have each, as in Krell et al. (2021), "Efficient Sequence Packing
without Cross-contamination": millions of documents have thousands of lengths. Only numpy touches each document.
"""
from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np


class BestFit:
    """The documents that fit, whole, packed once; an epoch is an order of these sequences.

    The longest come first, each into the sequence that it leaves the least room in. Which of several documents of one
    length goes where is drawn from the seed. Empty documents are left out.

    Args:
        lengths: int [D], in tokens; one is from 1 to sequence_length.
        sequence_length: in tokens.
        seed: of the documents and of the order in each epoch.
    """

    def __init__(self, lengths, sequence_length, seed):
        self._lengths, self._seed = lengths, seed
        fitting = np.random.default_rng(seed).permutation(np.flatnonzero((lengths > 0) & (lengths <= sequence_length)))
        fitting = fitting[np.argsort(-lengths[fitting], kind="stable")]
        counts = np.bincount(lengths[fitting])
        sizes = np.flatnonzero(counts)[::-1]
        groups = pack(sizes.tolist(), counts[sizes].tolist(), sequence_length)
        begins, documents = np.cumsum([0, *counts[sizes]]).tolist(), []
        for sequences, kinds in groups:
            columns = []
            for kind, copies in kinds:
                taken = sequences * copies
                columns.append(fitting[begins[kind]:begins[kind] + taken].reshape(sequences, copies))
                begins[kind] += taken
            documents.append(np.concatenate(columns, axis=1).ravel())
        self._documents = np.concatenate(documents)
        each = np.repeat([sum(copies for _, copies in kinds) for _, kinds in groups],
                         [sequences for sequences, _ in groups])
        self._bounds = np.cumsum([0, *each])  # of sequences in `_documents`
        self._order = lru_cache(2)(self._draw)  # of two epochs: readers may stand on both sides of an epoch's end

    def __len__(self):
        return len(self._bounds) - 1

    def _draw(self, epoch):
        return np.random.default_rng((self._seed, epoch)).permutation(len(self))

    def parts(self, epoch, i):
        begin, end = self._bounds[self._order(epoch)[i]:][:2]
        return [(document, 0, int(self._lengths[document])) for document in self._documents[begin:end].tolist()]


def pack(sizes: list[int], counts: list[int], room: int) -> list[tuple[int, tuple]]:
    """How to fill sequences with documents.

    Args:
        sizes: of the kinds of documents, the largest first, none above `room`.
        counts: how many documents there are of each kind.
        room: in a sequence.

    Returns:
        [(number of sequences, what each of them holds: ((kind, number of documents), ...)), ...]
    """
    groups = {}  # room that is left -> [(number of sequences, what each holds)]
    rooms = []  # the keys of `groups`, sorted

    def put(left, sequences, kinds):
        if left not in groups:
            groups[left] = []
            insort(rooms, left)
        groups[left].append((sequences, kinds))

    for kind, (size, count) in enumerate(zip(sizes, counts)):
        while count:
            place = bisect_left(rooms, size)
            if place == len(rooms):
                left, sequences, kinds = room, count, ()  # empty ones, as many as could be needed
            else:
                left = rooms[place]
                sequences, kinds = groups[left].pop()
                if not groups[left]:
                    del groups[left], rooms[place]
            copies = left // size
            filled = min(count // copies, sequences)
            rest = count % copies if filled < sequences else 0  # in one more
            for number, held in ((filled, copies), (1, rest)):
                if number and held:
                    put(left - held * size, number, (*kinds, (kind, held)))
            count -= filled * copies + rest
            sequences -= filled + (rest > 0)
            if sequences and kinds:
                put(left, sequences, kinds)
    return [group for left in rooms for group in groups[left]]
