"""Indexed corpora: token ids in Megatron's files PREFIX.bin and PREFIX.idx, and the loss mask of chats in PREFIX.mask.

    .bin    the ids of all sequences, one behind the other
    .idx    "MMIDIDX\\0\\0", version uint64 = 1, number type uint8, S uint64, D + 1 uint64; then the length of each
            sequence in tokens, int32 [S], where it begins in .bin in bytes, int64 [S], and which sequences each
            document is, int64 [D + 1]: document i is the sequences bounds[i] to bounds[i + 1]
    .mask   uint8, one for each token of .bin: 1 where the loss of predicting it counts, else 0; of this package alone

All are little-endian. The index is read whole and every size in it is held to the files'; ids and masks are mapped and
read sequence by sequence, so they are checked where they are read.
"""
import os
import struct

import numpy as np

from pangu_ms.errors import PanguError
from pangu_ms.training.data.documents import Documents

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
# Codes 5 to 7 are int64, float64 and float32, which nobody needs for token ids.
NUMBER_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 8: "<u2"}
SMALL_VOCABULARY = 65500  # below that Megatron writes uint16


def read_indexed(prefix: str, documents: str, pad_id: int) -> Documents:
    """Documents of PREFIX.bin and PREFIX.idx, which stay on the disk.

    Args:
        prefix: the path of the files without .bin and .idx.
        documents: "texts", or "chats", whose loss mask is in PREFIX.mask and which are never cut.
        pad_id: stands where a sequence has no token.

    Raises:
        PanguError: a file is missing, is no index, holds no token or is damaged; or there is a mask and the documents
            are called texts.
    """
    chats, mask = documents == "chats", f"{prefix}.mask"
    if not chats and os.path.exists(mask):
        raise PanguError(f"{mask}: is there, so {prefix}.bin holds chats; set documents: chats, or remove what does "
                         "not belong to it")
    number_type, offsets = _read_index(f"{prefix}.idx")
    ids = _map(f"{prefix}.bin", number_type, offsets[-1].item(), f"{prefix}.idx")
    counted = _map(mask, np.dtype("u1"), len(ids), f"{prefix}.idx") if chats else np.broadcast_to(np.True_, len(ids))
    return Documents(ids, counted, offsets, DocumentNumbers(prefix, len(offsets) - 1), not chats, pad_id)


class DocumentNumbers:
    """The names of the documents of an index: their numbers, from 0."""

    def __init__(self, prefix, count):
        self._prefix, self._count = prefix, count

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        return f"{self._prefix}: document {i}"


def number_type_for(vocab_size: int) -> np.dtype:
    """What Megatron writes the ids of such a vocabulary as."""
    return np.dtype(NUMBER_TYPES[8 if vocab_size < SMALL_VOCABULARY else 4])


def write_index(file, number_type: np.dtype, lengths: np.ndarray):
    """Writes an .idx in which each sequence, of the given length in tokens, is a document."""
    code = next(code for code, name in NUMBER_TYPES.items() if np.dtype(name) == number_type)
    starts = _cumulated(lengths)
    file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write((starts[:-1] * number_type.itemsize).astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _read_index(path):
    """(the number type of the ids, int64 [D + 1]: after how many tokens each document begins)."""
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(HEADER.size)
            if len(head) < HEADER.size or not head.startswith(MAGIC):
                raise PanguError(f"{path}: begins with {head[:len(MAGIC)]!r}, wanted {MAGIC!r}: it is no index of a "
                                 "Megatron corpus, or cut off")
            _, version, code, sequences, bounds = HEADER.unpack(head)
            if version != VERSION:
                raise PanguError(f"{path}: is of version {version}, wanted {VERSION}: write it again")
            if code not in NUMBER_TYPES:
                raise PanguError(f"{path}: the ids are of number type {code}, wanted integers of up to 4 bytes (codes "
                                 f"{', '.join(map(str, NUMBER_TYPES))}): write them as int32")
            wanted = HEADER.size + 12 * sequences + 8 * bounds
            if sequences and size == wanted + sequences:
                raise PanguError(f"{path}: has a mode for each sequence, as for images among texts: wanted texts alone")
            if size != wanted:
                raise PanguError(f"{path}: has {size:,} bytes, wanted {wanted:,} for {sequences:,} sequences and "
                                 f"{bounds:,} bounds of documents: it is cut off or damaged")
            lengths = np.fromfile(file, "<i4", sequences)
            begins = np.fromfile(file, "<i8", sequences)
            bounds = np.fromfile(file, "<i8", bounds)
    except OSError as error:
        raise PanguError(f"{path}: cannot be read ({error.strerror}): give the path of .bin and .idx without these "
                         "endings") from None
    number_type = np.dtype(NUMBER_TYPES[code])
    starts = _cumulated(lengths)
    wrong = np.flatnonzero((lengths < 0) | (begins != starts[:-1] * number_type.itemsize))
    if len(wrong):
        raise PanguError(f"{path}: sequence {wrong[0]} has {lengths[wrong[0]]} tokens from byte {begins[wrong[0]]} on: "
                         "wanted each to begin where the one before it ends: write the index again")
    if len(bounds) < 2 or not starts[-1]:
        raise PanguError(f"{path}: holds no token: tokenise a file that has some")
    if bounds[0] or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise PanguError(f"{path}: the documents go from sequence {bounds[0]} to {bounds[-1]}: wanted 0 to {sequences},"
                         " each to begin where the one before it ends: write the index again")
    return number_type, starts[bounds]


def _cumulated(lengths):
    """int64 [S + 1]: the sum of the lengths before each sequence, and of all."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _map(path, number_type, count, index):
    """The numbers of a file, mapped."""
    try:
        size = os.path.getsize(path)
        if size != count * number_type.itemsize:
            raise PanguError(f"{path}: has {size:,} bytes, wanted {count * number_type.itemsize:,} for the {count:,} "
                             f"tokens of {index}: it is cut off or belongs to another")
        return np.memmap(path, number_type, "r")
    except OSError as error:
        raise PanguError(f"{path}: cannot be read ({error.strerror}): it belongs to {index}") from None
