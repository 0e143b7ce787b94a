"""How ranks are counted, and how many processes they need."""
import pytest

from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks, check_processes


def test_ranks_count_tensor_first_then_expert_then_data():
    places = [Ranks(2, 3, 2, rank) for rank in range(12)]
    assert [place.tensor_rank for place in places] == [0, 1] * 6
    assert [place.expert_rank for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place.model.rank for place in places] == list(range(6)) * 2
    assert [place.group("tensor") for place in places[:3]] == [[0, 1], [0, 1], [2, 3]]
    assert places[7].group("expert") == [7, 9, 11] and places[7].group("data") == [1, 7]


def test_expert_ranks_have_sequences_of_their_own_in_training():
    inference, training = Ranks(2, 3, 2, 9), Ranks(2, 3, 2, 9, batch_sharded=True)
    assert (inference.batch, inference.group("batch")) == (2, [3, 9])
    assert (training.batch, training.group("batch")) == (6, [1, 3, 5, 7, 9, 11])


def test_a_wrong_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(ConfigError, match="makes 4 processes, and this run has 2: start it by msrun --worker_num=4"):
        check_processes(Ranks(tensor=2, expert=2))
    check_processes(Ranks(data=2))


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ConfigError, match="tensor parallel is .*: wanted a whole number of at least 1"):
        Ranks(tensor=size)
