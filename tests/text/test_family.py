"""openPangu Embedded and its relatives: tokenizer.model, the chat template of section 7, modes of thinking, replies."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from family_tokenizer import MARKS

from pangu_ms.architectures import ARCHITECTURES
from pangu_ms.architectures.chat import (
    EMBEDDED_1B, EMBEDDED_7B, OPENPANGU_V2, PRO_MOE, PRO_MOE_V2, ULTRA_MOE,
)
from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.reply import Reply
from pangu_ms.text.tokenizer import Tokenizer
from tests.text.family_texts import save_family_tokenizer

USER = {"role": "user", "content": "Capital of Peru?"}
SYSTEM = "[unused9]系统：[unused10]"
ASK = "[unused9]用户：Capital of Peru?[unused10][unused9]助手："
# What the release of Embedded-7B carries in tokenizer_config.json, its roles in one line.
RELEASED = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '[unused9]系统：[unused10]' }}{% endif %}\
{% for role, name in [('system', '系统'), ('assistant', '助手'), ('tool', '工具'), ('function', '方法'), \
('user', '用户')] %}\
{% if message['role'] == role %}{{ '[unused9]' + name + '：' + message['content'] + '[unused10]' }}{% endif %}\
{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '[unused9]助手：' }}{% endif %}"""


@pytest.fixture(scope="module", params=[("user_defined_symbols", False), ("control_symbols", False),
                                        ("user_defined_symbols", True), ("control_symbols", True)], ids=str)
def any_tokenizer(request, tmp_path_factory):
    """The marks as either kind of piece, each text with a space before it and without."""
    path = tmp_path_factory.mktemp("any")
    save_family_tokenizer(path, *request.param)
    return Tokenizer(path)


@pytest.fixture
def template(family):
    return ChatTemplate(Tokenizer(family("embedded")))


@pytest.fixture
def with_chat(family):
    """with_chat(chat): the template of a member of the family."""
    def make(chat):
        tokenizer = Tokenizer(family("embedded"))
        tokenizer.chat = chat
        return ChatTemplate(tokenizer)
    return make


# ---- the tokenizer

def test_marks_in_a_prompt_are_their_ids_and_in_a_text_to_train_on_characters(any_tokenizer):
    text = "a[unused9]Hello[unused17] [unused10]</s>"
    ids = any_tokenizer.encode(text)
    nine, ten, seventeen = map(any_tokenizer.token_id, ("[unused9]", "[unused10]", "[unused17]"))
    assert ids[0] == any_tokenizer.bos_token_id == 1 and ids[-2:] == [ten, 2]
    assert [ids.count(each) for each in (nine, ten, seventeen, 1, 2, 0)] == [1, 1, 1, 1, 1, 0]
    spelled, = any_tokenizer.encode_batch([text])
    assert not {*spelled} & {1, 2, *map(any_tokenizer.token_id, MARKS)}
    assert any_tokenizer.decode(spelled) == text


def test_the_end_is_a_mark_and_the_beginning_comes_once(any_tokenizer):
    assert any_tokenizer.eos_token_id == any_tokenizer.token_id("[unused10]") != any_tokenizer.token_id("</s>")
    plain = any_tokenizer.encode("Hello", bos=False)
    assert any_tokenizer.encode("<s>Hello") == any_tokenizer.encode("Hello") == [1, *plain]


def test_decoding_keeps_what_parts_a_reply_and_loses_no_character(any_tokenizer):
    text = "[unused16]Hm. 日🎉[unused17]Lima[unused11][][unused12][unused16][unused16]"
    ids = [0, *any_tokenizer.encode(text), any_tokenizer.eos_token_id, any_tokenizer.token_id("[unused9]"), 100_000]
    assert any_tokenizer.decode(ids) == text
    decoder = any_tokenizer.stream_decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and decoder.flush() == ""
    broken = any_tokenizer.encode("日[unused17]", bos=False)
    broken.pop(-2)  # half a character before a mark
    decoder = any_tokenizer.stream_decoder()
    assert "".join(map(decoder.push, broken)) == any_tokenizer.decode(broken) == "\ufffd\ufffd[unused17]"


