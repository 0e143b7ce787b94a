"""Megatron's files: read as its writer lays them out, and refused where they are damaged."""
import io
import struct

import numpy as np
import pytest

from pangu_ms.errors import PanguError
from pangu_ms.training.data.indexed import number_type_for, read_indexed, write_index
from pangu_ms.training.data.packing import PackedDataset

PAD = 0


def by_hand(prefix, sequences, bounds=None, code=8, character="H", version=1, magic=b"MMIDIDX\0\0"):
    """The bytes of megatron.core.datasets.indexed_dataset, field by field."""
    size = struct.calcsize(f"<{character}")
    bounds = range(len(sequences) + 1) if bounds is None else bounds
    index = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(bounds))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    begin = 0
    for sequence in sequences:
        index += struct.pack("<q", begin)
        begin += size * len(sequence)
    index += b"".join(struct.pack("<q", bound) for bound in bounds)
    (prefix.parent / f"{prefix.name}.idx").write_bytes(index)
    (prefix.parent / f"{prefix.name}.bin").write_bytes(
        b"".join(struct.pack(f"<{character}", token) for sequence in sequences for token in sequence))
    return str(prefix)


@pytest.mark.parametrize("code, character, largest", [(8, "H", 65535), (4, "i", 2**31 - 1), (1, "B", 255),
                                                      (2, "b", 127), (3, "h", 32767)])
def test_documents_are_what_was_written(tmp_path, code, character, largest):
    """The second document has two sequences, the third none, the fourth an empty one."""
    prefix = by_hand(tmp_path / "c", [[5, 6, largest], [7], [8, 9], [], [3]], [0, 1, 3, 3, 4, 5], code, character)
    documents = read_indexed(prefix, "texts", PAD)
    assert documents.ids.tolist() == [5, 6, largest, 7, 8, 9, 3] and isinstance(documents.ids, np.memmap)
    assert documents.offsets.tolist() == [0, 3, 6, 6, 6, 7]
    assert documents.counted.all() and len(documents.counted) == 7 and documents.counted.base.nbytes == 1
    assert len(documents) == 5 and documents.names[3] == f"{prefix}: document 3"
    assert documents.may_be_cut and documents.largest_id is None
    sequences = list(PackedDataset(documents, 4, seed=0))
    assert sorted(np.concatenate([each.input_ids for each in sequences])) == sorted([PAD, 5, 6, largest, 7, 8, 9, 3])
    assert {name for n in (0, 1) for name in PackedDataset(documents, 4, 0).documents(n)} == \
        {f"{prefix}: document {i}" for i in (0, 1, 4)}


def test_chats_have_a_mask_and_stay_whole(tmp_path):
    prefix = by_hand(tmp_path / "c", [[4, 5, 6], [], [7, 8]])
    with pytest.raises(PanguError, match="c.mask: cannot be read .No such file.*belongs to .*c.idx$"):
        read_indexed(prefix, "chats", PAD)
    (tmp_path / "c.mask").write_bytes(bytes([0, 0, 1, 0, 1]))
    documents = read_indexed(prefix, "chats", PAD)
    (sequence,) = PackedDataset(documents, 6, seed=0)
    assert [column.tolist() for column in sequence] == [
        [4, 5, 6, 7, 8, PAD], [5, 6, PAD, 8, PAD, PAD], [0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 1, 0]]
    assert PackedDataset(documents, 2, seed=0).dropped == [f"{prefix}: document 0"]
    with pytest.raises(PanguError, match="c.mask: is there, so .*c.bin holds chats; set documents: chats"):
        read_indexed(prefix, "texts", PAD)
    (tmp_path / "c.mask").write_bytes(bytes(4))
    with pytest.raises(PanguError, match="c.mask: has 4 bytes, wanted 5 for the 5 tokens of .*c.idx: it is cut off"):
        read_indexed(prefix, "chats", PAD)


