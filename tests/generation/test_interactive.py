"""pangu-generate --chat, alone and in conversation, with a model that says what the tests give it."""
import json
import signal
import sys

import pytest
import tokenizers

from pangu_ms.generation.command import main
from pangu_ms.text.tokenizer import Tokenizer
from tests.text.byte_tokenizer import save_tokenizer


@pytest.fixture
def directory(data, tmp_path):
    """The config of a tiny checkpoint, fitted to the chat tokenizer."""
    vocab_size = save_tokenizer(tmp_path)
    config = json.loads((data / "tiny" / "config.json").read_text())
    config |= {"vocab_size": vocab_size, "bos_token_id": 296, "eos_token_id": 297}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def says(engine, directory):
    """says(text, ...): the reply of the engine; a function among the texts is called on the way."""
    tokenizer = Tokenizer(directory)

    def set_reply(*parts):
        engine.reply = []
        for part in parts:
            engine.reply += [part] if callable(part) else tokenizer.encode(part)[1:]
    return set_reply


@pytest.fixture
def prompts(engine, directory):
    """prompts(): what the engine was asked, as text with its special tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda: [tokenizer.decode(ids, skip_special_tokens=False) for ids in engine.prompts]


def run(directory, *options, new="50"):
    return main(["--model", str(directory), "--chat", "--max-new-tokens", new, *options])


def conversation(*users, system="", ask="<think>"):
    turns = [f"<|message_start|>system\n{system}<|message_end|>"]
    for role, content in users:
        turns.append(f"<|message_start|>{role}\n{content}<|message_end|>")
    return "<|pangu_text_start|>" + "".join(turns) + "<|message_start|>assistant\n" + ask


# ---- one reply

def test_one_reply(engine, directory, says, prompts, capsys):
    says("Hm.</think>Lima<|message_end|>")
    assert run(directory, "--prompt", "Capital?", "--system", "Be kind.") == 0
    shown = capsys.readouterr()
    assert shown.out == "Lima\n"
    assert shown.err.startswith("Hm.\nprefill ")
    assert prompts() == [conversation(("user", "Capital?"), system="Be kind.")]
    assert set(engine.options["eos_token_ids"]) == {297, 299}


def test_without_thinking(directory, says, prompts, capsys):
    says("Lima")
    assert run(directory, "--prompt", "Capital?", "--thinking", "off") == 0
    assert capsys.readouterr().out == "Lima\n"
    assert prompts() == [conversation(("user", "Capital?"), ask="</think>")]


def test_prompt_file(directory, says, prompts, tmp_path):
    says("Lima")
    (tmp_path / "question.txt").write_bytes(b"Long\r\ntext")
    assert run(directory, "--prompt-file", str(tmp_path / "question.txt")) == 0
    assert prompts() == [conversation(("user", "Long\r\ntext"))]


def test_json(directory, says, capsys):
    says('Hm.</think>So<|tool_call_start|>[{"name": "f", "parameters": {}}]<|tool_call_end|><|message_end|>')
    assert run(directory, "--prompt", "Capital?", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["reasoning"] == "Hm." and shown["answer"] == "So"
    assert shown["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert shown["text"].startswith("Hm.</think>So<|tool_call_start|>") and shown["token_ids"][-1] == 299


def test_a_broken_tool_call_is_told(directory, says, capsys):
    says("</think><|tool_call_start|>[{<|tool_call_end|>")
    assert run(directory, "--prompt", "Capital?") == 0
    shown = capsys.readouterr()
    assert shown.out == "[{\n" and "a tool call is broken: no JSON" in shown.err


def test_reasoning_is_dim_on_a_terminal(directory, says, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    says("Hm</think>Lima")
    assert run(directory, "--prompt", "Capital?") == 0
    assert "\033[2mH" in capsys.readouterr().err


def test_a_relative_of_openpangu_2(engine, family, capsys):
    directory = family("embedded")
    tokenizer = Tokenizer(directory)
    engine.reply = tokenizer.encode("[unused16]Hm.[unused17]Lima", bos=False)
    assert run(directory, "--prompt", "Lima?", "--thinking", "off", new="9") == 0
    shown = capsys.readouterr()
    assert shown.out == "Lima\n" and shown.err.startswith("Hm.\nprefill ")
    assert engine.prompts == [tokenizer.encode("[unused9]系统：[unused10][unused9]用户：Lima? /no_think[unused10]"
                                               "[unused9]助手：")]
    assert set(engine.options["eos_token_ids"]) == {tokenizer.token_id("[unused10]")}
    assert run(family("embedded_tied"), "--prompt", "Lima?", "--thinking", "on") == 2
    assert capsys.readouterr().err == ("pangu-generate: error: thinking is 'on': openPangu-Embedded-1B has off alone: "
                                       "it answers without thinking\n")


def test_missing_template(engine, directory, capsys):
    (directory / "chat_template.jinja").unlink()
    assert run(directory) == 2
    error = capsys.readouterr().err
    assert "holds no chat template (looked for chat_template.jinja, and" in error and error.count("\n") == 1
    assert engine.loaded is None


def test_a_context_that_does_not_fit(engine, directory, capsys):
    assert run(directory, "--prompt", "Capital?", new="492") == 2
    error = capsys.readouterr().err
    assert "pass max_position_embeddings 512: ask for at most" in error and error.count("\n") == 1
    assert run(directory, new="512") == 2, "no conversation could have such replies"
    assert engine.loaded is None


# ---- a conversation

@pytest.fixture
def talk(engine, directory, monkeypatch):
    """talk(lines, ...): a conversation in which the user types these, then leaves; exceptions are raised instead."""
    def start(lines, *options):
        def typed(prompt):
            line = lines.pop(0) if lines else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line
        monkeypatch.setattr("builtins.input", typed)
        code = run(directory, *options)
        assert not lines, "left before the last line"
        return code
    return start


def test_conversation_goes_on(talk, says, prompts, capsys):
    says("Hm.</think>Lima<|message_end|>")
    assert talk(["One", "  ", "Two"]) == 0
    assert capsys.readouterr().out == "Lima\nLima\n\n"
    assert prompts() == [conversation(("user", "One")),
                         conversation(("user", "One"), ("assistant", "</think>Lima"), ("user", "Two"))]


def test_clear_keeps_the_system_message(talk, says, prompts):
    says("</think>Lima")
    talk(["One", "/clear", "Two"], "--system", "S")
    assert prompts() == [conversation(("user", "One"), system="S"), conversation(("user", "Two"), system="S")]


def test_thinking_is_switched(talk, says, prompts, capsys):
    says("a</think>b")
    talk(["/thinking off", "/thinking auto", "One", "/clear", "/thinking on", "Two"])
    assert prompts() == [conversation(("user", "One"), ask="</think>"), conversation(("user", "Two"))]
    shown = capsys.readouterr()
    assert shown.out == "a</think>b\nb\n\n" and "thinking is 'auto': openPangu-2.0 has on, off\n" in shown.err


def test_exit_and_unknown_commands(talk, prompts, capsys):
    assert talk(["/thinking", "/help me", "/exit"]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in shown] == ["/clear", "/thinking:", "/help:"] and prompts() == []


def test_ctrl_c_ends_a_reply_and_keeps_what_came(talk, says, prompts, capsys, press_ctrl_c):
    terminate = signal.getsignal(signal.SIGTERM)
    says("</think>Lima", press_ctrl_c, ", not Rome")
    assert talk(["One", "Two"]) == 0
    assert prompts()[1] == conversation(("user", "One"), ("assistant", "</think>Lima"), ("user", "Two"))
    shown = capsys.readouterr()
    assert shown.out == "Lima\nLima\n\n" and "Traceback" not in shown.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C at the prompt is Python's again"
    assert signal.getsignal(signal.SIGTERM) is terminate, "and to terminate the program ends it"


def test_ctrl_c_before_the_first_token_forgets_the_message(talk, says, prompts, press_ctrl_c):
    says(press_ctrl_c, "</think>Lima")
    assert talk(["One", "Two"]) == 0
    assert prompts() == [conversation(("user", "One")), conversation(("user", "Two"))]


def test_ctrl_c_twice_at_the_prompt_ends(talk, says, prompts):
    says("</think>Lima")
    assert talk([KeyboardInterrupt(), "One", KeyboardInterrupt(), KeyboardInterrupt()]) == 0
    assert len(prompts()) == 1


def test_a_message_that_does_not_fit_is_forgotten(talk, says, prompts, capsys):
    says("</think>Lima")
    assert talk(["x " * 300, "Two"]) == 0
    assert "error: " in (error := capsys.readouterr().err) and "/clear forgets the conversation" in error
    assert prompts()[-1] == conversation(("user", "Two"))


def test_stats_after_each_reply(talk, says, capsys):
    says("</think>Lima")
    assert talk(["One", "Two"], "--stats") == 0
    assert capsys.readouterr().err.count("tokens a second, drafts accepted: no drafts") == 2
    assert talk(["One"]) == 0
    assert "prefill" not in capsys.readouterr().err


def test_input_that_is_no_text(talk, capsys):
    assert talk([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")]) == 2
    assert "pangu-generate: error: standard input is not UTF-8" in capsys.readouterr().err
