"""Files of texts or chats to an indexed corpus, by several processes.

Each shard of the files becomes files in PREFIX.shards/, named by what they were made of and how. So a run that was
killed, or that stopped at a broken line, goes on from the shards that it finished, as long as their file, the tokenizer
and the settings are the same. At the end they are joined in the order of the files, and the corpus appears whole.
"""
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pangu_ms.architectures.fields import CONFIG_FILE
from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import TEMPLATE_FILE
from pangu_ms.text.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES, Tokenizer
from pangu_ms.training.data.chats import chat_encoder
from pangu_ms.training.data.documents import BATCH, text_encoder
from pangu_ms.training.data.indexed import number_type_for, write_index
from pangu_ms.training.data.shards import find_shards, read_record

ENCODERS = {"texts": text_encoder, "chats": chat_encoder}
SHARD_FILE = re.compile(r"[0-9a-f]{32}\.(ids|mask|counts|lengths)(\.partial)?")  # .lengths is written last


@dataclass(frozen=True)
class Settings:
    """How files become a corpus.

    Attributes:
        tokenizer: a directory.
        documents: "texts" or "chats".
        skip_broken: leave out lines that hold no text or chat, instead of refusing the file.
    """

    tokenizer: str
    documents: str = "texts"
    skip_broken: bool = False


def tokenize_corpus(paths: list[str], settings: Settings, prefix: str, workers: int) -> dict:
    """Writes PREFIX.bin, PREFIX.idx and, of chats, PREFIX.mask; see `indexed.py`.

    Returns:
        How many "documents" and "tokens" there are, how many texts were "empty" and how many lines "broken" and left
        out, the first of these as "broken_line"; "nbytes" of the files, "shards", and how many of these were "reused".

    Raises:
        PanguError: the corpus is there already; a file cannot be read, or holds a broken line that is not to be
            skipped; there is no document; a process died.
    """
    for path in (f"{prefix}.idx", *([] if settings.documents == "chats" else [f"{prefix}.mask"])):
        if os.path.exists(path):
            raise PanguError(f"{path}: is there already: remove it, or choose another output")
    shards = [shard for path in paths for shard in find_shards(path)]
    number_type = _number_type(settings)
    directory = Path(f"{prefix}.shards")
    directory.mkdir(parents=True, exist_ok=True)
    bases = [str(directory / name) for name in _names(shards, settings)]
    nbytes = sum(shard.nbytes for shard in dict(zip(bases, shards)).values())
    pending = {base: shard for base, shard in zip(bases, shards) if not os.path.exists(f"{base}.lengths")}
    with tqdm(total=nbytes, initial=nbytes - sum(shard.nbytes for shard in pending.values()), desc="tokenizing",
              unit="B", unit_scale=True, disable=None) as bar:
        if pending:
            _tokenize(pending, settings, number_type, workers, bar)
    found = _count(bases, shards) | {"nbytes": nbytes, "shards": len(shards), "reused": len({*bases}) - len(pending)}
    if not found["documents"]:
        raise PanguError(f"{paths[0]}: holds no document, as all files here: wanted {settings.documents}, one a line")
    _join(bases, settings.documents == "chats", number_type, prefix)
    for path in directory.iterdir():
        if SHARD_FILE.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # something else lies there
        directory.rmdir()
    return found


def _number_type(settings):
    """Of the ids; `PanguError` for a tokenizer that cannot be used, before any process is started."""
    tokenizer = Tokenizer(settings.tokenizer)
    ENCODERS[settings.documents](tokenizer)
    return number_type_for(1 + max(tokenizer.vocab_size - 1, tokenizer.bos_token_id, tokenizer.eos_token_id or 0))


