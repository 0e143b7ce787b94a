"""Documents: JSONL files of texts to token ids in memory.

Needs no MindSpore, as `chat_data.py` and `packing.py`.
"""
import json
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pangu_ms.errors import PanguError
from pangu_ms.generation.chat import load_pretrained_tokenizer

logger = logging.getLogger(__name__)

BATCH = 64  # texts that the tokenizer takes at once, on all cores


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, one behind the other.

    Attributes:
        ids: int32 [N], of all documents.
        counted: bool [N]; whether the loss of predicting this token counts.
        offsets: int64 [D + 1]; document i is ids[offsets[i]:offsets[i + 1]].
        names (list[str]): what errors call each document: its "id", or file:line.
        may_be_cut (bool): whether a sequence may hold a part of a document.
        pad_id (int): fills rows that predict nothing.
        skipped (int): empty texts, left out.
    """

    ids: np.ndarray
    counted: np.ndarray
    offsets: np.ndarray
    names: list[str]
    may_be_cut: bool
    pad_id: int
    skipped: int = 0

    def __len__(self):
        return len(self.names)


def gather(documents, may_be_cut: bool, pad_id: int, skipped: int = 0) -> Documents:
    """Documents of [(name, ids, counted)]."""
    lengths = [len(ids) for _, ids, _ in documents]
    return Documents(
        np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for _, ids, _ in documents)]),
        np.concatenate([np.empty(0, bool), *(np.asarray(counted, bool) for _, _, counted in documents)]),
        np.cumsum([0, *lengths], dtype=np.int64), [name for name, _, _ in documents], may_be_cut, pad_id, skipped)


def read_texts(path, tokenizer_directory) -> Documents:
    """Documents of {"text": str} and optionally "id", one JSON object a line: the beginning token, the text, the end.

    Characters that spell the beginning or the end of a text or a message stay characters. Empty texts are left out, and
    a warning counts them.

    Raises:
        PanguError: a file that cannot be read, a line that holds no text (file:line), a tokenizer without a beginning
            or an end token, or no document at all.
    """
    tokenizer = load_pretrained_tokenizer(tokenizer_directory)
    bos, eos = (special_id(tokenizer, name, tokenizer_directory) for name in ("bos_token", "eos_token"))
    encoder = tokenizer.backend_tokenizer
    encoder.no_truncation()  # the file may ask for either
    encoder.no_padding()
    encoder.encode_special_tokens = True
    found, skipped = [], 0
    texts = _texts(path)
    while batch := list(islice(texts, BATCH)):
        full = [(name, text) for name, text in batch if text]
        skipped += len(batch) - len(full)
        encodings = encoder.encode_batch_fast([text for _, text in full], add_special_tokens=False)
        for (name, _), encoding in zip(full, encodings):
            ids = np.array([bos, *encoding.ids, eos], np.int32)
            found.append((name, ids, np.ones(len(ids), bool)))
    if not found:
        raise PanguError(f'{path}: holds no document: wanted lines of {{"text": ...}}')
    if skipped:
        logger.warning("%s: %d empty texts left out", path, skipped)
    return gather(found, may_be_cut=True, pad_id=eos, skipped=skipped)


def _texts(path):
    for where, record in read_jsonl(path):
        yield name_of(record, where), text_of(record, where)


def read_jsonl(path):
    """Yields (file:line, object) of each line that is not blank, behind a progress bar.

    Raises:
        PanguError: the file cannot be read, or a line is no JSON object in UTF-8.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True,
                                            leave=False, disable=None) as bar:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except OSError as error:
        raise PanguError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def _parse(line, where):
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone \ud800 is JSON, and is no text
    except UnicodeError as error:
        raise PanguError(f"{where}: not UTF-8 ({error.reason}): convert the file") from None
    except (ValueError, RecursionError) as error:
        raise PanguError(f"{where}: not JSON ({error}): mend the line or remove it") from None
    if not isinstance(record, dict):
        raise PanguError(f"{where}: {kind(record)}: wanted a JSON object")
    return record


def text_of(record, where) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise PanguError(f'{where}: "text" is {kind(text)}: wanted text')
    return text


def name_of(record, where) -> str:
    """What errors call the document of a line."""
    return str(record.get("id", where))


def kind(value) -> str:
    """What a JSON value is, in words for errors."""
    if value is None:
        return "missing"
    return {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}.get(
        type(value), "an object")


def special_id(tokenizer, name: str, directory) -> int:
    """The id of "bos_token" or "eos_token".

    Raises:
        PanguError: the tokenizer has none.
    """
    token_id = getattr(tokenizer, f"{name}_id")
    if token_id is None:
        raise PanguError(f"{directory}: tokenizer_config.json names no {name}: add it")
    return token_id
