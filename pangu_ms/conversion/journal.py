"""A record on the disk of what a conversion has done, so that the same command can go on after a kill."""

import fcntl
import json
import os

from pangu_ms.errors import CheckpointError

JOURNAL_FILE = ".pangu_convert.journal"


class Journal:
    """One line of JSON for each finished piece of work, below a first line that names the owner.

    The file is locked while it is open, so that two processes never write one directory.

    Attributes:
        fresh: whether there was no journal before.
        lines: what was recorded before, without lines that a kill has cut.
    """

    def __init__(self, directory: str, owner: dict):
        """Open or begin the journal of a directory.

        Raises:
            CheckpointError: another process has it open, or it belongs to another owner.
        """
        self._file = open(os.path.join(directory, JOURNAL_FILE), "a+b")
        try:
            self._open(directory, owner)
        except BaseException:
            self._file.close()
            raise

    def _open(self, directory: str, owner: dict) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory}: another pangu-convert is writing it; wait for it") from None
        self._file.seek(0)
        found = [_parsed(line) for line in self._file.read().splitlines(keepends=True)]
        self.fresh = not any(found)  # also when a kill has cut the first line
        self.lines = [line for line in found[1:] if line]
        if self.fresh:
            self._file.truncate(0)
            self.record(owner)
        elif found[0] != owner:
            raise CheckpointError(f"{directory}: is the beginning of another conversion (other input or options); "
                                  "run that command again to finish it, or remove the directory")
        elif found[-1] is None:  # a cut line must not swallow the next one
            self._file.write(b"\n")

    def record(self, line: dict) -> None:
        """Append a line. It is on the disk when this returns."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc) -> None:
        self._file.close()


def _parsed(line: bytes) -> dict | None:
    try:
        fields = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
