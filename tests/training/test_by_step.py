"""Values by step: what a YAML file may say, and sums over steps."""
import pytest

from pangu_ms.errors import ConfigError
from pangu_ms.training.by_step import ByStep

RAMP = ByStep((0, 3, 5), (1, 2, 4))


def test_each_step_has_the_value_of_the_last_start():
    assert [RAMP.at(step) for step in range(7)] == [1, 1, 1, 2, 2, 4, 4] and RAMP.largest == 4
    assert RAMP.divided(2).values == (0, 1, 2) and ByStep.of(0.5).at(9) == 0.5 and ByStep.of(RAMP) is RAMP


def test_sums_and_what_fits_into_them():
    each = [RAMP.at(step) for step in range(9)]
    for steps in range(9):
        assert RAMP.total(steps) == sum(each[:steps])
    for total in range(23):
        steps = RAMP.steps_within(total)
        assert sum(each[:steps]) <= total < sum(each[:steps + 1])


def test_a_list_of_pairs_is_read():
    assert ByStep.read("key", [[0, 1], [3, 2], [5, 4]], 1, (int,)) == RAMP
    assert ByStep.read("key", [[0, 1.e-3], [10, 0]], 0).values == (1e-3, 0)


@pytest.mark.parametrize("given, message", [
    (3, r"key: found 3, wanted a list of \[step, value\], such as \[\[0, 1\]\]"),
    ([], r"key: found \[\], wanted a list"),
    ([[0, 1], 2], r"key: found 2, wanted \[step, value\] with a whole number of at least 1"),
    ([[0, 0]], r"key: found \[0, 0\], wanted \[step, value\]"),
    ([[0, 1.5]], r"key: found \[0, 1.5\], wanted \[step, value\]"),
    ([[1, 1]], "key: found step 1 first, wanted steps that begin with 0 and grow"),
    ([[-1, 1]], "key: found step -1 first, wanted steps that begin with 0"),
    ([[0, 1], [5, 2], [5, 4]], "key: found step 5 behind 5, wanted steps that begin with 0 and grow"),
])
def test_a_wrong_list_is_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as raised:
        ByStep.read("key", given, 1, (int,))
    assert "\n" not in str(raised.value)
