"""What a run shows, logs, refuses and saves: MindSpore callbacks around a `TrainStep`.

The step's outputs are (total, parts, grad_norm, load, squares) and maybe the largest logits, see
`pangu_ms.training.step`. Whoever makes the callbacks sets their `run`.
"""
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore.train import Callback
from tqdm import tqdm

from pangu_ms.architectures.adapters import is_adapter
from pangu_ms.errors import PanguError, one_line
from pangu_ms.interrupts import ctrl_c
from pangu_ms.model.adapters import DROPOUT_CALL
from pangu_ms.parallel import collectives
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.data.loader import source_of
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.background import Background
from pangu_ms.training.run.evaluation import PREFIX, Evaluation, sentence
from pangu_ms.training.run.held_out import HeldOut
from pangu_ms.training.run.measures import Measures, peak
from pangu_ms.training.run.state import LOG_FILE, RunState, save_checkpoint
from pangu_ms.training.run.tensorboard import Curves

SAY_EVERY = 30.0  # seconds between two lines of a run whose stderr is no terminal


@dataclass
class Run:
    """What callbacks must know of the run that the network of a `TrainStep` cannot tell.

    Attributes:
        output_dir: log.jsonl and checkpoints/ are in it.
        fields: the configuration, values by dotted key.
        seed: of data order and initial values.
        steps: where the run ends, counted from its very beginning.
        start: steps that were done before this process.
        sequences_per_step: on all devices, where there is no `batch_ramp`.
        sequences: that steps before this process had.
        rank: of this process; rank 0 logs.
        tokenizer: a directory, copied into checkpoints.
        batch_ramp: a `ByStep` of the sequences of each step.
        skip_nonfinite: how many steps in a row may have no finite loss or norm.
        finite: the last step of this process that had, or `start`.
        epochs: that the steps make.
        held_out, evaluation: when to evaluate, and what does.
        tensorboard: the section of that name.
        saving: seconds of writing checkpoints that no line of the log has yet.
    """

    output_dir: str
    fields: dict[str, Any]
    seed: int
    steps: int
    start: int
    sequences_per_step: int
    sequences: int = 0
    rank: int = 0
    tokenizer: str | None = None
    batch_ramp: ByStep | None = None
    skip_nonfinite: int = 0
    finite: int = 0
    epochs: int = 1
    held_out: HeldOut | None = None
    evaluation: Evaluation | None = None
    tensorboard: dict[str, Any] | None = None
    saving: float = 0.0

    def __post_init__(self):
        self.finite = self.start

    def sequences_before(self, step: int) -> int:
        """Of all steps before `step`, which is counted from 1."""
        return self.batch_ramp.total(step - 1) if self.batch_ramp else (step - 1) * self.sequences_per_step

    def sequences_of(self, step: int) -> int:
        return self.sequences_before(step + 1) - self.sequences_before(step)

    def saved(self) -> float:
        """`saving`, which begins anew."""
        saving, self.saving = self.saving, 0.0
        return saving


