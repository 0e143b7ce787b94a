"""Packing: what each row holds, that nothing is lost, and that one integer continues an order."""
import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu_ms.errors import PanguError
from pangu_ms.training.data.documents import join
from pangu_ms.training.data.packing import PackedDataset

PAD = 0


def numbered(lengths, may_be_cut, counted=None):
    """Documents whose tokens are 1, 2, 3 ... over all of them, so that each token tells where it came from."""
    starts = np.cumsum([1, *lengths])
    return join([(f"d{i}", np.arange(start, start + length), np.ones(length) if counted is None else counted[i])
                   for i, (start, length) in enumerate(zip(starts, lengths))], may_be_cut, PAD)


def epoch(dataset, number=0):
    return [dataset[n] for n in range(number * len(dataset), (number + 1) * len(dataset))]


def equal(one, other):
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def test_a_document_shorter_than_the_sequence():
    (sequence,) = PackedDataset(join([("a", [7, 8, 9], [1, 1, 1])], True, PAD), 5, seed=0)
    assert [column.tolist() for column in sequence] == [
        [7, 8, 9, PAD, PAD], [8, 9, PAD, PAD, PAD], [1, 1, 0, 0, 0], [0, 1, 2, 0, 1]]
    assert [column.dtype.name for column in sequence] == ["int32", "int32", "float32", "int32"]


def test_a_document_longer_than_the_sequence_is_cut_and_every_transition_counts():
    first, second = PackedDataset(join([("a", [4, 5, 6, 7, 8], [1] * 5)], True, PAD), 3, seed=0)
    assert [column.tolist() for column in first] == [[4, 5, 6], [5, 6, 7], [1, 1, 1], [0, 1, 2]]
    assert [column.tolist() for column in second] == [[7, 8, PAD], [8, PAD, PAD], [1, 0, 0], [0, 1, 0]]


def test_two_documents_in_a_row_each_with_positions_of_its_own():
    dataset = PackedDataset(join([("a", [4, 5, 6], [1] * 3), ("b", [7, 8], [1] * 2)], True, PAD), 5, seed=0)
    names = dataset.documents(0)
    assert sorted(names) == ["a", "b"]
    parts = {"a": ([4, 5, 6], [5, 6, PAD], [1, 1, 0], [0, 1, 2]), "b": ([7, 8], [8, PAD], [1, 0], [0, 1])}
    assert [column.tolist() for column in dataset[0]] == [
        first + second for first, second in zip(parts[names[0]], parts[names[1]])]


def test_chats_count_only_what_is_marked():
    """Row p counts where token p + 1 does."""
    (sequence,) = PackedDataset(join([("a", [4, 5, 6, 7], [0, 0, 1, 1])], False, PAD), 5, seed=0)
    assert [column.tolist() for column in sequence] == [
        [4, 5, 6, 7, PAD], [5, 6, 7, PAD, PAD], [0, 1, 1, 0, 0], [0, 1, 2, 3, 0]]


@pytest.mark.parametrize("may_be_cut", [True, False])
@pytest.mark.parametrize("bounds, kept", [((3, 5), [1, 2, 4]), ((4, None), [2, 3, 4]), ((None, 2), [0])])
def test_documents_between_two_lengths(may_be_cut, bounds, kept):
    """Others are in no sequence, as if they were not there; names are still those of the file."""
    lengths = [2, 3, 5, 7, 4]
    documents = numbered(lengths, may_be_cut)
    dataset = PackedDataset(documents, 7, 0, *bounds)
    sequences = epoch(dataset)
    tokens = {token for sequence in sequences for token in sequence.input_ids.tolist()} - {PAD}
    assert tokens == {int(token) for i in kept for token in documents.ids[slice(*documents.offsets[i:i + 2])]}
    assert {name for n in range(len(dataset)) for name in dataset.documents(n)} == {f"d{i}" for i in kept}
    alone = PackedDataset(join([(f"d{i}", documents.ids[slice(*documents.offsets[i:i + 2])], np.ones(lengths[i]))
                                for i in kept], may_be_cut, PAD), 7, 0)
    assert all(equal(one, other) for one, other in zip(sequences, epoch(alone), strict=True))


def test_no_document_between_two_lengths():
    with pytest.raises(PanguError, match="none of 2 documents has 4 to 9 tokens: they have 2 to 3; change min"):
        PackedDataset(numbered([2, 3], True), 5, 0, 4, 9)


def check_rows(sequence, documents):
    """Every row of one sequence against the documents it says it is from."""
    ends = set(documents.offsets[1:].tolist())  # token number e ends a document
    for p, (token, label, counts, position) in enumerate(zip(*(column.tolist() for column in sequence))):
        if token == PAD:
            assert label == PAD and counts == 0
        elif token in ends:
            assert label == PAD and counts == 0
        else:
            assert label == token + 1 and counts == documents.counted[token]  # tokens are counted from 1
        if p and position:
            assert position == sequence.position_ids[p - 1] + 1
            assert token == PAD or token == sequence.input_ids[p - 1] + 1
        else:
            assert position == 0


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), length=st.integers(1, 20),
       seed=st.integers(0, 5), number=st.integers(0, 3))
