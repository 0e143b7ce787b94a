"""Values that change in the course of a run, which a YAML file gives as [[step, value], ...]. Needs no MindSpore."""
from dataclasses import dataclass
from numbers import Real

from pangu_ms.errors import ConfigError


@dataclass(frozen=True)
class ByStep:
    """values[i] holds for the steps that have at least starts[i] steps before them, up to starts[i + 1].

    Attributes:
        starts: the first is 0, each is larger than the one before.
        values: as many.
    """

    starts: tuple[int, ...]
    values: tuple[Real, ...]

    @classmethod
    def read(cls, name: str, given, least: int, kinds=(int, float)) -> "ByStep":
        """What the key `name` gives as a list; `ConfigError` names the first thing in it that is wrong."""
        if not isinstance(given, list) or not given:
            raise ConfigError(f"{name}: found {given!r}, wanted a list of [step, value], such as [[0, {least}]]")
        before = -1
        for pair in given:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) not in kinds \
                    or not least <= pair[1] < float("inf"):
                wanted = "a whole number" if kinds == (int,) else "a number"
                raise ConfigError(f"{name}: found {pair!r}, wanted [step, value] with {wanted} of at least {least}")
            if pair[0] <= before or before < 0 and pair[0] != 0:
                where = "first" if before < 0 else f"behind {before}"
                raise ConfigError(f"{name}: found step {pair[0]} {where}, wanted steps that begin with 0 and grow")
            before = pair[0]
        return cls(*(tuple(each) for each in zip(*given)))

    @classmethod
    def of(cls, value: "Real | ByStep") -> "ByStep":
        """A number is the value of all steps."""
        return value if isinstance(value, cls) else cls((0,), (value,))

    @property
    def largest(self) -> Real:
        return max(self.values)

    def at(self, step: int) -> Real:
        """The value for the step that has `step` steps before it."""
        return next(value for start, value in zip(self.starts[::-1], self.values[::-1]) if start <= step)

    def total(self, steps: int) -> Real:
        """The sum of the values of the first `steps` steps."""
        ends = [*self.starts[1:], steps]
        return sum(value * max(0, min(end, steps) - start) for start, end, value in zip(self.starts, ends, self.values))

    def steps_within(self, total: int) -> int:
        """How many steps the values of which add up to at most `total`, all of them positive whole numbers."""
        steps = 0
        for start, end, value in zip(self.starts, [*self.starts[1:], None], self.values):
            fit = total // value
            if end is None or fit < end - start:
                return steps + fit
            steps, total = end, total - (end - start) * value

    def divided(self, by: int) -> "ByStep":
        return ByStep(self.starts, tuple(value // by for value in self.values))