def _names(shards, settings):
    """What the files of each shard are called."""
    digest = hashlib.sha256()
    for name in (*TOKENIZER_FILES, TOKENIZER_CONFIG, CONFIG_FILE, TEMPLATE_FILE):
        path = Path(settings.tokenizer, name)
        digest.update(path.read_bytes() if path.is_file() else b"none")
    for shard in shards:
        state = os.stat(shard.path)
        made_of = [digest.hexdigest(), settings.documents, settings.skip_broken, os.path.abspath(shard.path),
                   state.st_size, state.st_mtime_ns, *astuple(shard)[1:]]
        yield hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _tokenize(pending, settings, number_type, workers, bar):
    """Writes the files of the pending shards, {base: shard}."""
    context = multiprocessing.get_context("spawn")  # a process with threads in it cannot be forked
    stop, done, before = context.Event(), context.Value("d", 0.0), bar.n
    with ProcessPoolExecutor(min(workers, len(pending)), context, _start, (settings, stop, done)) as pool:
        left = {pool.submit(_tokenize_shard, base, shard, number_type) for base, shard in pending.items()}
        try:
            while left:
                finished, left = wait(left, 0.2, FIRST_EXCEPTION)
                bar.update(before + done.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise PanguError("a process died, perhaps for want of memory: the same command goes on from the finished "
                             "shards; give fewer --workers") from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _start(settings, stop, done):
    """Prepares a process: one thread of it encodes, and it lives no longer than the one that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it stops when it is told to
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _tokenize_shard.process = ENCODERS[settings.documents](Tokenizer(settings.tokenizer)), settings, stop, done


def _tokenize_shard(base, shard, number_type):
    encode, settings, stop, done = _tokenize_shard.process
    counts, documents = {"lines": 0, "empty": 0, "broken": 0, "broken_line": None}, []
    records = shard.records()
    while batch := list(islice(records, BATCH)):
        if stop.is_set():
            return
        try:
            documents += _documents(batch, encode, counts, settings.documents)
        except PanguError:
            for number, record in enumerate(batch, counts["lines"] + 1):
                try:
                    documents += _documents([record], encode, counts, settings.documents)
                except PanguError as error:
                    if not settings.skip_broken:
                        raise PanguError(f"{shard.path}:{shard.lines_before() + number}{error}") from None
                    counts["broken"] += 1
                    counts["broken_line"] = counts["broken_line"] or [number, str(error)]
        counts["lines"] += len(batch)
        with done.get_lock():
            done.value += sum(nbytes for nbytes, _ in batch)
    lengths = np.array([len(ids) for _, ids, _ in documents], "<i4")
    files = {"ids": np.concatenate([np.empty(0, number_type), *(ids for _, ids, _ in documents)]).astype(number_type)}
    if settings.documents == "chats":
        files["mask"] = np.concatenate([np.empty(0, bool), *(counted for _, _, counted in documents)])
    files |= {"counts": np.frombuffer(json.dumps(counts).encode(), "u1"), "lengths": lengths}
    for kind, content in files.items():
        with _appearing(f"{base}.{kind}") as file:
            file.write(content.tobytes())


def _documents(batch, encode, counts, kind):
    """The documents of some lines. `PanguError` begins with ": ", for the name of the line to be put before."""
    records = [record for _, line in batch if (record := read_record(line, "")) is not None]
    found = encode([("", record) for record in records])
    if kind == "texts":
        counts["empty"] += len(records) - len(found)
    return found


def _count(bases, shards):
    """The counts of all shards; a broken line by its number in its file."""
    found, lines = {"documents": 0, "tokens": 0, "empty": 0, "broken": 0, "broken_line": None}, {}
    for base, shard in zip(bases, shards):
        counts, lengths = json.loads(Path(f"{base}.counts").read_bytes()), np.fromfile(f"{base}.lengths", "<i4")
        if not shard.begin:
            lines[shard.path] = 0
        if counts["broken_line"] and not found["broken_line"]:
            number, message = counts["broken_line"]
            found["broken_line"] = f"{shard.path}:{lines[shard.path] + number}{message}"
        lines[shard.path] += counts["lines"]
        found["documents"] += len(lengths)
        found["tokens"] += lengths.sum(dtype=np.int64).item()
        found["empty"] += counts["empty"]
        found["broken"] += counts["broken"]
    return found


def _join(bases, chats, number_type, prefix):
    """The corpus of the shards' files. It is there when its index is, which comes last."""
    lengths = np.concatenate([np.fromfile(f"{base}.lengths", "<i4") for base in bases])
    sizes = {"bin": lengths.sum(dtype=np.int64).item() * number_type.itemsize}
    if chats:
        sizes["mask"] = lengths.sum(dtype=np.int64).item()
    with contextlib.ExitStack() as stack, tqdm(total=sum(sizes.values()), desc="joining", unit="B", unit_scale=True,
                                               disable=None) as bar:
        files = [stack.enter_context(_appearing(f"{prefix}.{ending}")) for ending in ("idx", *reversed(sizes))]
        write_index(files[0], number_type, lengths)
        for file, kind in zip(files[:0:-1], ("ids", "mask")):
            for base in bases:
                with open(f"{base}.{kind}", "rb") as shard:
                    shutil.copyfileobj(shard, file, 1 << 20)
                    bar.update(shard.tell())


@contextlib.contextmanager
def _appearing(path):
    """A file to write that has its name only when it is whole and on the disk."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