def test_texts_nothing_is_lost_and_nothing_comes_twice(lengths, length, seed, number):
    documents = numbered(lengths, may_be_cut=True)
    dataset = PackedDataset(documents, length, seed)
    sequences = epoch(dataset, number)
    for sequence in sequences:
        check_rows(sequence, documents)
    ids = np.concatenate([sequence.input_ids for sequence in sequences])
    assert sorted(ids[ids != PAD]) == documents.ids.tolist()
    assert len(ids) - sum(lengths) < length  # no more padding than the last sequence needs
    predicted = np.concatenate([sequence.labels[sequence.loss_mask == 1] for sequence in sequences])
    assert sorted(predicted) == sorted(set(documents.ids) - set(documents.offsets[:-1] + 1))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), length=st.integers(1, 20),
       seed=st.integers(0, 5), number=st.integers(0, 3), data=st.data())
def test_chats_stay_whole_and_come_once(lengths, length, seed, number, data):
    counted = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    documents = numbered(lengths, False, counted)
    if min(lengths) > length:
        with pytest.raises(PanguError):
            PackedDataset(documents, length, seed)
        return
    dataset = PackedDataset(documents, length, seed)
    sequences = epoch(dataset, number)
    for sequence in sequences:
        check_rows(sequence, documents)
    names = [name for n in range(len(dataset)) for name in dataset.documents(number * len(dataset) + n)]
    assert Counter(names) + Counter(dataset.dropped) == Counter(documents.names)
    assert dataset.dropped == [f"d{i}" for i, n in enumerate(lengths) if n > length]
    ids = np.concatenate([sequence.input_ids for sequence in sequences])
    fitting = [documents.ids[a:b] for a, b in zip(documents.offsets, documents.offsets[1:]) if b - a <= length]
    assert sorted(ids[ids != PAD]) == np.concatenate(fitting).tolist()
    starts = sum((sequence.position_ids == 0) & (sequence.input_ids != PAD) for sequence in sequences).sum()
    assert starts == len(fitting)  # no document begins twice, so none is cut


def test_chats_leave_little_room():
    """2000 chats of 20 to 120 tokens; one open sequence at a time would leave 8 % of 512 empty."""
    lengths = np.random.default_rng(0).integers(20, 121, 2000)
    dataset = PackedDataset(numbered(lengths, False), 512, seed=0)
    assert lengths.sum() / (len(dataset) * 512) > 0.98


@pytest.mark.parametrize("may_be_cut", [True, False])
def test_epochs_and_seeds_have_other_orders_and_the_same_length(may_be_cut):
    documents = numbered([3, 5, 2, 7, 4, 6, 1, 5] * 5, may_be_cut)
    orders = [[tuple(dataset.documents(number * len(dataset) + n)) for n in range(len(dataset))]
              for dataset in (PackedDataset(documents, 8, seed) for seed in (0, 1)) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert len(PackedDataset(documents, 8, 0)) == len(orders[0]) == len(orders[1])


def test_the_order_is_the_same_in_another_process():
    program = ("from tests.training.data.test_packing import digest; print(digest(True), digest(False))")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [str(digest(True)), str(digest(False))]


def digest(may_be_cut):
    dataset = PackedDataset(numbered([3, 5, 2, 7, 4, 6, 1, 5] * 9, may_be_cut), 8, seed=11)
    weights = np.arange(1, 9)
    return int(sum((n + 1) * (dataset[n].input_ids * weights).sum() for n in range(3 * len(dataset))))


def test_documents_that_do_not_fit(caplog):
    documents = numbered([9, 3, 12], False)
    with caplog.at_level(logging.WARNING):
        assert PackedDataset(documents, 8, 0).dropped == ["d0", "d2"]
    assert caplog.messages == ["2 of 3 chats are longer than 8 tokens and left out, the first of them d0"]
    with pytest.raises(PanguError, match="^sequence_length is 2: none of 3 documents fits, the shortest has 3 tokens:"):
        PackedDataset(documents, 2, 0)
    with pytest.raises(PanguError, match="^sequence_length is 8: none of 0 documents fits: make it longer or bring"):
        PackedDataset(join([], True, PAD), 8, 0)
    with pytest.raises(PanguError, match="^sequence_length is 0: wanted at least 1$"):
        PackedDataset(documents, 0, 0)


def test_indices():
    dataset = PackedDataset(numbered([9, 3, 12], True), 8, 0)
    with pytest.raises(IndexError):
        dataset[-1]
    assert len(list(dataset)) == len(dataset) == 3
