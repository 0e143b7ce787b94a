"""Reading safetensors files as untrusted input: headers first, then byte ranges, never a whole file.

A directory holds `model.safetensors.index.json` and the shards it names, or one `model.safetensors`. What a header or
an index claims is checked against the file before any tensor is read; see `read_header` for the list.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the bound of the safetensors library
AGAIN = "fetch the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: where its bytes lie."""

    name: str
    file: BinaryIO
    dtype: str  # a key of CARRIERS
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    nbytes: int
    scale: "StoredTensor | None" = None  # of an int8 tensor that has been found one: a factor for each row

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with the tensor's bytes from `start` on; `CheckpointError` when it ends before."""
        done = 0
        while done < len(buffer):  # a signal or a network file system may give less than was asked
            try:
                count = os.preadv(self.file.fileno(), [buffer[done:]], self.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"{self.file.name}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self.file.name}: ends inside {self.name}; it was cut while being read")
            done += count


class Shards:
    """The tensors of one directory by name. The files stay open until `close`."""

    def __init__(self, directory: str | os.PathLike):
        """Read and check all headers.

        Raises:
            CheckpointError: a file is missing, damaged or no safetensors file, or the index disagrees with the files.
        """
        self.directory = os.fspath(directory)
        self.tensors: dict[str, StoredTensor] = {}
        self.files: list[BinaryIO] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        index = os.path.join(self.directory, INDEX_FILE)
        weight_map = _read_index(index) if os.path.lexists(index) else None
        if weight_map is None and not os.path.lexists(os.path.join(self.directory, SINGLE_FILE)):
            raise CheckpointError(f"{self.directory}: holds neither {INDEX_FILE} nor {SINGLE_FILE}; "
                                  "give a directory of safetensors files")
        owners: dict[str, str] = {}
        for name in [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values())):
            path = _inside(self.directory, name)
            try:
                file = open(path, "rb", buffering=0)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
            self.files.append(file)
            found = read_header(file)
            for tensor in found:
                if tensor in owners:
                    raise CheckpointError(f"{path}: {tensor} stands in {owners[tensor]} too; keep one of them")
                owners[tensor] = name
            self.tensors |= found
        if weight_map is not None and weight_map != owners:
            wrong = sorted(t for t in weight_map.keys() | owners.keys() if weight_map.get(t) != owners.get(t))
            tensor = wrong[0]
            raise CheckpointError(
                f"{index}: disagrees with the shards about {len(wrong)} tensors, first {tensor}: found "
                f"{weight_map.get(tensor, 'no entry')}, but it is in {owners.get(tensor, 'no shard')}; {AGAIN}")

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def read_header(file: BinaryIO, formats: Mapping[str, np.dtype] = CARRIERS) -> dict[str, StoredTensor]:
    """The tensors of an open safetensors file by name. `formats`: the dtypes it may hold, with their carriers.

    Raises:
        CheckpointError: the header is longer than the file or than `LARGEST_HEADER`, is not a JSON object, or names a
            tensor twice; metadata is not text; a dtype is unknown; a size does not follow from dtype and shape; bytes
            overlap, lie outside the file, or belong to no tensor.
    """
    path = file.name
    size = os.fstat(file.fileno()).st_size
    start = os.pread(file.fileno(), 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise CheckpointError(f"{path}: no safetensors file: claims a header of {length} bytes in a file of {size}; "
                              f"{AGAIN}")
    header = parse_json(path, os.pread(file.fileno(), length, 8))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: found __metadata__ {str(metadata)[:80]!r}, wanted texts by name; {AGAIN}")
    data = 8 + length
    tensors = {name: _tensor(file, data, name, fields, formats) for name, fields in header.items()}
    end = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves unused bytes before it"
            raise CheckpointError(f"{path}: {tensor.name} begins at byte {tensor.offset}, wanted {end}: "
                                  f"it {kind}; {AGAIN}")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{path}: found {size} bytes, wanted {end} by its header; it is "
                              f"{'cut short' if size < end else 'too long'}: {AGAIN}")
    return tensors


def file_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The first bytes of a safetensors file of these tensors, in this order: (name, dtype, shape, number of bytes)."""
    fields, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, nbytes in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensor(file: BinaryIO, data: int, name: str, fields: Any, formats: Mapping[str, np.dtype]) -> StoredTensor:
    where = f"{file.name}: {name}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header wants exactly dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in formats:
        raise CheckpointError(f"{where}: found dtype {str(dtype)[:40]!r}, wanted one of {', '.join(formats)}")
    for value, key in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
            raise CheckpointError(f"{where}: found {key} {repr(value)[:80]}, wanted a list of sizes; {AGAIN}")
    nbytes = math.prod(shape) * formats[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: found data_offsets {offsets[:3]}, wanted {nbytes} bytes for {dtype} "
                              f"{str(shape)[:80]}; {AGAIN}")
    return StoredTensor(name, file, dtype, tuple(shape), data + offsets[0], nbytes)


def _read_index(path: str) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_HEADER + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    weight_map = parse_json(path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{path}: wanted a \"weight_map\" from tensor names to file names; {AGAIN}")
    return weight_map


def parse_json(path: str, text: bytes) -> dict[str, Any]:
    """The JSON object that `text` is; `CheckpointError` names the file when it is none, or repeats a key."""
    def unique(pairs):
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:100]!r} occurs twice")
        return fields

    try:
        if len(text) > LARGEST_HEADER:
            raise ValueError(f"more than {LARGEST_HEADER} bytes")
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text: a ValueError
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({str(error)[:200]}); {AGAIN}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(fields).__name__}, wanted an object; {AGAIN}")
    return fields


def contained(directory: str, path: str) -> bool:
    """Whether `path`, a file of `directory`, is or leads to a file of that directory.

    A symbolic link may also lead to where the Hugging Face cache keeps the files of a snapshot.
    """
    root = os.path.realpath(directory)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    return os.path.dirname(os.path.realpath(path)) in allowed


def _inside(directory: str, name: str) -> str:
    """The path of a file that an index names; `CheckpointError` unless it is a regular file of the directory."""
    if os.path.basename(name) != name or not name.endswith(".safetensors") or "\\" in name or not name.isprintable():
        raise CheckpointError(f"{directory}: the index names the file {name[:200]!r}, wanted a plain name of this "
                              "directory, *.safetensors")
    path = os.path.join(directory, name)
    if not contained(directory, path):
        raise CheckpointError(f"{path}: is a link to {os.path.realpath(path)}, outside the directory; "
                              "put the file itself there")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        raise CheckpointError(f"{path}: the shard is missing; fetch it again or finish the download") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file; {AGAIN}")
    return path
