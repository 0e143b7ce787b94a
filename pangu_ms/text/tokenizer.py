"""Text to ids and back, by the tokenizer that a directory holds. Needs no MindSpore, and fetches nothing."""
import json
import os
import re
from itertools import groupby
from pathlib import Path

from pangu_ms.architectures import read_config
from pangu_ms.architectures.chat import EMBEDDED_7B, OPENPANGU_V2
from pangu_ms.architectures.fields import CONFIG_FILE
from pangu_ms.errors import PanguError
from pangu_ms.text.stop_strings import StopStrings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference; openPangu-2.0 has the first
TOKENIZER_CONFIG = "tokenizer_config.json"


class Tokenizer:
    """The tokenizer of a directory: for prompts, for chat templates and for texts to train on.

    Args:
        directory: holds tokenizer.json or tokenizer.model, and beside it tokenizer_config.json, which names the special
            tokens. Where it is a checkpoint, config.json says which id begins a text, and which member of the family it
            is.

    Attributes:
        directory (Path):
        settings (dict): the contents of tokenizer_config.json.
        special_tokens (dict[str, str]): those it names, such as {"eos_token": "<|pangu_text_end|>"}.
        vocab_size (int): ids that the tokenizer knows; the vocabulary of the model may be padded past them.
        bos_token_id (int | None): begins a text. config.json decides where it is there, else tokenizer_config.json.
        eos_token_id (int | None): ends a text, by tokenizer_config.json.
        chat (Chat): of the member that config.json names; without one, tokenizer.json is taken for openPangu-2.0's and
            tokenizer.model for its relatives'.

    Raises:
        PanguError: no tokenizer, a file that cannot be read, or a config.json that is refused.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        path = tokenizer_file(directory)
        if path is None:
            raise PanguError(f"{directory}: holds no tokenizer (looked for {' and '.join(TOKENIZER_FILES)}): add it"
                             if self.directory.is_dir() else
                             f"{directory}: no such directory: give one that holds {' or '.join(TOKENIZER_FILES)}")
        self.settings = _read_settings(self.directory / TOKENIZER_CONFIG)
        self.special_tokens = {name: token.get("content") if isinstance(token, dict) else token
                               for name, token in self.settings.items()
                               if name.endswith("_token") and isinstance(token, (str, dict))}
        config = read_config(directory) if (self.directory / CONFIG_FILE).is_file() else None
        self.chat = config.chat if config else OPENPANGU_V2 if path.suffix == ".json" else EMBEDDED_7B
        try:
            self._model = (_TokenizerJson(path) if path.suffix == ".json"
                           else _SentencePiece(path, self._special_texts()))
        except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
            raise PanguError(f"{path}: cannot be read as a tokenizer ({error}): fetch the file again") from None
        self.vocab_size = self._model.vocab_size
        self.eos_token_id = self.token_id(self.special_tokens.get("eos_token"))
        self.bos_token_id = config.bos_token_id if config else self.token_id(self.special_tokens.get("bos_token"))
        self._marks = {self.token_id(mark): mark for mark in self.chat.marks.in_reply}
        self._marks.pop(None, None)  # marks that the tokenizer does not have

    def token_id(self, token: str | None) -> int | None:
        """The id of a token by its text, None where there is none."""
        return None if token is None else self._model.token_id(token)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a prompt, which is taken whole. A special token that is spelled out in it becomes its id.

        Args:
            bos: put the beginning token in front, unless the text already begins with it.

        Raises:
            PanguError: the text cannot be written as UTF-8 (a command line argument in another encoding).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PanguError(f"the text is not UTF-8 at character {error.start}: convert it") from None
        ids = self._model.encode(text)
        if not bos or self.bos_token_id is None or ids[:1] == [self.bos_token_id]:
            return ids
        return [self.bos_token_id, *ids]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts to train on, on all cores: nothing is added, and what spells a special token stays
        characters."""
        return self._model.encode_batch(texts)

    def decode(self, ids) -> str:
        """The text of ids. Special tokens are left out but for the marks that part a reply, and so are ids that the
        tokenizer does not know."""
        parts = groupby(ids, key=self._marks.get)  # by id: in many a tokenizer the marks are special tokens, too
        return "".join(self._model.decode(list(part)) if mark is None else mark * len(list(part))
                       for mark, part in parts)

    def stream_decoder(self):
        """A new decoder of ids that come one by one: `push(id)` and `flush()` give the text as `StreamDecoder` does."""
        return _MarkedStreamDecoder(self._model, self._marks)

    def _special_texts(self):
        """What tokenizer_config.json calls special, and what a chat is marked with."""
        named = self.settings.get("added_tokens_decoder")
        added = [token.get("content") for token in named.values() if token.get("special")] if named else []
        return {*self.special_tokens.values(), *added, self.chat.marks.message_end, *self.chat.marks.in_reply}