def test_a_directory_without_settings_knows_the_marks_of_its_member(family, tmp_path):
    for name in ("tokenizer.model", "config.json"):
        shutil.copy(family("embedded") / name, tmp_path)
    template = ChatTemplate(Tokenizer(tmp_path))
    wanted = ChatTemplate(Tokenizer(family("embedded")))
    assert template.render([USER]) == wanted.render([USER]) and template.stop_token_ids == wanted.stop_token_ids


# ---- the template

def test_the_template_is_that_of_section_7(template):
    assert template.text([USER]) == SYSTEM + ASK
    assert template.text([{"role": "system", "content": "Be kind."}, USER]) == "[unused9]系统：Be kind.[unused10]" + ASK
    roles = {"user": "用户", "assistant": "助手", "tool": "工具", "function": "方法"}
    messages = [{"role": role, "content": f" {role}\n"} for role in roles]
    turns = "".join(f"[unused9]{name}： {role}\n[unused10]" for role, name in roles.items())
    assert template.text(messages, add_generation_prompt=False) == SYSTEM + turns
    assert template.text([]) == SYSTEM + "[unused9]助手："


def test_the_tokenizer_writes_the_beginning_and_marks_are_single_ids(template):
    ids, tokenizer = template.render([USER]), template.tokenizer
    nine, ten = tokenizer.token_id("[unused9]"), tokenizer.token_id("[unused10]")
    assert ids[:2] == [1, nine] and [ids.count(each) for each in (1, nine, ten)] == [1, 3, 2]
    assert template.stop_token_ids == (ten,)


