"""Chats to documents: what the loss counts for is what the assistant says."""
import numpy as np
import pytest
import tokenizers

from pangu_ms.architectures.chat import PRO_MOE_V2
from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.chats import read_chats

HEAD = "<|pangu_text_start|><|message_start|>system\n"
END = "<|message_end|>"
ASK, SAY = f"{END}<|message_start|>user\n", f"{END}<|message_start|>assistant\n"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, reasoning=None):
    return {"role": "assistant", "content": content} | ({} if reasoning is None else {"reasoning_content": reasoning})


@pytest.fixture
def samples(jsonl, tokenizer_directory):
    """samples(record): the text of each sample of a chat, with what is counted between braces; and their names."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))

    def marked(ids, counted):
        shown, inside = "", False
        for token_id, counts in zip(ids, counted):
            if counts != inside:
                shown, inside = shown + ("{" if counts else "}"), counts
            shown += tokenizer.decode([token_id], skip_special_tokens=False)
        return shown + "}" * bool(inside)

    def read(record):
        documents = read_chats(jsonl([record]), Tokenizer(tokenizer_directory))
        assert not documents.may_be_cut and documents.pad_id == 277
        bounds = list(zip(documents.offsets[:-1], documents.offsets[1:]))
        return [marked(documents.ids[a:b], documents.counted[a:b]) for a, b in bounds], documents.names
    return read


def test_without_thinking_a_chat_is_one_sample(samples):
    texts, names = samples({"id": "a", "thinking": False, "messages": [
        {"role": "system", "content": "Short."}, user("the 1?"), assistant("Lima"), user("2?"), assistant("Peru 7")]})
    assert texts == [f"{HEAD}Short.{ASK}the 1?{SAY}</think>{{Lima{END}}}<|message_start|>user\n2?"
                     f"{SAY}</think>{{Peru 7{END}}}"]
    assert names == ["a"]


def test_with_thinking_reasoning_counts_and_the_mark_of_the_prompt_does_not(samples):
    texts, _ = samples({"thinking": True, "messages": [user("1?"), assistant("Lima", "why")]})
    assert texts == [f"{HEAD}{ASK}1?{SAY}<think>{{why</think>Lima{END}}}"]


def test_with_thinking_each_turn_is_a_sample_that_sees_no_earlier_reasoning(samples):
    texts, names = samples({"id": "b", "thinking": True, "messages": [
        user("1?"), assistant("one", "r1"), user("2?"), assistant("two", "r2"), user("left out")]})
    assert texts == [f"{HEAD}{ASK}1?{SAY}<think>{{r1</think>one{END}}}",
                     f"{HEAD}{ASK}1?{SAY}</think>one{ASK}2?{SAY}<think>{{r2</think>two{END}}}"]
    assert names == ["b (sample 1)", "b (sample 2)"]


def test_between_the_results_of_tools_reasoning_stays_and_so_does_the_sample(samples):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    (text,), _ = samples({"thinking": True, "tools": [{"name": "f"}], "messages": [
        user("1?"), assistant("", "r1") | {"tool_calls": [call]}, {"role": "tool", "content": "9"},
        assistant("done", "r2")]})
    assert '<tools>\n[{"name": "f"}]\n</tools>' in text
    assert text.endswith(
        f'{SAY}<think>{{r1</think><|tool_call_start|>\n[{{"name": "f", "arguments": {{}}}}]\n<|tool_call_end|>{END}}}'
        f"<|message_start|>tool\n9{SAY}<think>{{r2</think>done{END}}}")


def test_a_relative_writes_both_marks_of_reasoning_into_the_reply(jsonl, family):
    """What counts, between braces: reasoning, answer and the mark that ends the turn."""
    tokenizer = Tokenizer(family("embedded"))
    system, ask, say = "[unused9]系统：[unused10]", "[unused9]用户：", "[unused10][unused9]助手："

    def shown(*, name="embedded", **record):
        documents = read_chats(jsonl([record]), Tokenizer(family(name)))
        assert documents.pad_id == tokenizer.token_id("[unused10]")
        for start, end in zip(documents.offsets[:-1], documents.offsets[1:]):
            ids, counted = documents.ids[start:end].tolist(), documents.counted[start:end]
            assert ids.count(1) == 1 == ids[0] + counted[0]
            edges = [*np.flatnonzero(np.diff(counted)) + 1, len(ids)]
            yield [ids[a:b] for a, b in zip([0, *edges], edges)]

    def wanted(*parts):
        return [tokenizer.encode(text, bos=place == 0) for place, text in enumerate(parts)]

    turns = [user("1?"), assistant("one", "r1"), user("2?"), assistant("two", "r2")]
    assert [*shown(messages=turns, thinking=True)] == [
        wanted(f"{system}{ask}1?{say}", "[unused16]r1[unused17]one[unused10]"),
        wanted(f"{system}{ask}1?{say}one[unused10]{ask}2?{say}", "[unused16]r2[unused17]two[unused10]")]
    turns = [user("1?"), assistant("one"), user("2?"), assistant("two", "")]
    fast = " /no_think"
    assert [*shown(messages=turns, thinking=False)] == [
        wanted(f"{system}{ask}1?{fast}{say}", "one[unused10]"),
        wanted(f"{system}{ask}1?{say}one[unused10]{ask}2?{fast}{say}", "[unused16][unused17]two[unused10]")]
    assert [*shown(name="embedded_tied", messages=turns[:2], thinking=False)] == [
        wanted(f"{system}{ask}1?{say}", "one[unused10]")]
    for name, message in (("embedded", 'with "thinking" it needs "reasoning_content"'),
                          ("embedded_tied", ":1: thinking is 'on': openPangu-Embedded-1B has off alone")):
        with pytest.raises(PanguError, match=message):
            [*shown(name=name, messages=turns[:2], thinking=True)]


def test_without_public_switches_a_chat_does_not_say_whether_it_thinks(jsonl, family):
    tokenizer = Tokenizer(family("embedded"))
    tokenizer.chat = PRO_MOE_V2
    messages = [user("1?"), assistant("one", "r1")]
    documents = read_chats(jsonl([{"messages": messages}]), tokenizer)
    said = documents.ids[documents.counted].tolist()
    assert said == tokenizer.encode("[unused16]r1[unused17]one[unused10]", bos=False)
    with pytest.raises(PanguError, match=":1: thinking is 'on': openPangu-R-72B has no public switch"):
        read_chats(jsonl([{"messages": messages, "thinking": True}]), tokenizer)


def test_a_text_among_chats_counts_from_its_first_token_and_keeps_its_characters(samples, jsonl, tokenizer_directory):
    texts, names = samples({"id": "a", "text": "the user"})
    assert texts == ["{<|pangu_text_start|>the user}"] and names == ["a"]
    ids = read_chats(jsonl([{"text": "a<|message_end|>b"}]), Tokenizer(tokenizer_directory)).ids
    assert max(ids[1:]) < 276


@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_has_the_ids_that_the_model_will_see(jsonl, tokenizer_directory, thinking):
    """Encoding in parts gives what encoding the whole does, since marks stand at the boundaries."""
    tokenizer = Tokenizer(tokenizer_directory)
    messages = [user("the 1?"), assistant("the one", "why" if thinking else None), user("2?"),
                assistant("two", "for 2" if thinking else None)]
    documents = read_chats(jsonl([{"thinking": thinking, "messages": messages}]), tokenizer)
    last = documents.ids[documents.offsets[-2]:].tolist()
    template = ChatTemplate(tokenizer)
    prompt = template.render(messages[:3], thinking)
    assert last[:len(prompt)] == prompt
    assert last == tokenizer.encode(template.text(messages, thinking, add_generation_prompt=False), bos=False)
    assert not documents.counted[documents.offsets[-2]:][len(prompt) - 1]


@pytest.mark.parametrize("change, message", [
    ({"messages": None}, '"messages" is missing: wanted a list'),
    ({"messages": [user("a"), "b"]}, "messages[1] is text: wanted an object"),
    ({"messages": [{"role": "user"}]}, '"content" of messages[0] is missing: wanted text'),
    ({"messages": [{"role": 1, "content": ""}]}, '"role" of messages[0] is a number: wanted text'),
    ({"messages": [user("a"), assistant("b", ["c"])]},
     '"reasoning_content" of messages[1] is a list: wanted text'),
    ({"messages": [user("a")]}, "the roles are ['user']: wanted a turn of the assistant, behind another"),
    ({"messages": []}, "the roles are []: wanted a turn of the assistant, behind another"),
    ({"messages": [assistant("a")]}, "the roles are ['assistant']: wanted a turn of the assistant, behind another"),
    ({"thinking": None}, '"thinking" is missing: wanted true or false'),
    ({"thinking": 1}, '"thinking" is a number: wanted true or false'),
    ({"tools": "f"}, '"tools" is text: wanted a list'),
    ({"thinking": True}, r"messages[1] does not go on from its prompt, which ends with '\n<think>': with"),
    ({"messages": [user("a"), assistant("b", "c")]}, "messages[1] does not go on from its prompt, which ends with '"),
    ({"messages": [{"role": "poet", "content": ""}, assistant("b")]},
     "{directory}: the chat template cannot render the messages (TemplateError: unknown role poet)")])
def test_a_line_that_is_no_chat_is_named(jsonl, tokenizer_directory, change, message):
    good = {"thinking": False, "messages": [user("a"), assistant("b")]}
    path = jsonl([good, good | change])
    with pytest.raises(PanguError) as caught:
        read_chats(path, Tokenizer(tokenizer_directory))
    found = str(caught.value)
    assert found.startswith(f"{path}:2: " + message.replace("{directory}", str(tokenizer_directory)))
    assert "\n" not in found


def test_a_file_without_chats(jsonl, tokenizer_directory):
    with pytest.raises(PanguError, match='holds no chat: wanted lines of {"messages": ..., "thinking": ...}$'):
        read_chats(jsonl([""]), Tokenizer(tokenizer_directory))
