"""Write a planned directory so that it is there completely or not at all.

Shards are written to OUT.partial, each under a temporary name until it is on the disk. A journal there says which
conversion this is and which shards are done, with their checksums, so that the same command goes on after them. When
all is written the directory gets its name.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pangu_ms.architectures.fields import CONFIG_FILE
from pangu_ms.checkpoint.copying import BLOCK
from pangu_ms.checkpoint.manifest import MANIFEST_FILE, manifest_ranks, ranks_entry, read_manifest
from pangu_ms.checkpoint.shards import INDEX_FILE
from pangu_ms.checkpoint.source import Source
from pangu_ms.conversion.journal import JOURNAL_FILE, Journal
from pangu_ms.conversion.plan import Plan, Shard
from pangu_ms.errors import CheckpointError

FLUSH = 1 << 26  # bytes after which the disk is told to begin, so that little is left at the end of a shard
WRITERS = 2  # shards written at a time: one computes its checksum while the other waits for the disk


class Writer:
    """Writes `plan` to the directory `target`.

    Attributes:
        overflows: tensor -> finite values that became infinite.
        resumed: shards that an earlier run had finished.
    """

    def __init__(self, source: Source, plan: Plan, target: str, allow_overflow: bool):
        self.source, self.plan, self.target = source, plan, target
        self.partial = f"{target}.partial"
        self.overflows: dict[str, int] = {}
        self.resumed = 0
        self._allow_overflow = allow_overflow
        self._done: dict[str, int] = {}  # shards on the disk, and their checksums
        self._lock, self._stop = threading.Lock(), threading.Event()

    def finished(self) -> bool:
        """Whether `target` is there, complete, and the result of this very conversion.

        Raises:
            CheckpointError: `target` holds something else.
        """
        if not os.path.lexists(self.target):
            return False
        if not os.path.isdir(self.target):
            raise CheckpointError(f"{self.target}: is not a directory; choose another output")
        if os.path.ismount(self.target):
            raise CheckpointError(f"{self.target}: is a mount point, which no directory can replace; "
                                  "name a directory below it")
        if not os.listdir(self.target):
            return False
        manifest = read_manifest(self.target)
        if manifest is None:
            raise CheckpointError(f"{self.target}: is not empty and was not written by pangu-convert; "
                                  "choose another output directory")
        files = {shard.name: shard.nbytes for shard in self.plan.shards}
        same = manifest["plan"] == self.plan.digest and manifest_ranks(manifest) == self.plan.ranks
        if not same or manifest["files"].keys() != files.keys():
            raise CheckpointError(f"{self.target}: holds the result of another conversion (other input or options); "
                                  "remove it or choose another output directory")
        for name, size in files.items():
            path = os.path.join(self.target, name)
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise CheckpointError(f"{path}: was changed after the conversion; "
                                      f"remove {self.target} and convert again")
        self._forget_journal()
        return True

    def write(self, documents: dict[str, str], check: Callable[[str], None], progress: Callable[[int], None]) -> None:
        """Write everything that is not there yet and give the directory its name.

        Args:
            documents: name in the output -> file to copy.
            check: called with the complete directory before it gets its name; may raise to prevent that.
            progress: called with the bytes of every block written, and of shards that were there already.

        Raises:
            CheckpointError: the disk is full, values overflow, or the directory holds what this conversion did not
                write. The finished shards stay.
        """
        self._documents, self._progress = documents, progress
        os.makedirs(self.partial, exist_ok=True)
        self._refuse_links()
        with Journal(self.partial, {"plan": self.plan.digest, "rank": self.plan.ranks.rank}) as self._journal:
            self._resume()
            missing = [shard for shard in self.plan.shards if shard.name not in self._done]
            self._write_shards(missing)
            self._write_documents()
            check(self.partial)
            sync(self.partial)
            os.rename(self.partial, self.target)
            sync(os.path.dirname(self.target))
        self._forget_journal()

    def _refuse_links(self) -> None:
        """`CheckpointError` for a symbolic link: what is written must not end up elsewhere."""
        for path in (self.partial, *(entry.path for entry in os.scandir(self.partial))):
            if os.path.islink(path):
                raise CheckpointError(f"{path}: is a symbolic link, which no conversion leaves there; remove it")

    def _resume(self) -> None:
        """Find the shards that an earlier run has finished and check that they are as it left them."""
        shards = {} if self._journal.fresh else {shard.name: shard for shard in self.plan.shards}
        own = {JOURNAL_FILE} if self._journal.fresh else {
            JOURNAL_FILE, CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *self._documents, *shards,
            *(f"{name}.tmp" for name in shards)}
        strangers = sorted(set(os.listdir(self.partial)) - own)
        if strangers:
            raise CheckpointError(f"{self.partial}: holds {strangers[0]!r}, which this conversion did not write; "
                                  "move it away")
        for line in self._journal.lines:
            shard = shards.get(line.get("shard"))
            path = os.path.join(self.partial, shard.name) if shard else ""
            if not os.path.isfile(path) or os.path.getsize(path) != shard.nbytes or _checksum(path) != line["crc32"]:
                continue
            for name, count in line["overflows"].items():
                self._check_overflow(name, count)
            self._done[shard.name] = line["crc32"]
            self.overflows |= line["overflows"]
            self._progress(shard.nbytes)
        self.resumed = len(self._done)

    def _write_shards(self, shards: list[Shard]) -> None:
        pool = ThreadPoolExecutor(WRITERS)
        try:
            for future in [pool.submit(self._write_shard, shard) for shard in shards]:
                future.result()
        except OSError as error:
            raise CheckpointError(f"{self.partial}: writing failed: {error.strerror}; the finished shards are kept: "
                                  "mend that and run the same command again") from None
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _write_shard(self, shard: Shard) -> None:
        path = os.path.join(self.partial, shard.name)
        overflows: dict[str, int] = {}
        try:
            with open(f"{path}.tmp", "wb", buffering=0) as file:
                crc, flushed = 0, 0
                for block in self._blocks(shard, overflows):
                    if self._stop.is_set():
                        return
                    crc = zlib.crc32(block, crc)
                    _write_all(file, block)
                    if file.tell() - flushed >= FLUSH:
                        flushed = _start_flush(file, flushed)
                    with self._lock:
                        self._progress(len(block))
                os.fsync(file.fileno())
            os.rename(f"{path}.tmp", path)
        except BaseException:
            self._stop.set()  # the other shards need not be finished when this one has failed
            raise
        with self._lock:
            self._done[shard.name] = crc
            self.overflows |= overflows
            self._journal.record({"shard": shard.name, "crc32": crc, "overflows": overflows})

    def _blocks(self, shard: Shard, overflows: dict[str, int]) -> Iterator[memoryview]:
        """The bytes of a shard in order. `overflows` gets the counts of its tensors."""
        yield memoryview(shard.header)
        for tensor in shard.tensors:
            lost = 0
            for values, count in self.source.blocks(tensor):
                yield memoryview(values).cast("B")
                lost += count
            if lost:
                overflows[tensor.name] = lost
                self._check_overflow(tensor.name, lost)

    def _check_overflow(self, name: str, count: int) -> None:
        if not self._allow_overflow:
            raise CheckpointError(f"{self.source.directory}: {count} values of {name} are too large for float16; "
                                  "convert to bfloat16, or accept infinities with --allow-overflow")

    def _write_documents(self) -> None:
        for name, path in self._documents.items():
            shutil.copyfile(path, os.path.join(self.partial, name))
        self.plan.config.save_pretrained(self.partial)
        total = sum(tensor.nbytes for tensor in self.plan.tensors)
        weight_map = {tensor.name: shard.name for shard in self.plan.shards for tensor in shard.tensors}
        self._write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._write_json(MANIFEST_FILE, {
            "format": "pangu_ms", "plan": self.plan.digest, **ranks_entry(self.plan.ranks),
            "source": os.path.basename(os.path.abspath(self.source.directory)),
            "tensors": len(weight_map), "overflows": self.overflows,
            "files": {s.name: {"bytes": s.nbytes, "crc32": self._done[s.name]} for s in self.plan.shards},
        })
        for name in (*self._documents, CONFIG_FILE, INDEX_FILE, MANIFEST_FILE):
            sync(os.path.join(self.partial, name))

    def _write_json(self, name: str, fields: dict) -> None:
        with open(os.path.join(self.partial, name), "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=1)
            file.write("\n")

    def _forget_journal(self) -> None:
        try:
            os.unlink(os.path.join(self.target, JOURNAL_FILE))
        except FileNotFoundError:
            pass


def check_space(writers: list[Writer]) -> None:
    """`CheckpointError` when the disk has no room for what the writers have still to write."""
    wanted = sum(writer.plan.nbytes for writer in writers)
    for writer in writers:
        if os.path.isdir(writer.partial):  # what an earlier run left there will be kept or replaced
            wanted -= sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(writer.partial))
    existing = writers[0].partial
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise CheckpointError(f"{existing}: {wanted:,} bytes are still to be written, the disk has {free:,} free; "
                              "make room or choose another disk")


def _write_all(file, block: bytes | memoryview) -> None:
    """Write a whole block: a raw file may take less than it is given."""
    while block:
        block = block[file.write(block):]


def _start_flush(file, start: int) -> int:
    """Tell the disk to write the file's bytes from `start` on, without waiting; returns where they end.

    Linux begins to write pages when it is advised not to keep them in memory. --verify then reads from the disk.
    """
    end = file.tell()
    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def _checksum(path: str) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def sync(path: str) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
