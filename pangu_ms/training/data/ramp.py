"""A batch that grows in the course of a run: the steps of a dataset whose batches go through a network at once."""
import numpy as np
from mindspore.dataset import GeneratorDataset


class Steps:
    """Steps `start` to `end` of a run, each of several batches one behind the other.

    Args:
        batches: a dataset of equal batches, from the first of step `start` on.
        counts (ByStep): how many of them a step has.
    """

    def __init__(self, batches, counts, start, end):
        self.batches, self.counts, self.start, self.end = batches, counts, start, end

    def __len__(self):
        return self.end - self.start

    def __iter__(self):
        batches = self.batches.create_tuple_iterator(num_epochs=1, output_numpy=True)
        for step in range(self.start, self.end):
            parts = [next(batches) for _ in range(self.counts.at(step))]
            yield tuple(np.concatenate(column) for column in zip(*parts))


def ramped(dataset, counts, start, end):
    """The batches of a run from step `start` on -> its steps until `end`, of as many batches as the `ByStep` says."""
    steps = Steps(dataset, counts, start, end)
    return GeneratorDataset(steps, dataset.get_col_names(), shuffle=False, num_parallel_workers=1,
                            python_multiprocessing=False)
