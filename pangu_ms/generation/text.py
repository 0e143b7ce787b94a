"""Text in and out, through the tokenizer that a checkpoint directory brings. Needs no MindSpore."""
from pathlib import Path
from typing import Callable

from pangu_ms.config import PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.generation.stopping import StopStrings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference; the released models ship the first


class TextTokenizer:
    """Text to ids and back.

    Args:
        encode: text -> ids, without a beginning token added.
        decode: ids -> text, special tokens left out.
        vocab_size: ids the tokenizer knows; the vocabulary of the model may be padded past them.
        bos_token_id: begins every encoded text; None where the model has none.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], vocab_size: int,
                 bos_token_id: int | None):
        self._encode = encode
        self.vocab_size = vocab_size
        self._bos_token_id = bos_token_id
        self.decode = decode

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt. The beginning token is put in front unless the text already begins with it.

        Raises:
            PanguError: the text cannot be written as UTF-8 (a command line argument in another encoding).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PanguError(f"the text is not UTF-8 at character {error.start}: convert it") from None
        ids = self._encode(text)
        if self._bos_token_id is None or ids[:1] == [self._bos_token_id]:
            return ids
        return [self._bos_token_id, *ids]


class StreamDecoder:
    """Turns ids that arrive one by one into text, never half a character.

    A character may spread over several tokens, whose bytes decode to U+FFFD until the last has come: text is held back
    while it ends so. New ids are decoded behind those of the piece before them, since a token can look different at
    the start of a text (sentencepiece drops its space).
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._decode = tokenizer.decode
        self._shown_ids = []  # of the last piece
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

    def _new_text(self) -> str:
        return self._decode(self._shown_ids + self._new_ids)[len(self._decode(self._shown_ids)):]


class TextStream:
    """The text of ids that arrive one by one, ending at a stop string, which is left out.

    Attributes:
        stopped (bool): the stop string is complete: no id may follow.

    Raises:
        PanguError: a stop string is empty.
    """

    def __init__(self, tokenizer: TextTokenizer, stop_strings=()):
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(stop_strings)

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
    """The tokenizer file of a checkpoint directory, None when it has none."""
    paths = (Path(directory) / name for name in TOKENIZER_FILES)
    return next((path for path in paths if path.is_file()), None)


def load_tokenizer(directory) -> TextTokenizer:
    """The tokenizer of a checkpoint directory; its beginning token is the bos_token_id of config.json.

    Raises:
        PanguError: no tokenizer file, a file that cannot be read, or a config.json that is refused.
    """
    path = tokenizer_file(directory)
    if path is None:
        raise PanguError(f"{directory}: holds no tokenizer ({' or '.join(TOKENIZER_FILES)}): "
                         "add it, or give the prompt as --token-ids")
    bos_token_id = PanguConfig.from_pretrained(directory).bos_token_id
    load = _load_json if path.suffix == ".json" else _load_sentencepiece
    try:
        encode, decode, vocab_size = load(path, bos_token_id)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
        raise PanguError(f"{path}: cannot be read as a tokenizer ({error}): fetch the file again") from None
    return TextTokenizer(encode, decode, vocab_size, bos_token_id)


def _load_json(path, bos_token_id):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # the file may ask for either: a prompt is taken whole and alone
    tokenizer.no_padding()
    # Without the file's post-processor: whether it adds a beginning token differs from file to file.
    return (lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode,
            1 + max(tokenizer.get_vocab().values()))


def _load_sentencepiece(path, bos_token_id):
    from sentencepiece import SentencePieceProcessor
    processor = SentencePieceProcessor(model_file=str(path))
    size = processor.get_piece_size()
    # Sentencepiece reads the written form of a control token as plain characters.
    written_bos = processor.id_to_piece(bos_token_id) if bos_token_id is not None and bos_token_id < size else ""
    # A model's vocabulary may be padded past the tokenizer's; sentencepiece refuses ids it does not know.
    return (lambda text: processor.encode(text.removeprefix(written_bos)),
            lambda ids: processor.decode([i for i in ids if i < size]), size)
