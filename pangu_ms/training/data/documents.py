"""Documents: a JSONL file of texts becomes token ids in memory."""
import json
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pangu_ms.errors import PanguError
from pangu_ms.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH = 64  # texts that the tokenizer takes at once, on all cores


@dataclass(frozen=True)
class Documents:
    """The token ids of D documents, one behind the other: N tokens in all.

    Attributes:
        ids: int32 [N].
        counted: bool [N]. Whether the loss of predicting this token counts.
        offsets: int64 [D + 1]. Document i is ids[offsets[i]:offsets[i + 1]].
        names (list[str]): what errors call each document: its "id", or file:line.
        may_be_cut (bool): whether a sequence may hold a part of a document.
        pad_id (int): stands where a sequence has no token.
        skipped (int): how many texts were empty and left out.
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


def join(documents, may_be_cut: bool, pad_id: int, skipped: int = 0) -> Documents:
    """One `Documents` of a list of (name, ids, counted)."""
    lengths = [len(ids) for _, ids, _ in documents]
    return Documents(
        np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for _, ids, _ in documents)]),
        np.concatenate([np.empty(0, bool), *(np.asarray(counted, bool) for _, _, counted in documents)]),
        np.cumsum([0, *lengths], dtype=np.int64), [name for name, _, _ in documents], may_be_cut, pad_id, skipped)


def read_texts(path, tokenizer: Tokenizer) -> Documents:
    """Documents of a file with one JSON object a line: {"text": str}, and "id" if it has one.

    A document is the beginning token, the text and the end token. Characters in the text that spell a special token
    stay characters. Empty texts are left out, and a warning counts them.

    Args:
        path: the file.
        tokenizer: encodes the texts; names the beginning and the end token.

    Raises:
        PanguError: the file cannot be read, a line holds no text (named as file:line), the tokenizer has no beginning
            or no end token, or the file holds no document.
    """
    bos, eos = special_id(tokenizer, "bos_token"), special_id(tokenizer, "eos_token")
    found, skipped = [], 0
    texts = _texts(path)
    while batch := list(islice(texts, BATCH)):
        full = [(name, text) for name, text in batch if text]
        skipped += len(batch) - len(full)
        for (name, _), encoded in zip(full, tokenizer.encode_batch([text for _, text in full])):
            ids = np.array([bos, *encoded, eos], np.int32)
            found.append((name, ids, np.ones(len(ids), bool)))
    if not found:
        raise PanguError(f'{path}: holds no document: wanted lines of {{"text": ...}}')
    if skipped:
        logger.warning("%s: %d empty texts left out", path, skipped)
    return join(found, may_be_cut=True, pad_id=eos, skipped=skipped)


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
    """What errors call the document of a line: its "id", else file:line."""
    return str(record.get("id", where))


def kind(value) -> str:
    """What a JSON value is, in words for errors."""
    if value is None:
        return "missing"
    return {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}.get(
        type(value), "an object")


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of "bos_token" or "eos_token".

    Raises:
        PanguError: the tokenizer has none.
    """
    token_id = getattr(tokenizer, f"{name}_id")
    if token_id is None:
        raise PanguError(f"{tokenizer.directory}: no token is named as {name}: name it in tokenizer_config.json, and "
                         f"{name}_id in config.json if that is there")
    return token_id
