"""What a run shows, logs, refuses and saves: MindSpore callbacks around a `TrainStep`.

The step's outputs are (total, parts, grad_norm, load), see `pangu_ms.training.step`. Whoever makes the callbacks sets
their `run`.
"""
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
from pangu_ms.errors import PanguError
from pangu_ms.model.adapters import DROPOUT_CALL
from pangu_ms.parallel import collectives
from pangu_ms.training.data.loader import source_of
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.state import LOG_FILE, RunState, save_checkpoint


@dataclass
class Run:
    """What callbacks must know of the run that the network of a `TrainStep` cannot tell.

    Attributes:
        output_dir: log.jsonl and checkpoints/ are in it.
        fields: the configuration, values by dotted key.
        seed: of data order and initial values.
        steps: where the run ends, counted from its very beginning.
        start: steps that were done before this process.
        sequences_per_step: on all devices.
        sequences: that steps before this process had.
        rank: of this process; rank 0 logs.
        tokenizer: a directory, copied into checkpoints.
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


class PanguMonitor(Callback):
    """A progress bar, a line of log.jsonl for each step, and the end of the run when a number is no longer finite.

    A line holds step (from 1), loss, each part of it by name, learning_rate, grad_norm (before clipping),
    tokens_per_second and seconds of the step; the first step's seconds include compiling. Where there are experts,
    expert_balance: load of the busiest one of a layer over the mean, in the worst layer.
    """

    run = bar = log = None

    def on_train_begin(self, run_context):
        self.part_names = run_context.original_args().train_network.objective.part_names
        self.log = _open_log(self.run) if self.run.rank == 0 else None
        # MindSpore compiles in the first step, without a word. tqdm's own thread shows a bar that stands still again.
        self.bar = tqdm(desc="compiling the training graph", bar_format="{desc}: {elapsed}", miniters=2, leave=False,
                        disable=self._disable())
        self.compiling = True

    def on_train_step_begin(self, run_context):
        self.began = time.monotonic()

    def on_train_step_end(self, run_context):
        parameters = run_context.original_args()
        step = self.run.start + parameters.cur_step_num
        line = {"step": step} | numbers(self.part_names, parameters.net_outputs)
        seconds = time.monotonic() - self.began
        if self.compiling:
            self.compiling = False
            self.bar.close()
            if self.run.rank == 0:
                print(f"compiled the training graph in {seconds:.0f} s", file=sys.stderr)
            self.bar = tqdm(total=self.run.steps, initial=step - 1, unit="step", desc="training",
                            disable=self._disable())
        check_finite(line, self.run, parameters.train_dataset)
        tokens = self.run.sequences_per_step * parameters.train_dataset_element[0].shape[1]
        line |= {"learning_rate": learning_rate(parameters.train_network.optimizer, step),
                 "tokens_per_second": tokens / seconds, "seconds": seconds}
        if self.log:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        parts = " ".join(f"{name} {line[name]:.3f}" for name in ("loss", *self.part_names))
        balance = f"balance {line['expert_balance']:.2f} " if "expert_balance" in line else ""
        self.bar.set_postfix_str(f"{parts} lr {line['learning_rate']:.2e} norm {line['grad_norm']:.2f} {balance}"
                                 f"{line['tokens_per_second']:.0f} tok/s", refresh=False)
        self.bar.update()

    def __exit__(self, *error):
        """MindSpore leaves its callbacks through here, whether training ended or was ended."""
        for opened in (self.bar, self.log):
            if opened is not None:
                opened.close()

    def _disable(self):
        """Of bars: they are for the terminal of the first rank."""
        return None if self.run.rank == 0 else True


class PanguCheckpoint(Callback):
    """Saves every `save_checkpoint_steps` steps and at the end; keeps the newest `keep_checkpoint_max`."""

    run = None

    def __init__(self, save_checkpoint_steps=100, keep_checkpoint_max=5):
        for name, value in (("save_checkpoint_steps", save_checkpoint_steps),
                            ("keep_checkpoint_max", keep_checkpoint_max)):
            if type(value) is not int or value < 1:
                raise PanguError(f"callbacks.PanguCheckpoint.{name}: found {value!r}, wanted an integer of at least 1")
        self.every, self.keep = save_checkpoint_steps, keep_checkpoint_max

    def on_train_step_end(self, run_context):
        parameters, run = run_context.original_args(), self.run
        network = parameters.train_network
        step = run.start + parameters.cur_step_num
        # Here too: whatever order the callbacks have, nothing broken is saved.
        line = {"step": step} | numbers(network.objective.part_names, parameters.net_outputs)
        check_finite(line, run, parameters.train_dataset)
        if step % self.every == 0 or step == run.steps:
            self._save(network, step)

    def _save(self, network, step):
        run, model = self.run, network.causal_lm
        ranks = replace(model.ranks, rank=run.rank)
        holds = run.rank < ranks.model.count                                    # the others are copies
        arrays = [{name: parameter.asnumpy() for name, parameter in each.items()}
                  for each in (split_parameters(network) if holds else ({}, {}))]
        if isinstance(network.optimizer, PanguMuon):
            arrays[1] |= network.optimizer.gathered_states()                    # which all ranks put together
        state = RunState(step, step * run.sequences_per_step, run.seed, run.fields)
        save_checkpoint(run.output_dir, model.config, *arrays, state, self.keep, run.tokenizer, ranks,
                        lambda: collectives.wait(model.ranks), model.adapter)


def split_parameters(network):
    """(the model's parameters, all others of a `TrainStep` but shards of states: moments, counters) by name.

    Where an adapter is trained, its parameters are in place of the model's.
    """
    weights = {parameter.name: parameter for parameter in network.causal_lm.get_parameters()
               if parameter.name != DROPOUT_CALL}
    own = network.optimizer.own_names if isinstance(network.optimizer, PanguMuon) else ()
    others = {parameter.name: parameter for parameter in network.get_parameters()
              if parameter.name not in weights and parameter.name not in own}
    if network.causal_lm.adapter:
        weights = {name: parameter for name, parameter in weights.items() if is_adapter(name)}
    return weights, others


def numbers(part_names, outputs):
    """The outputs of a step as Python numbers: loss, the parts by name, grad_norm, and of experts expert_balance."""
    total, parts, grad_norm, load = (output.asnumpy() for output in outputs)
    found = {"loss": total.item()} | dict(zip(part_names, parts.tolist())) | {"grad_norm": grad_norm.item()}
    return found | ({"expert_balance": (load.max(1) / load.mean(1)).max().item()} if load.size else {})


def check_finite(line, run, dataset):
    """`PanguError` names the first number of a step that is not finite, and the documents that made it so."""
    broken = [name for name, value in line.items() if not np.isfinite(value)]
    if broken:
        first = (line["step"] - 1) * run.sequences_per_step
        source = source_of(dataset)
        documents = [str(name) for n in range(first, first + run.sequences_per_step)
                     for name in (source.documents(n) if hasattr(source, "documents") else ())]
        raise PanguError(f"step {line['step']}: {broken[0]} is {line[broken[0]]}, with the documents "
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
