"""Text to ids and back, by the tokenizer that a directory holds. Needs no MindSpore, and fetches nothing."""
import json
from pathlib import Path

from pangu_ms.architectures import read_config
from pangu_ms.architectures.fields import CONFIG_FILE
from pangu_ms.errors import PanguError
from pangu_ms.text.stop_strings import StopStrings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference; openPangu-2.0 has the first
TOKENIZER_CONFIG = "tokenizer_config.json"


class Tokenizer:
    """The tokenizer of a directory: for prompts, for chat templates and for texts to train on.

    Args:
        directory: holds tokenizer.json or tokenizer.model, and beside it tokenizer_config.json, which names the special
            tokens. Where it is a checkpoint, config.json says which id begins a text.

    Attributes:
        directory (Path):
        settings (dict): the contents of tokenizer_config.json.
        special_tokens (dict[str, str]): those it names, such as {"eos_token": "<|pangu_text_end|>"}.
        vocab_size (int): ids that the tokenizer knows; the vocabulary of the model may be padded past them.
        bos_token_id (int | None): begins a text. config.json decides where it is there, else tokenizer_config.json.
        eos_token_id (int | None): ends a text, by tokenizer_config.json.

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
        try:
            self._model = _TokenizerJson(path) if path.suffix == ".json" else _SentencePiece(path)
        except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
            raise PanguError(f"{path}: cannot be read as a tokenizer ({error}): fetch the file again") from None
        self.vocab_size = self._model.vocab_size
        self.eos_token_id = self.token_id(self.special_tokens.get("eos_token"))
        self.bos_token_id = (read_config(directory).bos_token_id if (self.directory / CONFIG_FILE).is_file()
                             else self.token_id(self.special_tokens.get("bos_token")))

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
        """The text of ids. Special tokens, and ids that the tokenizer does not know, are left out."""
        return self._model.decode(ids)

    def stream_decoder(self):
        """A new decoder of ids that come one by one: `push(id)` and `flush()` give the text as `StreamDecoder` does."""
        return self._model.stream_decoder()


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
    """tokenizer.model of sentencepiece."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor
        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.get_piece_size()
        self._bos_id = self._processor.bos_id()  # -1 where the model has none
        self._written_bos = self._processor.id_to_piece(self._bos_id) if self._bos_id >= 0 else None

    def token_id(self, token):
        found = self._processor.piece_to_id(token)  # the unknown token's for what is no token
        return found if self._processor.id_to_piece(found) == token else None

    def encode(self, text):
        # The written form of a control token is plain characters to sentencepiece.
        if self._written_bos and text.startswith(self._written_bos):
            return [self._bos_id, *self._processor.encode(text.removeprefix(self._written_bos))]
        return self._processor.encode(text)

    def encode_batch(self, texts):
        return self._processor.encode(texts)

    def decode(self, ids):
        return self._processor.decode([i for i in ids if i < self.vocab_size])  # it refuses ids it does not know

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
