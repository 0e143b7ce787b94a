"""The pieces of a stream: their text adds up, with and without drafts, and ends where it should."""
from types import SimpleNamespace

import pytest

from pangu_ms.errors import PanguError
from pangu_ms.generation.stream import generate, stream_generate
from pangu_ms.text.tokenizer import StreamDecoder

PROMPT, NEW_TOKENS = [5, 6, 7, 8], 24


def decode(ids):
    """One character an id, but ids divisible by 3, whose byte begins a character that does not end."""
    return b"".join(b"\xe4" if i % 3 == 0 else chr(i + 256).encode() for i in ids).decode(errors="replace")


TOKENIZER = SimpleNamespace(decode=decode, stream_decoder=lambda: StreamDecoder(decode))


def pieces(model, **options):
    return list(stream_generate(model("tiny"), PROMPT, NEW_TOKENS, tokenizer=TOKENIZER, eos_token_ids=(), **options))


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_text_adds_up(model, drafts):
    found = pieces(model, num_draft_tokens=drafts)
    ids = [piece.token_id for piece in found]
    assert len(ids) == NEW_TOKENS and "".join(piece.text for piece in found) == TOKENIZER.decode(ids)
    assert [piece.text == "" for piece in found[:-1]] == [i % 3 == 0 for i in ids[:-1]]
    stop = TOKENIZER.decode(ids[9:11])
    stopped = pieces(model, num_draft_tokens=drafts, stop=[stop])
    assert "".join(piece.text for piece in stopped) == TOKENIZER.decode(ids).partition(stop)[0]
    assert len(stopped) == len(ids[:11]), "nothing is asked for behind the stop string"


def test_no_tokenizer_no_text(model):
    (piece,) = stream_generate(model("tiny"), PROMPT, 1)
    assert piece.text is None
    with pytest.raises(PanguError, match="stop is .'x'., and there is no tokenizer"):
        generate(model("tiny"), PROMPT, 1, stop=["x"])
