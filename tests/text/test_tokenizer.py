"""Text in and out: one beginning token, round trips, and streaming that never shows half a character."""
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers

from pangu_ms.errors import PanguError
from pangu_ms.text.tokenizer import TextStream, Tokenizer, tokenizer_file

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
    """The text of each id as it comes, then what the end lets out."""
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.fixture(scope="module")
def both(directory, sentencepiece_directory):
    """The tokenizers of tokenizer.json and of tokenizer.model."""
    return Tokenizer(directory), Tokenizer(sentencepiece_directory)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(both, text):
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_one_beginning_token(both):
    for tokenizer, bos, written in zip(both, (0, 1), (BOS, "<s>")):
        plain = tokenizer.encode("Hello world")
        assert plain[0] == bos and plain.count(bos) == 1 and plain == tokenizer.encode(written + "Hello world")
        assert len(plain) < len("Hello world"), "the merges of the file are used"


def test_no_beginning_token_where_the_model_has_none(directory, data, tmp_path):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    assert 0 not in Tokenizer(with_config(tmp_path, data, bos_token_id=None)).encode("Hello")


def test_special_tokens_by_name_and_by_text(directory, sentencepiece_directory, tmp_path):
    """Without config.json, as beside training data, tokenizer_config.json names the beginning token, too."""
    for path, bos, eos, ids in ((directory, BOS, EOS, (0, 1)), (sentencepiece_directory, "<s>", "</s>", (1, 2))):
        shutil.copy(tokenizer_file(path), tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"bos_token": bos, "eos_token": {"content": eos, "special": True}, "add_bos_token": True}))
        tokenizer = Tokenizer(tmp_path)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == ids == (tokenizer.token_id(bos), ids[1])
        assert tokenizer.special_tokens == {"bos_token": bos, "eos_token": eos}
        assert tokenizer.token_id("no such token") is None
        tokenizer_file(tmp_path).unlink()


def test_config_json_says_what_begins_a_text(directory, data, tmp_path):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    tokenizer = Tokenizer(with_config(tmp_path, data, bos_token_id=7, eos_token_id=8))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (7, 1)
    assert Tokenizer(with_config(tmp_path, data, bos_token_id=None)).bos_token_id is None


def test_texts_to_train_on_get_nothing_added_and_stay_characters(both):
    for tokenizer in both:
        plain, spelled = tokenizer.encode_batch(["Hello world", f"a{EOS}b"])
        assert plain == tokenizer.encode("Hello world", bos=False) == tokenizer.encode("Hello world")[1:]
        assert tokenizer.decode(spelled) == f"a{EOS}b", "no special token, which decoding would leave out"


def test_a_prompt_after_texts_has_its_special_tokens_again(directory):
    tokenizer = Tokenizer(directory)
    tokenizer.encode_batch(["Hello"])
    assert tokenizer.encode(f"a{EOS}")[-1] == 1


def test_stream_never_shows_half_a_character(both):
    for tokenizer in both:
        ids = tokenizer.encode("é日🎉")
        texts = streamed(tokenizer, ids)
        assert len(ids) > 9 and "".join(texts[:-1]) == "é日🎉"
        assert {text for text in texts if text} == {"é", "日", "🎉"}


def test_stream_of_broken_bytes_loses_nothing(directory):
    """Random tokens, as an untrained model gives them: specials between, characters that never end."""
    tokenizer, dice = Tokenizer(directory), random.Random(0)
    for _ in range(200):
        ids = [dice.randrange(290) for _ in range(30)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_flush_shows_the_unfinished_character(directory):
    tokenizer = Tokenizer(directory)
    assert streamed(tokenizer, tokenizer.encode("a日")[:-1])[-1] == "\ufffd"


def test_ids_past_the_tokenizer_decode_to_nothing(both):
    """The model's vocabulary is padded past the tokenizer's."""
    for tokenizer in both:
        ids = [*tokenizer.encode("Hello"), 100_000]
        assert tokenizer.decode(ids) == "Hello" == "".join(streamed(tokenizer, ids))


def test_special_tokens_are_left_out(both):
    for tokenizer, eos in zip(both, (1, 2)):
        ids = [*tokenizer.encode("Hi"), eos]
        assert tokenizer.decode(ids) == "Hi" == "".join(streamed(tokenizer, ids))


def test_vocab_size(both):
    assert [tokenizer.vocab_size for tokenizer in both] == [283, 310]


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
    tokenizer = Tokenizer(directory)
    parts = shown(tokenizer, "Hello é wide world", ["wid"])
    assert "".join(parts) == "Hello é " and "" in parts
    assert len(parts) < len(shown(tokenizer, "Hello é wide world"))


@pytest.mark.parametrize("stop_strings, last", [(["wid"], "wi"), ([], "i")])
def test_the_last_id_brings_what_was_held_back(directory, stop_strings, last):
    parts = shown(Tokenizer(directory), "one wi", stop_strings)
    assert "".join(parts) == "one wi" and parts[-1] == last


def test_the_last_id_brings_half_a_character_and_half_a_stop_string(directory):
    parts = shown(Tokenizer(directory), "a日", ["\ufffd!"], cut=1)
    assert parts == ["a", "", "\ufffd"]


def test_no_tokenizer_is_a_clear_error(data):
    assert tokenizer_file(data / "tiny") is None
    with pytest.raises(PanguError, match="tiny: holds no tokenizer .looked for tokenizer.json and tokenizer.model."):
        Tokenizer(data / "tiny")
    with pytest.raises(PanguError, match="none: no such directory: give one that holds tokenizer.json or"):
        Tokenizer(data / "none")


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{}"), ("tokenizer.json", "not json"),
                                        ("tokenizer.model", "no")])
def test_damaged_tokenizer_is_a_clear_error(data, tmp_path, name, text):
    with_config(tmp_path, data)
    (tmp_path / name).write_text(text)
    with pytest.raises(PanguError, match=f"{name}: cannot be read as a tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text, message", [("{", "cannot be read as JSON .*: fetch the file again"),
                                           ("[]", "holds no JSON object: fetch the file again")])
def test_damaged_settings_are_a_clear_error(directory, data, tmp_path, text, message):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(PanguError, match=f"tokenizer_config.json: {message}"):
        Tokenizer(tmp_path)


def test_text_that_is_not_utf8_is_a_clear_error(directory):
    with pytest.raises(PanguError, match="not UTF-8 at character 2"):
        Tokenizer(directory).encode("ab\udcff")
