"""The chat template of a checkpoint: messages to the text and the ids that ask for the next reply.

A template is a Jinja program from the checkpoint. It runs in Jinja's sandbox, with what transformers gives templates:
the special tokens by name, `raise_exception`, `strftime_now`, and a `tojson` that leaves characters as they are.
"""
import json
from datetime import datetime

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pangu_ms.errors import PanguError
from pangu_ms.text.marks import OPENPANGU_V2, Marks
from pangu_ms.text.tokenizer import TOKENIZER_CONFIG, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """The chat template in a tokenizer's directory: chat_template.jinja, else what tokenizer_config.json holds.

    Args:
        tokenizer: of the checkpoint.
        marks: what the checkpoint's replies are marked with.

    Attributes:
        tokenizer, marks: as given.
        stop_token_ids (tuple[int, ...]): end a reply: the end of a message, the end of a text.

    Raises:
        PanguError: no template, or one that Jinja cannot read.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks = OPENPANGU_V2):
        self.tokenizer, self.marks = tokenizer, marks
        ends = tokenizer.token_id(marks.message_end), tokenizer.eos_token_id
        self.stop_token_ids = tuple(token_id for token_id in ends if token_id is not None)
        self._template = _compile(tokenizer)

    def render(self, messages, thinking=True, tools=None, enable_thinking=None) -> list[int]:
        """The ids that ask for the next reply. The template writes the beginning token, so none is added.

        Args:
            messages: dicts with "role" and "content"; of the assistant also what `Reply.message` gives.
            thinking: whether the reply begins with reasoning.
            tools: descriptions of functions, as the template wants them.
            enable_thinking: another name for thinking, which it replaces.

        Raises:
            PanguError: the template refuses the messages.
        """
        if enable_thinking is not None:
            thinking = enable_thinking
        return self.tokenizer.encode(self.text(messages, thinking, tools), bos=False)

    def text(self, messages, thinking=True, tools=None, add_generation_prompt=True) -> str:
        """What `render` encodes; without the generation prompt it ends with the last message.

        Raises:
            PanguError: as `render`.
        """
        try:
            return self._template.render(self.tokenizer.special_tokens, messages=messages, tools=tools,
                                         documents=None, thinking=thinking,
                                         add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can raise anything
            raise PanguError(f"{self.tokenizer.directory}: the chat template cannot render the messages "
                             f"({type(error).__name__}: {error})") from None


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


def _compile(tokenizer):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _to_json  # Jinja's own writes < and & as HTML wants them
    environment.globals |= {"raise_exception": _raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    path, source = _read(tokenizer)
    try:
        return environment.from_string(source)
    except Exception as error:  # TemplateError, and what Python makes of a program that is no sensible one
        raise PanguError(f"{path}: the chat template is broken ({error}): fetch the file again") from None


def _read(tokenizer):
    """(the file that holds the template, its text)."""
    path = tokenizer.directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PanguError(f"{path}: cannot be read ({error}): fetch the file again") from None
    path, found = tokenizer.directory / TOKENIZER_CONFIG, tokenizer.settings.get("chat_template")
    if not found:
        raise PanguError(f"{tokenizer.directory}: holds no chat template (looked for {TEMPLATE_FILE}, and for "
                         f"chat_template in {TOKENIZER_CONFIG}): add it, or generate without chat")
    if not isinstance(found, str):
        raise PanguError(f"{path}: chat_template is no text: write the template that you want into {TEMPLATE_FILE}")
    return path, found
