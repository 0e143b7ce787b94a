"""Chat: messages through the checkpoint's own template to ids, and a reply's text taken apart as it comes.

transformers renders the template; it is slow to import, and is imported when the first template is loaded.
"""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from pangu_ms.errors import PanguError
from pangu_ms.generation.stopping import beginning_at_end

MESSAGE_END = "<|message_end|>"
THINK_END = "</think>"
TOOL_CALL_START, TOOL_CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"


class ChatTemplate:
    """The chat template and the tokenizer of a checkpoint directory.

    Args:
        directory: holds tokenizer.json, tokenizer_config.json and the template, as chat_template.jinja or in
            tokenizer_config.json.

    Attributes:
        tokenizer: of transformers.
        stop_token_ids (tuple[int, ...]): end a reply: the end of a message, the end of a text.

    Raises:
        PanguError: no template, or a tokenizer that cannot be read.
    """

    def __init__(self, directory):
        self._directory = directory
        if not _has_template(Path(directory)):
            raise PanguError(f"{directory}: holds no chat template (looked for chat_template.jinja, and for "
                             "chat_template in tokenizer_config.json): add it, or generate without chat")
        self.tokenizer = load_pretrained_tokenizer(directory)
        ends = (self.tokenizer.get_vocab().get(MESSAGE_END), self.tokenizer.eos_token_id)
        self.stop_token_ids = tuple(token_id for token_id in ends if token_id is not None)

    def render(self, messages, thinking=True, tools=None, enable_thinking=None) -> list[int]:
        """The ids that ask for the next reply. The template writes the beginning token, so none is added.

        Args:
            messages: dicts with "role" and "content"; of the assistant also what `Reply.message` gives.
            thinking: whether the reply begins with reasoning.
            tools: descriptions of functions, as the template wants them.
            enable_thinking: another name for thinking, which it replaces.

        Raises:
            PanguError: the template is broken or refuses the messages.
        """
        if enable_thinking is not None:
            thinking = enable_thinking
        return self.encode(self.text(messages, thinking, tools))

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, or of a part of one."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, messages, thinking=True, tools=None, add_generation_prompt=True) -> str:
        """What `render` encodes; without the generation prompt it ends with the last message.

        Raises:
            PanguError: as `render`.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, thinking=thinking, tokenize=False,
                                                      add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can raise anything
            raise PanguError(f"{self._directory}: the chat template cannot render the messages "
                             f"({type(error).__name__}: {error})") from None


def _has_template(directory):
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, RecursionError, AttributeError):  # AttributeError: JSON, but no object
        return False


def load_pretrained_tokenizer(directory):
    """The tokenizer of a directory, as transformers gives it.

    Raises:
        PanguError: it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch: none is needed
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the directory may name a class of its own; tokenizer.json holds all there is
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, TypeError ...
        raise PanguError(f"{directory}: the tokenizer cannot be read ({error}): fetch tokenizer.json and "
                         "tokenizer_config.json again") from None
    finally:
        logging.set_verbosity(verbosity)


@dataclass
class Reply:
    """What a reply holds so far."""

    reasoning: str = ""
    answer: str = ""
    tool_calls: list[dict] = field(default_factory=list)  # {name, arguments}, or {error, text} for what is no call

    def message(self) -> dict:
        """The assistant's turn, for the messages of the next one."""
        message = {"role": "assistant", "content": self.answer}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        calls = [call for call in self.tool_calls if "error" not in call]
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message


class ReplyParser:
    """Takes a reply's text apart while it comes, in pieces of any size.

    The text is reasoning up to `</think>` (the prompt holds `<think>` already), then the answer; without thinking all
    of it is answer. Tool calls stand in the answer between their own marks. The marks themselves are left out, and
    what could be the beginning of one is held back.
    """

    # What ends each part of a reply, and the part behind it.
    _ENDS = {"reasoning": (THINK_END, "answer"),
             "answer": (TOOL_CALL_START, "tool_calls"),
             "tool_calls": (TOOL_CALL_END, "answer")}

    def __init__(self, thinking=True):
        self.reply = Reply()
        self._part = "reasoning" if thinking else "answer"
        self._held = ""  # of the text, what could be the beginning of a mark
        self._calls = ""  # the text of tool calls that have not ended

    def push(self, text: str) -> list[tuple[str, str]]:
        """What the text brings, in order: ("reasoning" | "answer", text), and ("tool_calls", text) for whole ones."""
        found, text = [], self._held + text
        while True:
            mark, following = self._ENDS[self._part]
            before, seen, after = text.partition(mark)
            if not seen:
                break
            found += self._take(before)
            if self._part == "tool_calls":
                found.append(("tool_calls", self._calls))
                self.reply.tool_calls += parse_tool_calls(self._calls)
                self._calls = ""
            self._part, text = following, after
        shown = len(text) - beginning_at_end(text, [mark])
        self._held = text[shown:]
        return found + self._take(text[:shown])

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, at the end of the text; tool calls that have not ended become an error."""
        found, self._held = self._take(self._held), ""
        if self._part == "tool_calls":
            self.reply.tool_calls.append({"error": f"the text ends before {TOOL_CALL_END}", "text": self._calls})
            found = [("tool_calls", self._calls)]
        return found

    def _take(self, text):
        """Puts text where it belongs -> [(part, text)], nothing for tool calls, which are not whole yet."""
        if self._part == "tool_calls":
            self._calls += text
            return []
        setattr(self.reply, self._part, getattr(self.reply, self._part) + text)
        return [(self._part, text)] if text else []


def parse_tool_calls(text: str) -> list[dict]:
    """The calls of a JSON list of {name, arguments}; "parameters" passes for "arguments".

    Returns:
        {"name": str, "arguments": dict} for each call, {"error": reason, "text": text} for what is none. Never raises.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [{"error": f"no JSON: {error}", "text": text}]
    if not isinstance(found, list):
        return [{"error": "wanted a JSON list of calls", "text": text}]
    return [_tool_call(entry) for entry in found]


def _tool_call(entry):
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        arguments = entry.get("arguments", entry.get("parameters"))
        if isinstance(arguments, dict):
            return {"name": entry["name"], "arguments": arguments}
    return {"error": 'wanted {"name": text, "arguments": object}', "text": json.dumps(entry, ensure_ascii=False)}
