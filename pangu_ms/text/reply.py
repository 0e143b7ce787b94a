"""Replies: their text taken apart as it comes into reasoning, answer and tool calls."""
import json
from dataclasses import dataclass, field

from pangu_ms.architectures.chat import OPENPANGU_V2, Marks
from pangu_ms.text.stop_strings import beginning_at_end


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

    Where the prompt holds the mark that begins reasoning, the text is reasoning up to the mark that ends it, then the
    answer. Where the reply holds both marks, reasoning is what stands between them, and there may be none. Tool calls
    stand in the answer between their own marks. The marks themselves are left out, and what could be the beginning of
    one is held back. `ChatTemplate.reply_parser` makes the right one.

    Args:
        thinking: whether the text begins within reasoning.
        marks: of the checkpoint.

    Attributes:
        reply (Reply): what has come so far.
    """

    def __init__(self, thinking: bool = True, marks: Marks = OPENPANGU_V2.marks):
        self.reply = Reply()
        # The marks that end each part of a reply, and the part behind them.
        self._ends = {"reasoning": {marks.think_end: "answer"},
                      "answer": {marks.tool_call_start: "tool_calls"},
                      "tool_calls": {marks.tool_call_end: "answer"}}
        if marks.think_start is not None:
            self._ends["answer"] |= {marks.think_start: "reasoning", marks.think_end: "answer"}
        self._part = "reasoning" if thinking else "answer"
        self._held = ""  # of the text, what could be the beginning of a mark
        self._calls = ""  # the text of tool calls that have not ended

    def push(self, text: str) -> list[tuple[str, str]]:
        """What the text brings, in order: ("reasoning" | "answer", text), and ("tool_calls", text) for whole ones."""
        found, text = [], self._held + text
        while True:
            ends = self._ends[self._part]
            mark = min((mark for mark in ends if mark in text), key=text.index, default=None)
            if mark is None:
                break
            before, _, after = text.partition(mark)
            found += self._take(before)
            if self._part == "tool_calls":
                found.append(("tool_calls", self._calls))
                self.reply.tool_calls += parse_tool_calls(self._calls)
                self._calls = ""
            self._part, text = ends[mark], after
        shown = len(text) - beginning_at_end(text, ends)
        self._held = text[shown:]
        return found + self._take(text[:shown])

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, at the end of the text; tool calls that have not ended become an error."""
        found, self._held = self._take(self._held), ""
        if self._part == "tool_calls":
            mark, = self._ends[self._part]
            self.reply.tool_calls.append({"error": f"the text ends before {mark}", "text": self._calls})
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
