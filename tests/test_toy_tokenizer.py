"""The trained tokenizer: its ids, its files, and what its template renders."""
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizer import SPECIAL_TOKENS, train_tokenizer

from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer

TEXTS = ["def add(left, right):\n    return left + right\n", "the answer to the question, 1234 times"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "made"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_the_special_tokens_have_the_last_ids_in_the_released_order(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.id_to_token(i) for i in range(292, 300)] == [
        "<|pangu_text_start|>", "<|pangu_text_end|>", "<|message_start|>", "<|message_end|>",
        "<|tool_call_start|>", "<|tool_call_end|>", "<think>", "</think>"]
    assert [tokenizer.get_added_tokens_decoder()[i].special for i in range(292, 300)] == [True] * 4 + [False] * 4
    assert tokenizer.decode([292, 298, 299, 293]) == "<think></think>"


def test_merges_are_learned_and_digits_stand_alone(tokenizer):
    assert tokenizer.encode("the answer").tokens[0] == "the"
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]


@given(text=st.text().filter(lambda text: not any(name in text for name in SPECIAL_TOKENS)))
def test_any_text_comes_back_and_nothing_is_added_to_it(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 292


def test_the_same_texts_give_the_same_file(directory, tmp_path):
    train_tokenizer(iter(TEXTS), 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"], config["padding_side"]) == (
        "<|pangu_text_start|>", "<|pangu_text_end|>", "<|pangu_text_end|>", "left")


@pytest.mark.parametrize("thinking, mark", [(True, "<think>"), (False, "</think>")])
def test_the_template_begins_with_a_system_turn_and_puts_nothing_between_turns(directory, tokenizer, thinking, mark):
    messages = [{"role": "user", "content": "one"},
                {"role": "assistant", "content": "two", "reasoning_content": "why"},
                {"role": "user", "content": "three"}]
    ids = ChatTemplate(Tokenizer(directory)).render(messages, thinking=thinking)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|pangu_text_start|><|message_start|>system\n<|message_end|><|message_start|>user\none<|message_end|>"
        "<|message_start|>assistant\n</think>two<|message_end|><|message_start|>user\nthree<|message_end|>"
        f"<|message_start|>assistant\n{mark}")


@pytest.mark.parametrize("vocab_size, message", [
    (263, "vocab_size is 263: the bytes and the special tokens alone are 264 ids"),
    (5000, r"vocab_size is 5000: the texts give \d+ ids: bring more text or ask for fewer")])
def test_a_size_that_cannot_be(tmp_path, vocab_size, message):
    with pytest.raises(PanguError, match=f"^{message}$"):
        train_tokenizer(TEXTS, vocab_size, tmp_path / "none")
    assert not (tmp_path / "none").exists()
