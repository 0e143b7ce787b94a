"""Held-out losses: sums over all sequences, whatever the batches; keys; what a line of the log gets."""
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from pangu_ms.errors import PanguError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.data.loader import COLUMNS
from pangu_ms.training.objectives.masks import mtp_mask
from pangu_ms.training.run.evaluation import Evaluation, batches, report
from pangu_ms.training.run.held_out import HeldOut, read_held_out
from pangu_ms.training.run.keys import read_keys

LENGTH, SEQUENCES = 6, 5


class Objective(nn.Cell):
    """The loss of a row is its label, and at depth 1 twice its label; means over the rows that count."""

    part_names, causal_lm = ("lm", "mtp_1"), SimpleNamespace(ranks=Ranks())

    def construct(self, input_ids, labels, loss_mask, position_ids):
        masks = loss_mask, mtp_mask(loss_mask, position_ids, 1)
        parts = [factor * ops.sum(ops.cast(labels, ms.float32) * mask) / ops.maximum(ops.sum(mask), 1.0)
                 for factor, mask in zip((1, 2), masks)]
        return parts[0], ops.stack(parts), ops.zeros((0, 1), ms.float32)


def sequences():
    """Two documents in each, and other counts of rows in each."""
    draw = np.random.default_rng(0)
    for n in range(SEQUENCES):
        mask = np.zeros(LENGTH, np.float32)
        mask[n:] = 1
        ids = draw.integers(0, 90, (2, LENGTH))
        yield ids[0], ids[1], mask, np.array([0, 1, 2, 3, 0, 1])


def wanted(count=SEQUENCES):
    lm, mtp = [], []
    for _, labels, mask, position in list(sequences())[:count]:
        for i in range(LENGTH):
            lm += [labels[i]] * bool(mask[i])
            if i + 1 < LENGTH and mask[i + 1] and position[i + 1] == position[i] + 1:
                mtp.append(2 * labels[i])
    return {"lm": np.mean(lm), "mtp_1": np.mean(mtp), "perplexity": np.exp(np.mean(lm))}


def evaluation(batch_size=2, num_samples=None, vocab_size=90, rows=sequences):
    return Evaluation(Objective(), HeldOut({}, batch_size, num_samples), vocab_size, rows)


@pytest.mark.parametrize("batch_size, num_samples", [(1, None), (2, None), (8, None), (2, 3)])
def test_means_over_all_tokens_whatever_the_batch(batch_size, num_samples):
    found = evaluation(batch_size, num_samples)
    assert found.sequences == (num_samples or SEQUENCES) and found.tokens == sum(range(6, 6 - found.sequences, -1))
    assert found() == pytest.approx(wanted(found.sequences), rel=1e-6)
    assert found() == found()


def test_ranks_share_a_batch_and_what_is_missing_does_not_count():
    shares = [list(batches(sequences(), 4, Ranks(1, 1, 2, rank))) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    labels = [row[1].tolist() for row in sequences()]
    assert shares[0][0][1].tolist() == [labels[0], labels[2]] and shares[1][0][1].tolist() == [labels[1], labels[3]]
    assert shares[0][1][1].tolist() == [labels[4], [0] * LENGTH] and not shares[1][1][2].any()


def test_what_cannot_be_evaluated():
    with pytest.raises(PanguError, match="eval_dataset: holds the token 8., but .*vocab_size is 80; take the token"):
        evaluation(vocab_size=80)
    with pytest.raises(PanguError, match="eval_dataset: holds no token whose loss counts"):
        evaluation(rows=lambda: iter(()))
    broken = evaluation()
    broken.sums = lambda *columns: (ms.Tensor([np.nan, 1], ms.float32), ms.Tensor([1, 1], ms.float32))
    with pytest.raises(PanguError, match="evaluation: lm is nan on eval_dataset"):
        broken()


def test_a_checkpoint_is_judged_in_one_line(tmp_path):
    line = report(evaluation(num_samples=1), "some/run", str(tmp_path))
    lm = wanted(1)["lm"]
    assert line.startswith(f"some/run: held-out lm {lm:.4f} mtp_1 ") and line.endswith("(1 sequences, 6 tokens)")
    assert f'"lm": {lm:.3f}'[:-1] in (tmp_path / "eval.json").read_text()


@pytest.mark.parametrize("steps, epochs, intervals, wanted", [
    (10, 1, (4, -1), [4, 8, 10]), (10, 2, (-1, 1), [5, 10]), (10, 3, (-1, 1), [4, 7, 10]), (7, 1, (0, 0), [7]),
    (12, 4, (5, 2), [5, 6, 10, 12])])
def test_when_it_is_due(steps, epochs, intervals, wanted):
    held_out = HeldOut({}, 1, None, *intervals)
    assert [step for step in range(1, steps + 1) if held_out.due(step, steps, epochs)] == wanted


def fields(**changed):
    loader = {"type": "PanguJsonlLoader", "path": "heldout.jsonl", "seq_length": 8}
    return {"do_eval": True, "runner_config": {"batch_size": 3}, "eval_step_interval": 50,
            "eval_dataset": {"data_loader": loader, "input_columns": COLUMNS, "num_samples": 7}} | changed


def test_keys_of_a_file():
    loader = fields()["eval_dataset"]["data_loader"]
    assert read_held_out(fields()) == HeldOut(loader, 3, 7, 50, -1)
    assert read_held_out(fields(do_eval=False)) is None and read_held_out({}) is None
    assert read_held_out(fields(do_eval=False, run_mode="eval")).loader == loader


@pytest.mark.parametrize("changed, message", [
    ({"do_eval": "yes"}, "do_eval: found 'yes', wanted True or False"),
    ({"eval_dataset": None}, "eval_dataset.data_loader: not there"),
    ({"eval_step_interval": 2.5}, "eval_step_interval: found 2.5, wanted an integer"),
    ({"eval_epoch_interval": "1"}, "eval_epoch_interval: found '1', wanted an integer"),
    ({"eval_callbacks": [{"type": "ObsMonitor"}]}, "eval_callbacks: found .*PanguMonitor shows and logs"),
    ({"eval_dataset_task": {"type": "GeneralDataset"}}, "eval_dataset_task.type: found 'GeneralDataset', wanted C"),
    ({"eval_dataset": fields()["eval_dataset"] | {"num_samples": 0}}, "eval_dataset.num_samples: found 0, wanted"),
    ({"eval_dataset": fields()["eval_dataset"] | {"drop_remainder": True}}, "drop_remainder: found True, wanted Fal"),
    ({"eval_dataset": fields()["eval_dataset"] | {"input_columns": None}}, "input_columns: found None, wanted"),
    ({"eval_dataset": fields()["eval_dataset"] | {"num_sample": 1}}, "num_sample: no such key; did you mean num_sam"),
])
def test_wrong_keys(changed, message):
    with pytest.raises(PanguError, match=message) as raised:
        read_held_out(read_keys(fields(**changed)))
    assert "\n" not in str(raised.value)
