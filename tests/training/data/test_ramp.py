"""Steps of several batches: which sequences each has, from the beginning and from any step."""
import numpy as np
import pytest
from mindspore.dataset import GeneratorDataset

from pangu_ms.training.by_step import ByStep
from pangu_ms.training.data.loader import source_of
from pangu_ms.training.data.ramp import ramped

COUNTS = ByStep((0, 2, 3), (1, 2, 3))  # batches of two: steps of 2, 2, 4, 6, 6 sequences


class Source:
    def __len__(self):
        return 21

    def __getitem__(self, n):
        return np.array([n, n], np.int32), np.array([-n], np.int32)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_every_sequence_comes_once_in_its_step(start):
    source = Source()
    batches = GeneratorDataset(source, ["a", "b"], shuffle=False).batch(2, drop_remainder=True)
    end = COUNTS.steps_within(batches.get_dataset_size())
    steps = ramped(batches.skip(COUNTS.total(start)), COUNTS, start, end)
    assert end == 5 and steps.get_dataset_size() == 5 - start and steps.get_col_names() == ["a", "b"]
    assert source_of(steps) is source
    found = [(row["a"][:, 0].tolist(), row["b"][:, 0].tolist())
             for row in steps.create_dict_iterator(num_epochs=1, output_numpy=True)]
    wanted = [range(2), range(2, 4), range(4, 8), range(8, 14), range(14, 20)][start:]
    assert found == [(list(each), [-n for n in each]) for each in wanted]