@pytest.mark.parametrize("source", [RELEASED, "<s>" + RELEASED])
def test_a_template_of_the_checkpoint_comes_first_and_says_the_same(family, template, tmp_path, source):
    for name in ("tokenizer.model", "config.json", "tokenizer_config.json"):
        shutil.copy(family("embedded") / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": source}))
    own = ChatTemplate(Tokenizer(tmp_path))
    called = Reply("Hm.", "Lima", [{"name": "f", "arguments": {}}]).message()
    messages = [USER, called, {"role": "tool", "content": "9"}]
    for given in ([USER], messages, [{"role": "system", "content": "Be\nkind."}, *messages, USER]):
        for thinking in ("on", "off", "auto"):
            assert own.text(given, thinking).removeprefix("<s>") == template.text(given, thinking)
            assert own.render(given, thinking) == template.render(given, thinking), "one beginning token"
    (tmp_path / "chat_template.jinja").write_text("mine")
    assert ChatTemplate(Tokenizer(tmp_path)).text([USER]) == "mine"


def test_the_content_holds_calls_and_the_reasoning_since_the_last_message_of_the_user(template):
    call = {"name": "f", "arguments": {"of": "秘鲁"}}
    first, second = Reply("One.", "Wait.", [call]).message(), Reply("Two.", "Lima").message()
    called = 'Wait.[unused11][{"name": "f", "arguments": {"of": "秘鲁"}}][unused12][unused10][unused9]工具：9[unused10]'
    messages = [USER, first, {"role": "tool", "content": "9"}, second]
    assert template.text(messages, add_generation_prompt=False) == (
        SYSTEM + ASK + "[unused16]One.[unused17]" + called + "[unused9]助手：[unused16]Two.[unused17]Lima[unused10]")
    assert template.text([*messages, USER]) == (
        SYSTEM + ASK + called + "[unused9]助手：Lima[unused10]" + ASK)


def test_tools_are_refused_by_a_template_that_says_nothing_about_them(template):
    with pytest.raises(PanguError, match="the chat template says nothing about tools: describe them in the system"):
        template.render([USER], tools=[{"name": "f"}])
    with pytest.raises(PanguError, match="unknown role poet"):
        template.render([{"role": "poet", "content": ""}])


# ---- thinking

NOTHING, NO, AUTO = "", " /no_think", " /auto_think"


@pytest.mark.parametrize("chat, written", [
    (EMBEDDED_7B, {None: NOTHING, "on": NOTHING, True: NOTHING, "off": NO, False: NO, "auto": AUTO}),
    (EMBEDDED_1B, {None: NOTHING, "off": NOTHING, False: NOTHING}),
    (PRO_MOE, {None: NOTHING, "on": NOTHING, "off": NO}),
    (PRO_MOE_V2, {None: NOTHING}),
    (ULTRA_MOE, {None: NOTHING, "on": NOTHING, "off": NO})], ids=lambda value: getattr(value, "name", ""))
def test_a_mode_of_thinking_stands_behind_the_last_message_of_the_user(with_chat, chat, written):
    template = with_chat(chat)
    for thinking, switch in written.items():
        messages = [USER, {"role": "assistant", "content": "Lima"}, USER, {"role": "tool", "content": "9"}]
        turn, reply = "[unused9]用户：Capital of Peru?", "[unused10][unused9]助手："
        assert template.text(messages, thinking) == (
            f"{SYSTEM}{turn}{reply}Lima[unused10]{turn}{switch}[unused10][unused9]工具：9{reply}")
        assert messages[2] is USER and USER["content"] == "Capital of Peru?"


@pytest.mark.parametrize("chat, thinking, message", [
    (OPENPANGU_V2, "auto", "thinking is 'auto': openPangu-2.0 has on, off"),
    (EMBEDDED_7B, "slow", "thinking is 'slow': openPangu-Embedded-7B has on, off, auto"),
    (EMBEDDED_1B, True, "thinking is 'on': openPangu-Embedded-1B has off alone: it answers without thinking"),
    (PRO_MOE, "auto", "thinking is 'auto': openPangu-Pro-MoE has on, off"),
    (PRO_MOE_V2, "off", "thinking is 'off': openPangu-R-72B has no public switch between fast, slow-low and slow-high: "
                        "leave it out, or write the switch into the message"),
    (ULTRA_MOE, "auto", "thinking is 'auto': openPangu-Ultra-MoE has on, off")])
def test_a_mode_that_a_member_lacks_is_a_sentence(chat, thinking, message):
    with pytest.raises(PanguError) as caught:
        chat.mode(thinking)
    assert str(caught.value) == message


def test_a_switch_needs_a_message_of_the_user(template):
    with pytest.raises(PanguError, match="there is no message of the user to write ' /no_think' behind"):
        template.render([{"role": "system", "content": "Be kind."}], "off")


def test_every_architecture_says_how_it_talks(family):
    assert all(hasattr(member, "chat") for member in ARCHITECTURES.values())
    assert Tokenizer(family("embedded")).chat is EMBEDDED_7B and Tokenizer(family("embedded_tied")).chat is EMBEDDED_1B


# ---- replies

@pytest.mark.parametrize("text, reply", [
    ("[unused16]Hm.[unused17]Lima[unused10]", Reply("Hm.", "Lima")),
    ("[unused16][unused17]Lima[unused10]", Reply("", "Lima")),
    ("Lima[unused10]", Reply("", "Lima")),
    ("[unused16]Hm.[unused10]", Reply("Hm.")),
    ('[unused16]Hm.[unused17][unused11][{"name": "f", "arguments": {"of": "秘鲁"}}][unused12][unused10]',
     Reply("Hm.", "", [{"name": "f", "arguments": {"of": "秘鲁"}}])),
])
def test_a_reply_is_taken_apart_as_its_ids_come(template, text, reply):
    for thinking in ("on", "off", "auto"):
        parser, decoder = template.reply_parser(thinking), template.tokenizer.stream_decoder()
        for token_id in template.tokenizer.encode(text, bos=False):
            parser.push(decoder.push(token_id))
        parser.push(decoder.flush())
        parser.flush()
        assert parser.reply == reply


def test_mindspore_is_imported_behind_a_tokenizer(family):
    """As the commands do, in a process of their own."""
    code = f"from pangu_ms.text.tokenizer import Tokenizer; Tokenizer({str(family('embedded'))!r}); import mindspore"
    given = {name: value for name, value in os.environ.items() if not name.startswith("PROTOCOL_BUFFERS")}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
