"""What a chat template makes of messages."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.reply import Reply
from pangu_ms.text.tokenizer import Tokenizer
from tests.text.byte_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def template(directory):
    return ChatTemplate(Tokenizer(directory))


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
    for config in (None, "{}", '{"chat_template": null}'):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(PanguError, match=wanted):
            ChatTemplate(Tokenizer(tmp_path))


@pytest.fixture
def with_template(directory, tmp_path):
    """with_template(source, **settings): a chat template of this source, with the tokenizer of the others."""
    def make(source, **settings):
        (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": source} | settings))
        return ChatTemplate(Tokenizer(tmp_path))
    return make


def test_template_in_the_tokenizer_config_and_a_class_of_its_own(directory, template, with_template):
    source = (directory / "chat_template.jinja").read_text()
    assert with_template(source, tokenizer_class="PanguTokenizer").render([USER]) == template.render([USER])


def test_chat_template_jinja_comes_first(template, with_template, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert with_template("from the config").text([USER]) == "from the file"


@pytest.mark.parametrize("source, message", [
    ("a\n{% if %}", r"tokenizer_config.json: the chat template is broken .Expected an expression.*: fetch the file"),
    ([{"name": "default", "template": "a"}], "chat_template is no text: write the template that you want into chat_"),
])
def test_broken_template_is_a_clear_error(with_template, source, message):
    with pytest.raises(PanguError, match=message):
        with_template(source)


def test_template_that_is_not_utf8_is_a_clear_error(with_template, tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(PanguError, match="chat_template.jinja: cannot be read .*: fetch the file again"):
        with_template("from the config")


# Whitespace around blocks, filters, special tokens that are dicts, loop control, the tag for trainers, old variables.
SOURCE = """{{ bos_token }}{{ unk_token }}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {% generation %}
  {{ message | tojson(indent=2) }} {{ message.content | trim | upper }}
    {% endgeneration %}
{% endfor %}
{{ tools | tojson if tools else "none" }} {{ documents }} {{ thinking }} {{ strftime_now("%Y") | length }}
{% if add_generation_prompt %}go{% endif %}
"""


@pytest.mark.parametrize("source", [None, SOURCE])
def test_templates_render_as_transformers_renders_them(directory, with_template, source):
    from transformers.utils.chat_template_utils import render_jinja_template
    source = source or (directory / "chat_template.jinja").read_text()
    template = with_template(source, unk_token={"content": "<unk>", "special": True})
    messages = [{"role": "user", "content": " <b>é & \u2028'\n"}, {"role": "tool", "content": "x"},
                {"role": "assistant", "content": "", "reasoning_content": "y"}]
    for tools, thinking in ((None, True), ([{"name": "f", "parameters": {"é": "<"}}], False)):
        (wanted,), _ = render_jinja_template(
            [messages], tools, chat_template=source, add_generation_prompt=thinking, thinking=thinking,
            bos_token=BEGIN, eos_token="<|pangu_text_end|>", pad_token="<|pangu_text_end|>", unk_token="<unk>")
        assert template.text(messages, thinking, tools, add_generation_prompt=thinking) == wanted


def test_a_template_is_in_a_sandbox(with_template):
    """A checkpoint comes from elsewhere: its template must not reach the interpreter."""
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
                   "{{ raise_exception.__globals__.json }}"):
        with pytest.raises(PanguError, match="cannot render the messages .SecurityError"):
            with_template(source).text([USER])


def test_it_needs_neither_transformers_nor_mindspore(directory):
    code = ("import sys; from pangu_ms.text.chat_template import ChatTemplate; "
            f"from pangu_ms.text.tokenizer import Tokenizer; ChatTemplate(Tokenizer({str(directory)!r})); "
            "print({'transformers', 'mindspore'} & set(sys.modules))")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n" and shown.stderr == ""
