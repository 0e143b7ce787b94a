"""What a member of the family writes around the parts of a reply."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Marks:
    """Marks as they stand in the text.

    Attributes:
        message_end: ends a turn; a reply stops there.
        think_end: stands between reasoning and answer. What begins the reasoning stands in the prompt.
        tool_call_start, tool_call_end: stand around a JSON list of calls.
    """

    message_end: str
    think_end: str
    tool_call_start: str
    tool_call_end: str


OPENPANGU_V2 = Marks("<|message_end|>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>")