class PanguMonitor(Callback):
    """A progress bar, a line of log.jsonl for each step, and the end of the run when a number is no longer finite.

    A line holds step (from 1), loss, each part of it by name, learning_rate, grad_norm (before clipping),
    tokens_per_second and seconds of the step; the first step's seconds include compiling. Where there are experts,
    expert_balance: load of the busiest one of a layer over the mean, in the worst layer. With QK-clip
    largest_attention_logit, of all heads in the step's forwards, before the clip. Then what `Measures` tells,
    seconds/data that the step waited for its batch, seconds/checkpoint of what was saved since the line before, and
    where the step ends with an evaluation eval/... and seconds/evaluation. TensorBoard gets the same numbers. The line
    of a step that was skipped has null for what was not finite, and skipped: how many were in a row.

    Where stderr is no terminal, a line every SAY_EVERY seconds takes the bar's place.

    Args:
        device: what the run is on, a name in `estimate.devices.DEVICES`, for the share of its peak (mfu).
    """

    run = bar = log = curves = None

    def __init__(self, device=None):
        peak(device, "float32")
        self.device = device

    def on_train_begin(self, run_context):
        network = run_context.original_args().train_network
        self.part_names = network.objective.part_names
        self.measures = Measures(network, self.device)
        self.log = _open_log(self.run) if self.run.rank == 0 else None
        if (self.run.tensorboard or {}).get("tensorboard_dir") and self.run.rank == 0:
            self.curves = Curves(self.run.tensorboard, self.run.start)
        self.said = -SAY_EVERY
        # MindSpore compiles in the first step, without a word. tqdm's own thread shows a bar that stands still again.
        self.bar = tqdm(desc="compiling the training graph", bar_format="{desc}: {elapsed}", miniters=2, leave=False,
                        disable=self._disable())
        self.compiling, self.ended = True, time.monotonic()

    def on_train_step_begin(self, run_context):
        self.began, self.saved = time.monotonic(), self.run.saved()
        self.waited = self.began - self.ended - self.saved

    def on_train_step_end(self, run_context):
        parameters = run_context.original_args()
        step = self.run.start + parameters.cur_step_num
        line = {"step": step} | numbers(self.part_names, parameters.net_outputs)
        saved = self.run.saved()                                                # by a callback before this one
        seconds = time.monotonic() - self.began - saved
        first, self.compiling = self.compiling, False
        if first:
            self.bar.close()
            if self.run.rank == 0:
                print(f"compiled the training graph in {seconds:.0f} s", file=sys.stderr)
            self.bar = tqdm(total=self.run.steps, initial=step - 1, unit="step", desc="training",
                            disable=self._disable())
        check_finite(line, self.run, parameters.train_dataset)
        length = parameters.train_dataset_element[0].shape[1]
        tokens = self.run.sequences_of(step) * length
        line |= {"learning_rate": learning_rate(parameters.train_network.optimizer, step),
                 "tokens_per_second": tokens / seconds, "seconds": seconds, "seconds/data": self.waited}
        line |= self.measures(parameters.net_outputs, length, tokens / seconds)
        if saved + self.saved:
            line["seconds/checkpoint"] = saved + self.saved
        if self.run.held_out and self.run.held_out.due(step, self.run.steps, self.run.epochs):
            line |= self._evaluate(step)
        if skipped := step - self.run.finite:
            line = {name: value if np.isfinite(value) else None for name, value in line.items()} | {"skipped": skipped}
        if self.log:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        if self.curves:
            self.curves.write(line)
        shown = f"skipped {skipped} in a row" if skipped else self._shown(line)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        self.ended = time.monotonic()
        due = not first and self.ended - self.said > SAY_EVERY or step == self.run.steps
        if due and self.bar.disable and self.run.rank == 0:
            self.said = self.ended
            left = tqdm.format_interval((self.run.steps - step) * (seconds + self.waited))
            print(f"step {step} of {self.run.steps}: {shown}, {left} left", file=sys.stderr)

    def _shown(self, line):
        parts = " ".join(f"{name} {line[name]:.3f}" for name in ("loss", *self.part_names))
        balance = f"balance {line['expert_balance']:.2f} " if "expert_balance" in line else ""
        return (f"{parts} lr {line['learning_rate']:.2e} norm {line['grad_norm']:.2f} {balance}"
                f"{line['tokens_per_second']:.0f} tok/s")

    def _evaluate(self, step):
        began = time.monotonic()
        found = self.run.evaluation()
        if self.run.rank == 0:
            tqdm.write(f"step {step}: {sentence(found, self.run.evaluation)}", file=sys.stderr)
        return {PREFIX + name: value for name, value in found.items()} | \
            {"seconds/evaluation": time.monotonic() - began}

    def __exit__(self, *error):
        """MindSpore leaves its callbacks through here, whether training ended or was ended."""
        for opened in (self.bar, self.log, self.curves):
            if opened is not None:
                opened.close()

    def _disable(self):
        """Of bars: they are for the terminal of the first rank."""
        return None if self.run.rank == 0 else True


