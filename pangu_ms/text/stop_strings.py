"""Stop strings in text that comes in pieces."""
from pangu_ms.errors import PanguError


class StopStrings:
    """Passes text on up to the first stop string, and holds back what could be the beginning of one.

    The first is the one that is complete first when the text comes character by character, however it is really cut
    into pieces. Of two that end together the longer counts.

    Attributes:
        stopped (bool): a stop string is complete. Nothing may be pushed after it.

    Raises:
        PanguError: a stop string is empty.
    """

    def __init__(self, strings):
        self._strings = tuple(strings)
        if "" in self._strings:
            raise PanguError("a stop string is empty: give at least one character")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        text = self._held + text
        ends = [(text.index(string) + len(string), text.index(string)) for string in self._strings if string in text]
        if ends:
            self.stopped, self._held = True, ""
            return text[:min(ends)[1]]
        shown = len(text) - beginning_at_end(text, self._strings)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, at the end of a text that never completed a stop string."""
        return self._held


def beginning_at_end(text: str, strings) -> int:
    """How many characters at the end of text begin one of the strings without completing it: the largest number."""
    return max((size for string in strings for size in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:size])), default=0)
