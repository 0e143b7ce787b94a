"""How the members of the family talk: the marks in a reply, and what chooses whether it thinks. Needs no MindSpore."""
from dataclasses import dataclass, field

from pangu_ms.errors import PanguError


@dataclass(frozen=True)
class Marks:
    """Marks as they stand in the text. A tokenizer has a token for each, whose id it alone knows.

    Attributes:
        message_end: ends a turn; a reply stops there.
        think_start: begins the reasoning in a reply; None: it stands at the end of the prompt.
        think_end: stands between reasoning and answer.
        tool_call_start, tool_call_end: stand around a JSON list of calls.
    """

    message_end: str
    think_start: str | None
    think_end: str
    tool_call_start: str
    tool_call_end: str

    @property
    def in_reply(self) -> tuple[str, ...]:
        """Those that part a reply: decoding keeps them."""
        return tuple(filter(None, (self.think_start, self.think_end, self.tool_call_start, self.tool_call_end)))


@dataclass(frozen=True)
class Chat:
    """What a chat with a member of the family needs to know.

    Attributes:
        name: of the member, for messages.
        marks:
        modes: "on", "off", "auto" as far as the member has them -> the text behind the last message of the user that
            asks for it. The first is what it does unasked. The chat template hears of on and off, too.
        template: file in pangu_ms/text that serves a checkpoint without a chat template; None: there is none.
        note: what messages add about modes that it does not have.
    """

    name: str
    marks: Marks
    modes: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    note: str = ""

    def mode(self, thinking: bool | str | None) -> str | None:
        """The mode for "on", "off", "auto", True (on) or False (off); for None what the member does unasked.

        Raises:
            PanguError: the member does not have it.
        """
        if thinking is None:
            return next(iter(self.modes), None)
        mode = {True: "on", False: "off"}.get(thinking, thinking)
        if mode not in self.modes:
            has = f"has {', '.join(self.modes)}" if self.modes else "has no public switch"
            raise PanguError(f"thinking is {mode!r}: {self.name} {has}{self.note}")
        return mode


# Section 7 of the family; the template is the released one.
_FAMILY_MARKS = Marks("[unused10]", "[unused16]", "[unused17]", "[unused11]", "[unused12]")
_FAMILY_TEMPLATE = "family.jinja"

OPENPANGU_V2 = Chat("openPangu-2.0", Marks("<|message_end|>", None, "</think>", "<|tool_call_start|>",
                                           "<|tool_call_end|>"), {"on": "", "off": ""})
EMBEDDED_7B = Chat("openPangu-Embedded-7B", _FAMILY_MARKS, {"on": "", "off": " /no_think", "auto": " /auto_think"},
                   _FAMILY_TEMPLATE)
EMBEDDED_1B = Chat("openPangu-Embedded-1B", _FAMILY_MARKS, {"off": ""}, _FAMILY_TEMPLATE,
                   " alone: it answers without thinking")
PRO_MOE = Chat("openPangu-Pro-MoE", _FAMILY_MARKS, {"on": "", "off": " /no_think"}, _FAMILY_TEMPLATE)
PRO_MOE_V2 = Chat("openPangu-R-72B", _FAMILY_MARKS, {}, _FAMILY_TEMPLATE,
                  " between fast, slow-low and slow-high: leave it out, or write the switch into the message")
ULTRA_MOE = Chat("openPangu-Ultra-MoE", _FAMILY_MARKS, {"on": "", "off": " /no_think"}, _FAMILY_TEMPLATE)
