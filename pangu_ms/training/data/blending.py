"""Blending: which source each sequence of a run comes from, so that every beginning of the run has the asked ratio."""
import math
from fractions import Fraction

from pangu_ms.errors import PanguError


class Blend:
    """An order of the sequences of several sources in which the one that lags most comes next.

    Sequence m of a source with weight w is due at (m + 1/2) / w, and sequences come in the order of these times, the
    first source first where they are equal. So after n sequences a source with a share of 0.7 has had 0.7 n of them, to
    within about one. (It is Webster's way of giving seats to parties.) Where a sequence comes from is calculated from
    its number alone, in exact fractions: nothing is counted from the beginning of the run, and nothing is stored.

    Args:
        weights: positive numbers, one for each source. 0.7 is seven tenths.
    """

    def __init__(self, weights):
        shares = [Fraction(str(weight)) for weight in weights]
        whole = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * whole) for share in shares]
        self.shares = [float(share / sum(shares)) for share in shares]

    def place(self, n: int) -> tuple[int, int]:
        """(which source, which of its sequences, from 0) sequence n of the run is."""
        weights, sources = self._weights, len(self._weights)
        total = sum(weights)

        def due(time):
            """How many sequences of each source are due by then; all together about time / 2."""
            return [(weight * time + total) // (2 * total) for weight in weights]
        before, after = due(max(0, 2 * n - sources)), due(2 * n + sources + 2)  # at most n, and at least n + 1, of all
        near = sorted((Fraction(2 * m + 1, weights[source]), source, m)
                      for source in range(sources) for m in range(before[source], after[source]))
        return near[n - sum(before)][1:]


def read_data_path(given) -> list[tuple[float, str]]:
    """[(weight, prefix), ...] of `data_path`: a prefix, or weights and prefixes in turn.

    Raises:
        PanguError: it is neither, or a weight is no positive number.
    """
    parts = [1, given] if isinstance(given, str) and given else given
    if not isinstance(parts, list) or not parts or len(parts) % 2:
        raise PanguError(f"data_loader.data_path: found {given!r}, wanted the path of .bin and .idx "
                         "without these endings, or a list of weights and such paths in turn: [0.7, a, 0.3, b]")
    found = []
    for weight, prefix in zip(parts[::2], parts[1::2]):
        try:
            number = float("nan" if isinstance(weight, bool) else weight)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf or not isinstance(prefix, str):
            raise PanguError(f"data_loader.data_path: found {weight!r} before {prefix!r}, wanted a "
                             "positive weight before each path: [0.7, a, 0.3, b]")
        found.append((number, prefix))
    return found
