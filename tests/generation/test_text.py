"""Text in and out: one beginning token, round trips, and streaming that never shows half a character."""
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers

from pangu_ms.errors import PanguError
from pangu_ms.generation.text import StreamDecoder, TextStream, load_tokenizer, tokenizer_file

BOS, EOS = "<|start|>", "<|end|>"
TEXTS = ["Hello world", "  two  spaces, a\nnewline\t", "naïve 日本語 한국어", "👩‍👩‍👧 and 🎉🎉", "12 345", "�", "", " "]


@pytest.fixture(scope="module")
def directory(data, tmp_path_factory):
    """A byte-level BPE like the released one, small: specials 0 and 1, 256 bytes, some merges."""
    path = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=[BOS, EOS], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Hello world, hello words, hello there, two spaces"] * 3, trainer)
    # What must not reach a prompt: a second beginning token, cutting, padding.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(path / "tokenizer.json"))
    return with_config(path, data, bos_token_id=0)


@pytest.fixture(scope="module")
def sentencepiece_directory(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece")
    corpus = path / "corpus.txt"
    corpus.write_text("Hello world, hello words.\nTwo words, two worlds.\nOther letters: abcdefgijkmnpquvxyz\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(path / "tokenizer"), vocab_size=310, byte_fallback=True, model_type="bpe",
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return with_config(path, data, bos_token_id=1)


def with_config(path, data, **fields):
    config = json.loads((data / "tiny" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
    return path


def streamed(tokenizer, ids):
    """The pieces of a stream, what is held back at the end as the last one."""
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(directory, text):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_sentencepiece(sentencepiece_directory, text):
    tokenizer = load_tokenizer(sentencepiece_directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_beginning_token(directory):
    tokenizer = load_tokenizer(directory)
    plain, begun = tokenizer.encode("Hello world"), tokenizer.encode(BOS + "Hello world")
    assert plain[0] == 0 and plain.count(0) == 1 and plain == begun
    assert len(plain) < len("Hello world"), "the merges of the file are used"


def test_one_beginning_token_sentencepiece(sentencepiece_directory):
    tokenizer = load_tokenizer(sentencepiece_directory)
    plain = tokenizer.encode("Hello world")
    assert plain[0] == 1 and plain.count(1) == 1 and plain == tokenizer.encode("<s>Hello world")


def test_no_beginning_token_where_the_model_has_none(directory, data, tmp_path):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    assert 0 not in load_tokenizer(with_config(tmp_path, data, bos_token_id=None)).encode("Hello")


@pytest.mark.parametrize("name", ["directory", "sentencepiece_directory"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_adds_up(request, name, text):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == text


@pytest.mark.parametrize("name", ["directory", "sentencepiece_directory"])
def test_stream_never_shows_half_a_character(request, name):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    ids = tokenizer.encode("é日🎉")
    pieces = streamed(tokenizer, ids)
    assert len(ids) > 9 and "".join(pieces[:-1]) == "é日🎉"
    assert {piece for piece in pieces if piece} == {"é", "日", "🎉"}


def test_stream_of_broken_bytes_loses_nothing(directory):
    """Random tokens, as an untrained model gives them: specials between, characters that never end."""
    tokenizer, dice = load_tokenizer(directory), random.Random(0)
    for _ in range(200):
        ids = [dice.randrange(290) for _ in range(30)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_flush_shows_the_unfinished_character(directory):
    tokenizer = load_tokenizer(directory)
    assert streamed(tokenizer, tokenizer.encode("a日")[:-1])[-1] == "\ufffd"


def test_ids_past_the_tokenizer_decode_to_nothing(directory, sentencepiece_directory):
    """The model's vocabulary is padded past the tokenizer's."""
    for path in (directory, sentencepiece_directory):
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode([*tokenizer.encode("Hello"), 100_000]) == "Hello"


def test_special_tokens_are_left_out(directory):
    assert load_tokenizer(directory).decode([0, *load_tokenizer(directory).encode("Hi"), 1]) == "Hi"


def test_vocab_size(directory, sentencepiece_directory):
    assert load_tokenizer(directory).vocab_size == 283
    assert load_tokenizer(sentencepiece_directory).vocab_size == 310


def shown(tokenizer, text, stop_strings=(), cut=0):
    """What each id of a text shows, up to the stop string."""
    ids = tokenizer.encode(text)[1:]
    ids = ids[:len(ids) - cut]
    stream, parts = TextStream(tokenizer, stop_strings), []
    for i, token_id in enumerate(ids, 1):
        parts.append(stream.push(token_id, last=i == len(ids)))
        if stream.stopped:
            break
    return parts


def test_text_ends_at_a_stop_string(directory):
    tokenizer = load_tokenizer(directory)
    parts = shown(tokenizer, "Hello é wide world", ["wid"])
    assert "".join(parts) == "Hello é " and "" in parts
    assert len(parts) < len(shown(tokenizer, "Hello é wide world"))


@pytest.mark.parametrize("stop_strings, last", [(["wid"], "wi"), ([], "i")])
def test_the_last_id_brings_what_was_held_back(directory, stop_strings, last):
    parts = shown(load_tokenizer(directory), "one wi", stop_strings)
    assert "".join(parts) == "one wi" and parts[-1] == last


def test_the_last_id_brings_half_a_character_and_half_a_stop_string(directory):
    parts = shown(load_tokenizer(directory), "a日", ["\ufffd!"], cut=1)
    assert parts == ["a", "", "\ufffd"]


def test_no_tokenizer_is_a_clear_error(data):
    assert tokenizer_file(data / "tiny") is None
    with pytest.raises(PanguError, match="tiny: holds no tokenizer .tokenizer.json or tokenizer.model.*--token-ids"):
        load_tokenizer(data / "tiny")


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{}"), ("tokenizer.json", "not json"),
                                        ("tokenizer.model", "no")])
def test_damaged_tokenizer_is_a_clear_error(data, tmp_path, name, text):
    with_config(tmp_path, data)
    (tmp_path / name).write_text(text)
    with pytest.raises(PanguError, match=f"{name}: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_text_that_is_not_utf8_is_a_clear_error(directory):
    with pytest.raises(PanguError, match="not UTF-8 at character 2"):
        load_tokenizer(directory).encode("ab\udcff")
