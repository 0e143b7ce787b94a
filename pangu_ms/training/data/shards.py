"""Shards: the parts of JSONL and parquet files that processes read each by itself.

A shard counts its own lines or rows, from 1. Nobody has counted those before it, until an error must name one.
"""
import os
from dataclasses import dataclass

from pangu_ms.errors import PanguError
from pangu_ms.training.data.chats import CHAT_KEYS
from pangu_ms.training.data.documents import BATCH, parse

SHARD_BYTES = 16 << 20


@dataclass(frozen=True)
class JsonlShard:
    """The lines that begin in the bytes `begin` to `end` of a file."""

    path: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def records(self):
        """Yields (how many bytes of the file it is, the line) of each line."""
        with open(self.path, "rb") as file:
            place = 0
            if self.begin:  # the line that byte begin - 1 is in belongs to the shard before
                file.seek(self.begin - 1)
                place = self.begin - 1 + len(file.readline())
            while place < self.end and (line := file.readline()):
                place += len(line)
                yield len(line), line

    def lines_before(self) -> int:
        if not self.begin:
            return 0
        with open(self.path, "rb") as file:
            left, lines = self.begin - 1, 1
            while block := file.read(min(left, 1 << 24)):
                left, lines = left - len(block), lines + block.count(b"\n")
        return lines


@dataclass(frozen=True)
class ParquetShard:
    """The row groups `begin` to `end` of a file."""

    path: str
    begin: int
    end: int
    nbytes: int

    def records(self):
        """Yields (how many bytes of the file it is, more or less; a record batch of one row) of each row."""
        file = _open_parquet(self.path)
        groups = range(self.begin, self.end)
        rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        columns = [name for name in ("text", *CHAT_KEYS) if name in file.schema_arrow.names]
        for batch in _arrow(self.path, file.iter_batches(BATCH, groups, columns)):
            for row in range(batch.num_rows):
                yield self.nbytes / rows, batch.slice(row, 1)

    def lines_before(self) -> int:
        metadata = _open_parquet(self.path).metadata
        return sum(metadata.row_group(group).num_rows for group in range(self.begin))


def read_record(record, where: str) -> dict | None:
    """The object of a line or a row, None of a blank line. What a row does not have is left out, at any depth.

    Raises:
        PanguError: it is no JSON object in UTF-8; begins with `where`.
    """
    if isinstance(record, bytes):
        return parse(record, where) if record.strip() else None
    try:
        (found,) = record.to_pylist()
    except UnicodeError as error:
        raise PanguError(f"{where}: not UTF-8 ({error.reason}): convert the file") from None
    return _without_nulls(found)


def find_shards(path: str) -> list[JsonlShard | ParquetShard]:
    """The shards of a file, in order: parquet by its ending, else JSONL.

    Raises:
        PanguError: it cannot be read, or is a parquet file with neither texts nor chats, or pyarrow is not installed.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise PanguError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not path.endswith(".parquet"):
        return [JsonlShard(path, begin, min(begin + SHARD_BYTES, size)) for begin in range(0, size, SHARD_BYTES)]
    file = _open_parquet(path)
    if not {"text", "messages"} & set(file.schema_arrow.names):
        raise PanguError(f"{path}: has the columns {', '.join(file.schema_arrow.names)}: wanted text, or messages")
    found, begin, nbytes = [], 0, 0
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        nbytes += sum(row_group.column(column).total_compressed_size for column in range(row_group.num_columns))
        if nbytes >= SHARD_BYTES or group + 1 == file.num_row_groups:
            found.append(ParquetShard(path, begin, group + 1, nbytes))
            begin, nbytes = group + 1, 0
    return found


def _open_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PanguError(f"{path}: reading parquet needs pyarrow, which is not installed: pip install pangu_ms[data], "
                         "or bring JSONL") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _arrow(path, batches):
    """The batches; `PanguError` for what is damaged behind the head of the file."""
    try:
        yield from batches
    except (ValueError, OSError) as error:  # pyarrow's own are of these kinds
        raise _damaged(path, error) from None


def _damaged(path, error):
    return PanguError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())}): fetch the file again")


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
