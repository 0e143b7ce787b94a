"""Stop strings: cut at the first, nothing shown that could begin one, however the text is cut into pieces."""
import random

import pytest

from pangu_ms.errors import PanguError
from pangu_ms.text.stop_strings import StopStrings


def shown(pieces, strings):
    """What each piece lets out, what the end lets out as the last; nothing is pushed behind a stop."""
    stop, out = StopStrings(strings), []
    for piece in pieces:
        out.append(stop.push(piece))
        if stop.stopped:
            break
    return [*out, stop.flush()]


@pytest.mark.parametrize("pieces, strings, wanted", [
    (["one ", "two"], [], ["one ", "two", ""]),
    (["one ", "two"], ["ne"], ["o", ""]),
    (["a", "EN", "D", "b"], ["END"], ["a", "", "", ""]),
    (["a", "EN", "d", "b"], ["END"], ["a", "", "ENd", "b", ""]),
    (["a", "EN"], ["END"], ["a", "", "EN"]),
    (["EEEN", "D"], ["EEND"], ["E", "", ""]),
    (["x\n", "\ny"], ["\n\n"], ["x", "", ""]),
    (["abc"], ["abc", "b"], ["a", ""]),  # "b" is complete before "abc" is
    (["abc"], ["bc", "abc"], ["", ""]),  # both at once: the longer
    (["日本", "語"], ["本語"], ["日", "", ""]),
])
def test_stops(pieces, strings, wanted):
    assert shown(pieces, strings) == wanted


def test_pieces_make_no_difference():
    dice = random.Random(0)
    for _ in range(2000):
        strings = ["".join(dice.choices("ab", k=dice.randint(1, 4))) + "c" * dice.randint(0, 1) for _ in range(3)]
        text = "".join(dice.choices("abc", k=12))
        cuts = sorted(dice.choices(range(13), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12])]
        assert "".join(shown(pieces, strings)) == "".join(shown(text, strings)), (text, strings, pieces)


def test_empty_stop_string_is_refused():
    with pytest.raises(PanguError, match="^a stop string is empty: give at least one character$"):
        StopStrings(["a", ""])