class _MarkedStreamDecoder:
    """A decoder of a stream in which marks stand: the text between them is decoded as a text of its own."""

    def __init__(self, model, marks):
        self._model, self._marks = model, marks
        self._decoder = model.stream_decoder()

    def push(self, token_id):
        if token_id not in self._marks:
            return self._decoder.push(token_id)
        before = self._decoder.flush()
        self._decoder = self._model.stream_decoder()
        return before + self._marks[token_id]

    def flush(self):
        return self._decoder.flush()


class _TokenizerJson:
    """tokenizer.json, read by the library that defines it."""

    def __init__(self, path):
        import tokenizers
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()  # the file may ask for either
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.token_id, self.decode = self._tokenizer.token_to_id, self._tokenizer.decode

    # Without the file's post-processor: whether it adds a beginning token differs from file to file.

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        self._tokenizer.encode_special_tokens = True
        try:
            return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self._tokenizer.encode_special_tokens = False

    def stream_decoder(self):
        return _JsonStreamDecoder(self._tokenizer)


class _JsonStreamDecoder:
    """The library's own decoder of a stream, and its end, which it does not have."""

    def __init__(self, tokenizer):
        from tokenizers.decoders import DecodeStream
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self._ids, self._shown = [], 0  # all that came, and how many characters of it were shown

    def push(self, token_id):
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._ids.append(token_id)
        self._shown += len(text)
        return text

    def flush(self):
        return self._tokenizer.decode(self._ids)[self._shown:]


class _SentencePiece:
    """tokenizer.model of sentencepiece, used as the released PanguTokenizer uses it: a prompt is cut at its special
    tokens, and each part between them is encoded as a text of its own.

    Args:
        path:
        special: texts of special tokens, besides those that the file itself calls so; one that is no piece is ignored.
    """

    def __init__(self, path, special):
        # As MindSpore sets it: its own messages can be read by no other implementation, and it may be imported later.
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
        model, self._special = ModelProto.FromString(path.read_bytes()), {}
        for token_id, piece in enumerate(model.pieces):
            if piece.piece in special or piece.type in (piece.CONTROL, piece.UNKNOWN):
                self._special[piece.piece] = token_id
                # The file may call it user-defined: then it would be found in every text, also in those to train on.
                if piece.type != piece.UNKNOWN:
                    piece.type = piece.CONTROL
        self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._cut = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")
        self.vocab_size = len(model.pieces)

    def token_id(self, token):
        found = self._processor.piece_to_id(token)  # the unknown token's for what is no token
        return found if self._processor.id_to_piece(found) == token else None

    def encode(self, text):
        ids = []
        for place, part in enumerate(self._cut.split(text)):  # text, special token, text, ...
            ids += [self._special[part]] if place % 2 else self._processor.encode(part)
        return ids

    def encode_batch(self, texts):
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1  # as the other library does
        return self._processor.encode(texts, num_threads=threads)

    def decode(self, ids):
        unknown = self._processor.unk_id()  # also pads; written as question marks else
        return self._processor.decode([i for i in ids if i < self.vocab_size and i != unknown])

    def stream_decoder(self):
        return StreamDecoder(self.decode)


class StreamDecoder:
    """Turns ids that come one by one into text, never half a character.

    A character may spread over several tokens, whose bytes decode to U+FFFD until the last has come: text is held back
    while it ends so. New ids are decoded behind those that were shown last, since a token can look different at the
    start of a text (sentencepiece drops its space).

    Args:
        decode: ids -> text.
    """

    def __init__(self, decode):
        self._decode = decode
        self._shown_ids = []  # those shown last
        self._new_ids = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._new_ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown_ids, self._new_ids = self._new_ids, []
        return text

    def flush(self) -> str:
        """What was held back to the end: a character that was never finished, as U+FFFD."""
        return self._new_text()

    def _new_text(self):
        return self._decode(self._shown_ids + self._new_ids)[len(self._decode(self._shown_ids)):]


class TextStream:
    """The text of ids that come one by one, up to a stop string, which is left out.

    Attributes:
        stopped (bool): the stop string is complete: no id may follow.

    Raises:
        PanguError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings=()):
        self._decoder, self._stop = tokenizer.stream_decoder(), StopStrings(stop_strings)

    def push(self, token_id: int, last: bool) -> str:
        """What may be shown once this id is there; "" while it is held back; with the last id all that is left."""
        text = self._stop.push(self._decoder.push(token_id))
        if last and not self.stopped:
            text += self._stop.push(self._decoder.flush())
            text += self._stop.flush()
        return text

    @property
    def stopped(self) -> bool:
        return self._stop.stopped


def tokenizer_file(directory) -> Path | None:
    """The tokenizer file of a directory, None when it has none."""
    paths = (Path(directory) / name for name in TOKENIZER_FILES)
    return next((path for path in paths if path.is_file()), None)


def _read_settings(path):
    """The contents of tokenizer_config.json, {} when it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise PanguError(f"{path}: cannot be read as JSON ({error}): fetch the file again") from None
    if not isinstance(found, dict):
        raise PanguError(f"{path}: holds no JSON object: fetch the file again")
    return found
