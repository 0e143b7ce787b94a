"""Documents: a JSONL file of texts becomes token ids in memory."""
import json
import logging
from collections.abc import Sequence
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
        ids: [N], of integers that int32 holds; in memory or mapped from a file.
        counted: bool [N], or bytes of 0 and 1. Whether the loss of predicting this token counts.
        offsets: int64 [D + 1]. Document i is ids[offsets[i]:offsets[i + 1]], which may be empty.
        names: D of them, by number: what errors call each document, its "id" or where it stands.
        may_be_cut (bool): whether a sequence may hold a part of a document.
        pad_id (int): stands where a sequence has no token.
        skipped (int): how many texts were empty and left out.
        largest_id (int | None): of all tokens, None where only reading them all would tell.
    """

    ids: np.ndarray
    counted: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    may_be_cut: bool
    pad_id: int
    skipped: int = 0
    largest_id: int | None = None

    def __len__(self):
        return len(self.names)


def join(documents, may_be_cut: bool, pad_id: int, skipped: int = 0) -> Documents:
    """One `Documents` of a list of (name, ids, counted)."""
    lengths = [len(ids) for _, ids, _ in documents]
    ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for _, ids, _ in documents)])
    counted = np.concatenate([np.empty(0, bool), *(np.asarray(counted, bool) for _, _, counted in documents)])
    return Documents(ids, counted, np.cumsum([0, *lengths], dtype=np.int64), [name for name, _, _ in documents],
                     may_be_cut, pad_id, skipped, ids.max(initial=-1).item())


def read_texts(path, tokenizer: Tokenizer) -> Documents:
    """Documents of a file with one JSON object a line, as `text_encoder` takes them, and "id" if it has one.

    Empty texts are left out, and a warning counts them.

    Args:
        path: the file.
        tokenizer: encodes the texts; names the beginning and the end token.

    Raises:
        PanguError: the file cannot be read, a line holds no text (named as file:line), the tokenizer has no beginning
            or no end token, or the file holds no document.
    """
    encode, found, skipped = text_encoder(tokenizer), [], 0
    records = read_jsonl(path)
    while batch := list(islice(records, BATCH)):
        documents = encode(batch)
        skipped += len(batch) - len(documents)
        found += documents
    if not found:
        raise PanguError(f'{path}: holds no document: wanted lines of {{"text": ...}}')
    if skipped:
        logger.warning("%s: %d empty texts left out", path, skipped)
    return join(found, may_be_cut=True, pad_id=special_id(tokenizer, "eos_token"), skipped=skipped)


def text_encoder(tokenizer: Tokenizer):
    """encode([(where, {"text": str}), ...]) -> [(name, ids, counted), ...], one for each text that is not empty.

    A document is the beginning token, the text and the end token. Characters in the text that spell a special token
    stay characters. `encode` raises `PanguError`, which begins with `where`, for what is no text.

    Raises:
        PanguError: the tokenizer has no beginning or no end token.
    """
    bos, eos = special_id(tokenizer, "bos_token"), special_id(tokenizer, "eos_token")

    def encode(records):
        texts = [(name_of(record, where), text_of(record, where)) for where, record in records]
        full = [(name, text) for name, text in texts if text]
        batch = tokenizer.encode_batch([text for _, text in full]) if full else []
        return [(name, np.array([bos, *ids, eos], np.int32), np.ones(len(ids) + 2, bool))
                for (name, _), ids in zip(full, batch)]
    return encode


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
                    yield f"{path}:{number}", parse(line, f"{path}:{number}")
    except OSError as error:
        raise PanguError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def parse(line: bytes, where: str) -> dict:
    """The JSON object of a line; `PanguError` begins with `where`."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone \ud800 is JSON, and is no text
    except UnicodeError as error:
        raise PanguError(f"{where}: not UTF-8 ({error.reason}): convert the file") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise PanguError(f"{where}: not JSON ({why}): mend the line or remove it") from None
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