def test_the_writer_writes_the_same_bytes(tmp_path):
    by_hand(tmp_path / "c", [[1, 2, 3], [4], [5, 6]], code=4, character="i")
    write_index(file := io.BytesIO(), np.dtype("<i4"), np.array([3, 1, 2], np.int32))
    assert file.getvalue() == (tmp_path / "c.idx").read_bytes()
    assert [number_type_for(size) for size in (65499, 65500)] == [np.uint16, np.int32]  # as Megatron chooses


HUGE = 2**60


@pytest.mark.parametrize("damage, message", [
    (lambda idx, bin: (b"", bin), "idx: begins with b'', wanted b'MMIDIDX"),
    (lambda idx, bin: (idx[:33], bin), "idx: begins with .* or cut off"),
    (lambda idx, bin: (b"TNTIDX\0\0" + idx[8:], bin), "idx: begins with b'TNTIDX"),
    (lambda idx, bin: (idx[:-1], bin), "idx: has 97 bytes, wanted 98 for 2 sequences and 5 bounds of documents"),
    (lambda idx, bin: (idx + b"\0", bin), "idx: has 99 bytes, wanted 98"),
    (lambda idx, bin: (idx + b"\0\0", bin), "idx: has a mode for each sequence"),
    (lambda idx, bin: (idx[:18] + struct.pack("<Q", HUGE) + idx[26:], bin), "idx: has 98 bytes, wanted 13,"),
    (lambda idx, bin: (idx[:26] + struct.pack("<Q", 2**64 - 1) + idx[34:], bin), "idx: has 98 bytes, wanted 147,"),
    (lambda idx, bin: (idx[:9] + struct.pack("<Q", 2) + idx[17:], bin), "idx: is of version 2, wanted 1"),
    (lambda idx, bin: (idx[:17] + b"\x07" + idx[18:], bin), "idx: the ids are of number type 7, wanted integers"),
    (lambda idx, bin: (idx[:17] + b"\x04" + idx[18:], bin), "idx: sequence 1 has 2 tokens from byte 6 on: wanted"),
    (lambda idx, bin: (idx[:34] + struct.pack("<i", -3) + idx[38:], bin), "idx: sequence 0 has -3 tokens"),
    (lambda idx, bin: (idx[:42] + struct.pack("<q", -2) + idx[50:], bin), "sequence 0 has 3 tokens from byte -2 on"),
    (lambda idx, bin: (idx[:50] + struct.pack("<q", HUGE) + idx[58:], bin), f"2 tokens from byte {HUGE} on"),
    (lambda idx, bin: (idx[:58] + struct.pack("<q", 1) + idx[66:], bin), "from sequence 1 to 2: wanted 0 to 2"),
    (lambda idx, bin: (idx[:90] + struct.pack("<q", HUGE), bin), f"from sequence 0 to {HUGE}: wanted 0 to 2"),
    (lambda idx, bin: (idx[:74] + struct.pack("<q", -HUGE) + idx[82:], bin), "each to begin where the one before it"),
    (lambda idx, bin: (idx[:18] + bytes(8) + struct.pack("<Q", 1) + bytes(8), b""), "idx: holds no token"),
    (lambda idx, bin: (idx[:18] + bytes(16), b""), "idx: holds no token"),
    (lambda idx, bin: (idx, bin[:-1]), "bin: has 9 bytes, wanted 10 for the 5 tokens of .*idx: it is cut off or"),
    (lambda idx, bin: (idx, bin + bin), "bin: has 20 bytes, wanted 10"),
    (lambda idx, bin: (idx, None), "c.bin: cannot be read .No such file or directory.: it belongs to"),
    (lambda idx, bin: (None, bin), "c.idx: cannot be read .No such file or directory.: give the path of"),
])
def test_damage_is_one_line(tmp_path, damage, message):
    prefix = by_hand(tmp_path / "c", [[4, 5, 6], [7, 8]], [0, 1, 1, 2, 2])
    paths = tmp_path / "c.idx", tmp_path / "c.bin"
    for path, content in zip(paths, damage(*(path.read_bytes() for path in paths))):
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(PanguError, match=message) as raised:
        read_indexed(prefix, "texts", PAD)
    assert "\n" not in str(raised.value)
