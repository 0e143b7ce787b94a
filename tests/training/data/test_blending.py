"""Which source a sequence comes from: the asked ratio from the first sequence on, calculated from its number alone."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_ms.errors import PanguError
from pangu_ms.training.data.blending import Blend, read_data_path


@given(weights=st.lists(st.floats(0.01, 100).map(lambda weight: round(weight, 2)), min_size=1, max_size=6),
       begin=st.sampled_from([0, 1, 997, 10**9, 10**15]))
def test_every_beginning_has_the_ratio_and_every_sequence_comes_once(weights, begin):
    blend = Blend(weights)
    places = [blend.place(n) for n in range(begin, begin + 60)]
    had = {}  # what each source has given before: known from the first sequence of it that comes
    for source, number in places:
        assert had.setdefault(source, number) == number
        had[source] += 1
    for n, (source, number) in enumerate(places, begin):
        assert abs((number + 0.5) / blend.shares[source] - n) <= len(weights) / 2 / blend.shares[source] + 1
    if begin == 0:
        counts = np.zeros(len(weights))
        for n, (source, _) in enumerate(places, 1):
            counts[source] += 1
            assert (abs(counts - n * np.array(blend.shares)) <= 0.5 + np.array(blend.shares) * len(weights) / 2).all()


def test_the_order():
    order = [Blend([0.7, 0.3]).place(n) for n in range(11)]
    assert order == [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3), (1, 1), (0, 4), (0, 5), (1, 2), (0, 6), (0, 7)]
    assert [Blend([1, 1]).place(n) for n in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert Blend([5]).place(10**8) == (0, 10**8)
    assert Blend([0.7, 0.3]).place(10**15) == (0, 7 * 10**14)  # what 10 sequences do is done again and again


@pytest.mark.parametrize("given, found", [
    ("a/b", [(1, "a/b")]), ([0.7, "a", 0.3, "b"], [(0.7, "a"), (0.3, "b")]), (["30", "a"], [(30, "a")])])
def test_data_path(given, found):
    assert read_data_path(given) == found


@pytest.mark.parametrize("given", [None, "", [], ["a"], ["a", "b"], [0.7, "a", 0.3], [0, "a"], [-1, "a"], [True, "a"],
                                   ["nan", "a"], [float("inf"), "a"], [1, 2], [None, "a"], {"a": 1}, 5])
def test_what_is_no_data_path_is_named(given):
    with pytest.raises(PanguError, match="^data_loader.data_path: found ") as raised:
        read_data_path(given)
    assert "\n" not in str(raised.value)
