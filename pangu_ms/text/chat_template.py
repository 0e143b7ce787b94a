"""The chat template of a checkpoint: messages to the text and the ids that ask for the next reply.

A template is a Jinja program from the checkpoint. It runs in Jinja's sandbox, with what transformers gives templates:
the special tokens by name, `raise_exception`, `strftime_now`, and a `tojson` that leaves characters as they are. The
templates of openPangu-2.0's relatives read role and content of a message and nothing else: what else a message says is
written into its content first.
"""
import json
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pangu_ms.errors import PanguError
from pangu_ms.text.reply import ReplyParser
from pangu_ms.text.tokenizer import TOKENIZER_CONFIG, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """The chat template in a tokenizer's directory: chat_template.jinja, else what tokenizer_config.json holds, else
    the package's own for this member of the family (section 7).

    Args:
        tokenizer: of the checkpoint.

    Attributes:
        tokenizer: as given.
        chat (Chat): how the member talks.
        stop_token_ids (tuple[int, ...]): end a reply: the end of a message, the end of a text.

    Raises:
        PanguError: no template, or one that Jinja cannot read.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.chat = tokenizer, tokenizer.chat
        ends = tokenizer.token_id(self.chat.marks.message_end), tokenizer.eos_token_id
        self.stop_token_ids = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))
        path, self._source = _read(tokenizer, self.chat)
        self._template = _compile(path, self._source)

    def render(self, messages, thinking=None, tools=None, enable_thinking=None) -> list[int]:
        """The ids that ask for the next reply. They begin with the beginning token, once, whether the template writes
        it or not.

        Args:
            messages: dicts with "role" and "content"; of the assistant also what `Reply.message` gives.
            thinking: "on", "off" or "auto", as far as the member has them, or True or False for the first two: whether
                the reply begins with reasoning. Default: what the member does unasked.
            tools: descriptions of functions, as the template wants them.
            enable_thinking: another name for thinking, which it replaces.

        Raises:
            PanguError: a mode of thinking that the member does not have, tools that the template says nothing about, or
                messages that it refuses.
        """
        if enable_thinking is not None:
            thinking = enable_thinking
        return self.tokenizer.encode(self.text(messages, thinking, tools))

    def text(self, messages, thinking=None, tools=None, add_generation_prompt=True) -> str:
        """What `render` encodes; without the generation prompt it ends with the last message.

        Raises:
            PanguError: as `render`.
        """
        mode = self.chat.mode(thinking)
        if tools and "tools" not in self._source:
            raise PanguError(f"{self.tokenizer.directory}: the chat template says nothing about tools: describe them "
                             "in the system message, and give none")
        try:
            return self._template.render(self.tokenizer.special_tokens, messages=self._written(messages, mode),
                                         tools=tools, documents=None, thinking=mode != "off",
                                         add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can raise anything
            raise PanguError(f"{self.tokenizer.directory}: the chat template cannot render the messages "
                             f"({type(error).__name__}: {error})") from None

    def reply_parser(self, thinking=None) -> ReplyParser:
        """A new parser of the reply to what `render` gives for this mode of thinking."""
        marks = self.chat.marks
        return ReplyParser(marks.think_start is None and self.chat.mode(thinking) == "on", marks)

    def _written(self, messages, mode):
        """The messages with the mode of thinking in the last of the user, and all in the content that the template
        would not read."""
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if self.chat.marks.think_start is not None and "tool_calls" not in self._source:
            last = max(users, default=-1)  # earlier reasoning is left out
            messages = [_all_in_content(message, self.chat.marks, i > last) for i, message in enumerate(messages)]
        switch = self.chat.modes.get(mode)
        if switch:
            if not users:
                raise ValueError(f"there is no message of the user to write {switch!r} behind")
            messages = list(messages)
            messages[users[-1]] = messages[users[-1]] | {"content": messages[users[-1]]["content"] + switch}
        return messages


def _all_in_content(message, marks, with_reasoning):
    """A message whose content holds its reasoning and its tool calls, as the model writes them."""
    content, reasoning, calls = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    if with_reasoning and reasoning is not None:
        content = f"{marks.think_start}{reasoning}{marks.think_end}{content or ''}"
    if calls:
        functions = _to_json([call.get("function", call) for call in calls])
        content = f"{content or ''}{marks.tool_call_start}{functions}{marks.tool_call_end}"
    return message | {"content": content}


class _Generation(Extension):
    """{% generation %} tells trainers what the assistant says; the text is the same without it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise_exception(message):
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(path, source):
    """The template in a text; `path` for messages."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _to_json  # Jinja's own writes < and & as HTML wants them
    environment.globals |= {"raise_exception": _raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    try:
        return environment.from_string(source)
    except Exception as error:  # TemplateError, and what Python makes of a program that is no sensible one
        raise PanguError(f"{path}: the chat template is broken ({error}): fetch the file again") from None


def _read(tokenizer, chat):
    """(the file that holds the template, its text)."""
    path, found = tokenizer.directory / TEMPLATE_FILE, tokenizer.settings.get("chat_template")
    if not path.is_file() and not found and chat.template is not None:
        path = Path(__file__).parent / chat.template
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PanguError(f"{path}: cannot be read ({error}): fetch the file again") from None
    path = tokenizer.directory / TOKENIZER_CONFIG
    if not found:
        raise PanguError(f"{tokenizer.directory}: holds no chat template (looked for {TEMPLATE_FILE}, and for "
                         f"chat_template in {TOKENIZER_CONFIG}): add it, or generate without chat")
    if not isinstance(found, str):
        raise PanguError(f"{path}: chat_template is no text: write the template that you want into {TEMPLATE_FILE}")
    return path, found