class PanguCheckpoint(Callback):
    """Saves every `save_checkpoint_steps` steps and at the end; keeps the newest `keep_checkpoint_max`.

    async_save: the step only copies what is saved; a thread writes it while the training goes on. The next save and the
    end of the run wait for it, and what it could not do ends the run at the next step.
    """

    run = None

    def __init__(self, save_checkpoint_steps=100, keep_checkpoint_max=5, async_save=True):
        for name, value in (("save_checkpoint_steps", save_checkpoint_steps),
                            ("keep_checkpoint_max", keep_checkpoint_max)):
            if type(value) is not int or value < 1:
                raise PanguError(f"callbacks.PanguCheckpoint.{name}: found {value!r}, wanted an integer of at least 1")
        if type(async_save) is not bool:
            raise PanguError(f"callbacks.PanguCheckpoint.async_save: found {async_save!r}, wanted True or False")
        self.every, self.keep = save_checkpoint_steps, keep_checkpoint_max
        self.background = Background() if async_save else None
        self.opened, self.copies = contextlib.ExitStack(), {}

    def on_train_begin(self, run_context):
        if self.background:
            self.background.shows = self.run.rank == 0

    def on_train_step_end(self, run_context):
        if self.background:
            self.background.check()
        parameters, run = run_context.original_args(), self.run
        if parameters.cur_step_num == 1:                                        # not before: it would outlast compiling
            self.opened.enter_context(ctrl_c())
        network = parameters.train_network
        step = run.start + parameters.cur_step_num
        # Here too: whatever order the callbacks have, nothing broken is saved.
        line = {"step": step} | numbers(network.objective.part_names, parameters.net_outputs)
        check_finite(line, run, parameters.train_dataset)
        if step % self.every == 0 or step == run.steps:
            began = time.monotonic()
            self._save(network, step)
            run.saving += time.monotonic() - began

    def __exit__(self, kind, error, _):
        """However the training ended, what is being written is written to its end."""
        try:
            with self.opened:
                if self.background:
                    self.background.wait()
        except PanguError as failure:
            if error is None:
                raise
            print(f"pangu-train: {one_line(failure)}", file=sys.stderr)         # besides what ended the training

    def _save(self, network, step):
        run, model = self.run, network.causal_lm
        ranks = replace(model.ranks, rank=run.rank)
        holds = run.rank < ranks.model.count                                    # the others are copies
        arrays = [{name: parameter.asnumpy() for name, parameter in each.items()}
                  for each in (split_parameters(network) if holds else ({}, {}))]
        options = {}
        if self.background:
            self.background.wait()                                              # and then write over the copies
            arrays = [{name: self._copied(name, values) for name, values in each.items()} for each in arrays]
            options["start"] = self.background.start
        if isinstance(network.optimizer, PanguMuon):
            arrays[1] |= network.optimizer.gathered_states()                    # which all ranks put together
        state = RunState(step, run.sequences_before(step + 1), run.seed, run.fields)
        save_checkpoint(run.output_dir, model.config, *arrays, state, self.keep, run.tokenizer, ranks,
                        lambda: collectives.wait(model.ranks), adapter=model.adapter, **options)

    def _copied(self, name, values):
        """A copy of what the next step changes, in memory that is kept: to ask for as much anew can take longer."""
        if name not in self.copies:
            self.copies[name] = np.empty_like(values)
        np.copyto(self.copies[name], values)
        return self.copies[name]


def split_parameters(network):
    """(the model's parameters, all others of a `TrainStep` but shards of states: moments, counters) by name.

    Sums of gradients are left out: they are zero between steps. Where an adapter is trained, its parameters are in
    place of the model's.
    """
    weights = {parameter.name: parameter for parameter in network.causal_lm.get_parameters()
               if parameter.name != DROPOUT_CALL}
    own = network.optimizer.own_names if isinstance(network.optimizer, PanguMuon) else set()
    own = own | {parameter.name for parameter in getattr(network, "sums", ())}
    others = {parameter.name: parameter for parameter in network.get_parameters()
              if parameter.name not in weights and parameter.name not in own}
    if network.causal_lm.adapter:
        weights = {name: parameter for name, parameter in weights.items() if is_adapter(name)}
    return weights, others


def numbers(part_names, outputs):
    """The outputs of a step as Python numbers: loss, the parts by name, grad_norm, of experts expert_balance, and where
    the step gives the largest logits largest_attention_logit."""
    total, parts, grad_norm, load, _, *largest = (output.asnumpy() for output in outputs)
    found = {"loss": total.item()} | dict(zip(part_names, parts.tolist())) | {"grad_norm": grad_norm.item()}
    found |= {"expert_balance": (load.max(1) / load.mean(1)).max().item()} if load.size else {}
    return found | {"largest_attention_logit": each.max().item() for each in largest}


def check_finite(line, run, dataset):
    """`PanguError` names the first number of a step that is not finite, and the documents that made it so.

    A step without a finite loss or norm has changed nothing where `run.skip_nonfinite` allows it, and passes.
    """
    step, broken = line["step"], [name for name, value in line.items() if not np.isfinite(value)]
    if not broken:
        run.finite = step
    elif np.isfinite(line["loss"] + line["grad_norm"]) or step - run.finite > run.skip_nonfinite:
        first = run.sequences_before(step)
        source = source_of(dataset)
        documents = [str(name) for n in range(first, first + run.sequences_of(step))
                     for name in (source.documents(n) if hasattr(source, "documents") else ())]
        raise PanguError(f"step {step}: {broken[0]} is {line[broken[0]]}, with the documents "
                         f"{', '.join(documents[:20]) or 'unknown'}{' and more' if len(documents) > 20 else ''}; "
                         "nothing was saved since the last good checkpoint: look at them, lower the learning rate")


def learning_rate(optimizer, step):
    """The rate that step `step` (from 1) was made with."""
    rate = optimizer.learning_rate
    if isinstance(rate, ms.nn.Cell):
        rate = rate(ms.Tensor(step - 1, ms.int32))
    return rate.asnumpy().item()


def _open_log(run):
    """log.jsonl, to be appended to; lines of steps that this run will do again are dropped first."""
    os.makedirs(run.output_dir, exist_ok=True)
    path = os.path.join(run.output_dir, LOG_FILE)
    kept = []
    if run.start and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= run.start]
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(f"{path}.partial", path)
    return open(path, "a", encoding="utf-8")
