"""Chat: what the template makes of messages, and replies taken apart however their text is cut into pieces."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from pangu_ms.errors import PanguError
from pangu_ms.generation.chat import ChatTemplate, Reply, ReplyParser, parse_tool_calls
from tests.generation.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def template(directory):
    return ChatTemplate(directory)


@pytest.fixture(scope="module")
def text(directory, template):
    """text(messages, ...): the rendered ids, decoded with their special tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    def render(*args, **options):
        return tokenizer.decode(template.render(*args, **options), skip_special_tokens=False)
    return render


def turn(role, content):
    return f"<|message_start|>{role}\n{content}<|message_end|>"


BEGIN = "<|pangu_text_start|>"
ASK = "<|message_start|>assistant\n"
USER = {"role": "user", "content": "Hi  there"}

# ---- the template


def test_system_turn_is_always_there(text):
    assert text([USER]) == BEGIN + turn("system", "") + turn("user", "Hi  there") + ASK + "<think>"
    system = {"role": "system", "content": "Be\nkind."}
    assert text([system, USER]) == BEGIN + turn("system", "Be\nkind.") + turn("user", "Hi  there") + ASK + "<think>"


@pytest.mark.parametrize("options, end", [({}, "<think>"), ({"thinking": True}, "<think>"),
                                          ({"thinking": False}, "</think>"), ({"enable_thinking": False}, "</think>"),
                                          ({"thinking": False, "enable_thinking": True}, "<think>")])
def test_thinking(text, options, end):
    assert text([USER], **options).endswith(ASK + end)


def test_one_beginning_token_and_marks_as_single_ids(template):
    ids = template.render([USER])
    assert ids[0] == 296 and ids.count(296) == 1
    assert ids.count(298) == 3 and ids.count(299) == 2 and ids[-1] == 302
    assert template.stop_token_ids == (299, 297)


def test_earlier_reasoning_is_left_out(text):
    reply = Reply(reasoning="Hm.", answer="Lima")
    assert text([USER, reply.message(), USER]) == (
        BEGIN + turn("system", "") + turn("user", "Hi  there") + turn("assistant", "</think>Lima")
        + turn("user", "Hi  there") + ASK + "<think>")


def test_reasoning_is_kept_between_tool_calls(text):
    call = {"name": "capital", "arguments": {"of": "Peru"}}
    messages = [USER, Reply("Hm.", "Wait.", [call]).message(), {"role": "tool", "content": "Lima"}]
    called = '<|tool_call_start|>\n[{"name": "capital", "arguments": {"of": "Peru"}}]\n<|tool_call_end|>'
    assert text(messages) == (BEGIN + turn("system", "") + turn("user", "Hi  there")
                              + turn("assistant", "<think>Hm.</think>Wait." + called) + turn("tool", "Lima")
                              + ASK + "<think>")


def test_tools_stand_in_the_system_turn(text):
    shown = text([USER], tools=[{"name": "capital", "parameters": {}}])
    system = shown[:shown.index("<|message_end|>")]
    assert '<tools>\n[{"name": "capital", "parameters": {}}]\n</tools>' in system


def test_what_the_template_refuses_is_one_line(template, directory):
    with pytest.raises(PanguError) as error:
        template.render([{"role": "robot", "content": "beep"}])
    assert str(error.value) == (f"{directory}: the chat template cannot render the messages "
                                "(TemplateError: unknown role robot)")


def test_missing_template_is_a_clear_error(directory, tmp_path):
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    wanted = "holds no chat template .looked for chat_template.jinja, and for chat_template in tokenizer_config.json.*"
    for config in (None, "{", "[]", "{}", '{"chat_template": null}'):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(PanguError, match=wanted):
            ChatTemplate(tmp_path)


def test_template_in_the_tokenizer_config_and_a_class_of_its_own(directory, template, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"chat_template": (directory / "chat_template.jinja").read_text(), "tokenizer_class": "PanguTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate(tmp_path).render([USER]) == template.render([USER])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_is_a_clear_error(directory, tmp_path, name):
    for file in directory.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / name).write_text("{")
    with pytest.raises(PanguError, match="the tokenizer cannot be read .*: fetch tokenizer.json"):
        ChatTemplate(tmp_path)


def test_neither_transformers_on_import_nor_mindspore_at_all(directory):
    code = ("import sys; from pangu_ms.generation.chat import ChatTemplate; first = 'transformers' in sys.modules; "
            f"ChatTemplate({str(directory)!r}); print(first, 'mindspore' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "False False\n" and shown.stderr == ""


# ---- replies

CALL = '\n[{"name": "f", "arguments": {"x": 1}}]\n'
F = {"name": "f", "arguments": {"x": 1}}


def parsed(pieces, thinking=True):
    """The reply, and all that came out on the way."""
    parser, found = ReplyParser(thinking), []
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
    assert parsed([text], thinking)[0] == reply
    assert parsed(text, thinking)[0] == reply, "character by character"
    dice = random.Random(0)
    for _ in range(50):
        cuts = sorted(dice.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        found, shown = parsed(pieces, thinking)
        assert found == reply, pieces
        for part, wanted in (("reasoning", reply.reasoning), ("answer", reply.answer)):
            assert "".join(text for kind, text in shown if kind == part) == wanted, pieces


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
