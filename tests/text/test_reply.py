"""Replies taken apart, however their text is cut into pieces; tool calls, whole and broken."""
import random

import pytest

from pangu_ms.architectures.chat import EMBEDDED_7B, Marks
from pangu_ms.text.reply import Reply, ReplyParser, parse_tool_calls

CALL = '\n[{"name": "f", "arguments": {"x": 1}}]\n'
F = {"name": "f", "arguments": {"x": 1}}


def parsed(pieces, *options):
    """The reply, and all that came out on the way."""
    parser, found = ReplyParser(*options), []
    for piece in pieces:
        found += parser.push(piece)
    return parser.reply, found + parser.flush()


@pytest.mark.parametrize("thinking, text, reply", [
    (True, "Hm.\n</think>\nLima", Reply("Hm.\n", "\nLima")),
    (True, "Hm. </thin", Reply("Hm. </thin")),
    (True, "</think>Lima", Reply("", "Lima")),
    (True, "", Reply()),
    (True, "<|tool_call_start|>no", Reply("<|tool_call_start|>no")),
    (False, "Lima</think>!", Reply("", "Lima</think>!")),
    (True, f"Hm.</think>So:<|tool_call_start|>{CALL}<|tool_call_end|>.", Reply("Hm.", "So:.", [F])),
    (False, f"<|tool_call_start|>{CALL}<|tool_call_end|><|tool_call_start|>{CALL}<|tool_call_end|>",
     Reply("", "", [F, F])),
    (False, "a<|tool_call_start|>[{<|tool_call_end|>b", Reply("", "ab", [
        {"error": "no JSON: Expecting property name enclosed in double quotes: line 1 column 3 (char 2)",
         "text": "[{"}])),
    (False, "a<|tool_call_start|>[{}", Reply("", "a", [
        {"error": "the text ends before <|tool_call_end|>", "text": "[{}"}])),
    (False, "a<|tool_call_start|>[]<|tool_call_", Reply("", "a", [
        {"error": "the text ends before <|tool_call_end|>", "text": "[]<|tool_call_"}])),
])
def test_reply(thinking, text, reply):
    assert_parsed(text, reply, thinking)


def assert_parsed(text, reply, *options):
    assert parsed([text], *options)[0] == reply
    assert parsed(text, *options)[0] == reply, "character by character"
    dice = random.Random(0)
    for _ in range(50):
        cuts = sorted(dice.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        found, shown = parsed(pieces, *options)
        assert found == reply, pieces
        for part, wanted in (("reasoning", reply.reasoning), ("answer", reply.answer)):
            assert "".join(text for kind, text in shown if kind == part) == wanted, pieces


@pytest.mark.parametrize("text, reply", [
    ("[unused16]\nHm.[unused17]Lima", Reply("\nHm.", "Lima")),
    ("[unused16][unused17]Lima", Reply("", "Lima")),
    ("[unused17]Lima", Reply("", "Lima")),
    ("Lima", Reply("", "Lima")),
    ("[unused16]Hm. [unused1", Reply("Hm. [unused1")),
    ("[unused16]Hm.[unused11]", Reply("Hm.[unused11]")),
    (f"[unused16]Hm.[unused17]So:[unused11]{CALL}[unused12].", Reply("Hm.", "So:.", [F])),
    ("[unused11][{}", Reply("", "", [{"error": "the text ends before [unused12]", "text": "[{}"}])),
    ("[unused]16]</think>", Reply("", "[unused]16]</think>")),
])
def test_reply_that_holds_both_marks_of_reasoning(text, reply):
    assert_parsed(text, reply, False, EMBEDDED_7B.marks)


def test_parts_come_as_soon_as_they_are_sure():
    parser = ReplyParser()
    assert parser.push("Hm") == [("reasoning", "Hm")]
    assert parser.push(".<") == [("reasoning", ".")]
    assert parser.push("b></thi") == [("reasoning", "<b>")]
    assert parser.push("nk>Li") == [("answer", "Li")]
    assert parser.push("ma<|tool_call_start|>[") == [("answer", "ma")]
    assert parser.push("]<|tool_call_") == []
    assert parser.push("end|>.") == [("tool_calls", "[]"), ("answer", ".")]
    assert parser.flush() == []


@pytest.mark.parametrize("text, wanted", [
    ("[]", []),
    (CALL, [F]),
    ('[{"name": "f", "parameters": {"x": 1}}, {"name": "g", "arguments": {}}]', [F, {"name": "g", "arguments": {}}]),
    ('[{"name": "f", "parameters": {"x": 2}, "arguments": {"x": 1}}]', [F]),
    ('[{"name": "f", "arguments": {"x": 1}}, {"name": "é"}, 3]', [
        F, {"error": 'wanted {"name": text, "arguments": object}', "text": '{"name": "é"}'},
        {"error": 'wanted {"name": text, "arguments": object}', "text": "3"}]),
    ('[{"name": 1, "arguments": {}}]', [
        {"error": 'wanted {"name": text, "arguments": object}', "text": '{"name": 1, "arguments": {}}'}]),
    ('{"name": "f"}', [{"error": "wanted a JSON list of calls", "text": '{"name": "f"}'}]),
    ("", [{"error": "no JSON: Expecting value: line 1 column 1 (char 0)", "text": ""}]),
])
def test_tool_calls(text, wanted):
    assert parse_tool_calls(text) == wanted


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "1" * 10_000 + "]", "[\ud800", '["\\ud800"]', "\x00"])
def test_hostile_tool_calls_do_not_raise(text):
    record, = parse_tool_calls(text)
    assert set(record) == {"error", "text"}


def test_broken_calls_stay_out_of_the_next_prompt():
    message = Reply("", "So:", [{"error": "no JSON", "text": "{"}, F]).message()
    assert message == {"role": "assistant", "content": "So:", "tool_calls": [{"type": "function", "function": F}]}
    assert Reply("Hm.", "So:", [{"error": "no JSON", "text": "{"}]).message() == {
        "role": "assistant", "content": "So:", "reasoning_content": "Hm."}


def test_another_member_has_other_marks():
    parser = ReplyParser(marks=Marks("[end]", None, "[17]", "[11]", "[12]"))
    parser.push(f"Hm.[17]So:[11]{CALL}[12]</think>")
    parser.flush()
    assert parser.reply == Reply("Hm.", "So:</think>", [F])
