"""The losses on held-out sequences, while a run trains or of a checkpoint: MindFormers' keys `do_eval` and `eval_*`.

Sums of losses and counts of tokens are added up over all of the sequences, so batches of any size give the same
numbers. Each rank with sequences of its own takes its share of a batch.
"""
import json
import os
from itertools import islice

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from tqdm import tqdm

from pangu_ms.errors import PanguError
from pangu_ms.parallel import collectives
from pangu_ms.training.objectives.masks import mtp_mask
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings

RESULT_FILE = "eval.json"
PREFIX = "eval/"  # of the names in a line of log.jsonl
DTYPES = (np.int32, np.int32, np.float32, np.int32)  # of a sequence's columns


class Evaluation:
    """`evaluation()` -> the mean of each part of the loss, and the perplexity of `lm`, by name.

    Args:
        objective: gives means over the sequences of all ranks, as `Pretraining` does; see `forward_objective`.
        held_out: the `HeldOut`.
        vocab_size: of the model.
        rows: a function that begins anew with the sequences, four arrays [T] each; the same for all ranks.

    Attributes:
        sequences, tokens (int): how many there are, and how many of their tokens `lm` predicts.

    Raises:
        PanguError: no token counts, or there is one that the model does not have.
    """

    def __init__(self, objective, held_out, vocab_size, rows):
        self.held_out, self.rows, self.ranks = held_out, rows, objective.causal_lm.ranks
        self.part_names, self.sums = objective.part_names, LossSums(objective)
        self.sequences = self.tokens = 0
        for ids, labels, mask, _ in self._sequences():
            self.sequences, self.tokens = self.sequences + 1, self.tokens + int(mask.sum())
            if (largest := max(ids.max(), labels.max())) >= vocab_size:
                raise PanguError(f"eval_dataset: holds the token {largest}, but model.model_config.vocab_size is "
                                 f"{vocab_size}; take the tokenizer of the model")
        if not self.tokens:
            raise PanguError("eval_dataset: holds no token whose loss counts; give other held-out data")

    def __call__(self):
        total = np.zeros((2, len(self.part_names)))
        size = self.held_out.batch_size * self.ranks.batch
        with tqdm(total=-(-self.sequences // size), desc="evaluating", unit="batch", leave=False,
                  disable=None if self.ranks.rank == 0 else True) as bar:
            for columns in batches(self._sequences(), size, self.ranks):
                sums, counts = self.sums(*map(ms.Tensor, columns))
                total += sums.asnumpy(), counts.asnumpy()
                bar.update()
        found = {name: float(loss / count) for name, loss, count in zip(self.part_names, *total) if count}
        for name, value in found.items():
            if not np.isfinite(value):
                raise PanguError(f"evaluation: {name} is {value} on eval_dataset; the weights are broken: go back to "
                                 "an earlier checkpoint, lower the learning rate")
        return found | {"perplexity": float(np.exp(found["lm"]))}

    def _sequences(self):
        for row in islice(self.rows(), self.held_out.num_samples):
            yield [np.asarray(column, dtype) for column, dtype in zip(row, DTYPES)]


class LossSums(nn.Cell):
    """A batch (input_ids, labels, loss_mask, position_ids) -> float32 [P] each: the parts of the loss summed over
    the tokens of all ranks, and how many tokens these are."""

    def __init__(self, objective):
        super().__init__(auto_prefix=False)
        ranks = objective.causal_lm.ranks
        self.objective, self.ranks, self.parts = objective, ranks.batch, len(objective.part_names)
        self.sum = collectives.reduce(ranks, "batch")

    def construct(self, input_ids, labels, loss_mask, position_ids):
        outputs = self.objective(input_ids, labels, loss_mask, position_ids)
        counts = (ops.sum(loss_mask),)
        for depth in range(1, self.parts):
            counts = counts + (ops.sum(mtp_mask(loss_mask, position_ids, depth)),)
        counts = self.sum(ops.stack(counts))
        return self.sum(outputs[1]) / self.ranks * counts, counts


def forward_objective(causal_lm) -> Pretraining:
    """The language model's loss and those of all MTP depths, as the model is used after training."""
    return Pretraining(causal_lm, TrainingSettings(balance_loss_coeff=0.0))


def batches(sequences, size, ranks):
    """This rank's share of each `size` sequences, as columns [B, T]; what the last ones lack has a loss_mask of 0."""
    sequences = iter(sequences)
    while several := list(islice(sequences, size)):
        several += [[np.zeros_like(column) for column in several[0]]] * (size - len(several))
        yield [np.stack(columns) for columns in zip(*several[ranks.index("batch")::ranks.batch])]


def sentence(found: dict, evaluation: Evaluation) -> str:
    """What a user is told of the numbers of an evaluation."""
    numbers = " ".join(f"{name} {value:.4f}" for name, value in found.items())
    return f"held-out {numbers} ({evaluation.sequences} sequences, {evaluation.tokens} tokens)"


def report(evaluation: Evaluation, checkpoint: str, output_dir: str) -> str | None:
    """Evaluates: the first rank writes eval.json in `output_dir` and returns a sentence on what is in it."""
    found = evaluation()
    if evaluation.ranks.rank:
        return None
    fields = {"checkpoint": checkpoint, "sequences": evaluation.sequences, "tokens": evaluation.tokens} | found
    with open(os.path.join(output_dir, RESULT_FILE), "w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2) + "\n")
    return f"{checkpoint}: {sentence(found, evaluation)}"
