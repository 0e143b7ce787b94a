"""What a run logs, refuses and saves; the training step is stood in for by its outputs."""
import json
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from pangu_ms.errors import PanguError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run import callbacks
from pangu_ms.training.run.callbacks import PanguCheckpoint, PanguMonitor, Run

PARTS = ("lm", "mtp_1")


class Source:
    def documents(self, n):
        return [f"a{n}", f"b{n}"]


class Training:
    """A run of `steps` whose step n gives outputs(n); two sequences of five tokens a step."""

    def __init__(self, directory, outputs, steps, start=0, rate=0.5):
        network = SimpleNamespace(objective=SimpleNamespace(part_names=PARTS),
                                  optimizer=SimpleNamespace(learning_rate=rate))
        self.run = Run(str(directory), {"seed": 1}, 1, steps, start, sequences_per_step=2)
        pipeline = SimpleNamespace(children=[SimpleNamespace(children=[], source=Source())])
        self.parameters = SimpleNamespace(train_network=network, train_dataset=pipeline,
                                          train_dataset_element=(ms.Tensor(np.zeros((2, 5), np.int32)),))
        self.context = SimpleNamespace(original_args=lambda: self.parameters)
        self.outputs, self.steps, self.start = outputs, steps, start

    def __call__(self, *called):
        try:
            for callback in called:
                callback.run = self.run
                callback.on_train_begin(self.context)
            for step in range(self.start + 1, self.steps + 1):
                self.parameters.cur_step_num = step - self.start
                for callback in called:
                    callback.on_train_step_begin(self.context)
                self.parameters.net_outputs = self.outputs(step)
                for callback in called:
                    callback.on_train_step_end(self.context)
        finally:
            for callback in called:
                callback.__exit__(None, None, None)


def outputs(step, **broken):
    values = {"total": 8.0 / step, "parts": [4.0 / step, 2.0], "norm": 0.25, "load": [[1, 3], [2, 2]]} | broken
    return tuple(ms.Tensor(np.array(value, np.float32)) for value in values.values())


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_a_line_for_each_step(tmp_path):
    Training(tmp_path, outputs, 2, rate=ms.Tensor(0.5))(PanguMonitor())
    first, second = read_log(tmp_path)
    timing = {name: first.pop(name) for name in ("seconds", "tokens_per_second")}
    assert timing["tokens_per_second"] == pytest.approx(10 / timing["seconds"])
    assert first == {"step": 1, "loss": 8.0, "lm": 4.0, "mtp_1": 2.0, "grad_norm": 0.25, "expert_balance": 1.5,
                     "learning_rate": 0.5}
    assert (second["step"], second["loss"]) == (2, 4.0)


def test_the_rate_of_a_step_is_what_the_optimizer_used(tmp_path):
    """The optimizer counts from 0."""
    schedule = nn.PolynomialDecayLR(1.0, 0.0, 10, 1.0)
    Training(tmp_path, outputs, 2, rate=schedule)(PanguMonitor())
    assert [line["learning_rate"] for line in read_log(tmp_path)] == pytest.approx([1.0, 0.9])


def test_a_resumed_run_continues_the_log(tmp_path):
    """Lines of steps that are done again go, and so does half a line."""
    Training(tmp_path, outputs, 5, rate=ms.Tensor(0.5))(PanguMonitor())
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    Training(tmp_path, outputs, 4, start=2, rate=ms.Tensor(0.125))(PanguMonitor())
    assert [(line["step"], line["learning_rate"]) for line in read_log(tmp_path)] == \
        [(1, .5), (2, .5), (3, .125), (4, .125)]


@pytest.mark.parametrize("broken, message", [
    ({"parts": [1, np.nan]}, "step 3: mtp_1 is nan, with the documents a4, b4, a5, b5; "),
    ({"norm": np.inf}, "step 3: grad_norm is inf, with the documents a4, b4, a5, b5; "),
    ({"total": -np.inf, "norm": np.nan}, "step 3: loss is -inf"),
])
@pytest.mark.parametrize("order", [1, -1])
def test_a_broken_step_ends_the_run(tmp_path, monkeypatch, broken, message, order):
    """One line with the step, the part and the documents; nothing is saved, whatever the order of the callbacks."""
    saved = []
    monkeypatch.setattr(PanguCheckpoint, "_save", lambda self, network, step: saved.append(step))
    training = Training(tmp_path, lambda step: outputs(step, **broken) if step == 3 else outputs(step), 5,
                        rate=ms.Tensor(0.5))
    with pytest.raises(PanguError, match=message) as raised:
        training(*[PanguMonitor(), PanguCheckpoint(save_checkpoint_steps=1)][::order])
    assert "\n" not in str(raised.value)
    assert saved == [1, 2]
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_saves_at_its_steps_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(PanguCheckpoint, "_save", lambda self, network, step: saved.append(step))
    Training(tmp_path, outputs, 7, start=1)(PanguCheckpoint(save_checkpoint_steps=3))
    assert saved == [3, 6, 7]


def test_parameters_are_split_into_weights_and_the_rest(tmp_path, monkeypatch):
    """Weights under the model's names, whatever the optimizer keeps besides, and the cursor."""
    given = {}
    monkeypatch.setattr(callbacks, "save_checkpoint", lambda *arguments: given.update(enumerate(arguments[:7])))
    training = Training(tmp_path, outputs, 3)
    weight, moment = (ms.Parameter(ms.Tensor(np.full(2, value, np.float32)), name=name)
                      for name, value in (("w", 1), ("m.w", 2)))
    network = training.parameters.train_network
    network.causal_lm = SimpleNamespace(get_parameters=lambda: [weight], config="config", ranks=Ranks(), adapter=None)
    network.get_parameters = lambda: [weight, moment]
    training(PanguCheckpoint(save_checkpoint_steps=100, keep_checkpoint_max=2))
    directory, config, weights, optimizer, state, keep, tokenizer = given.values()
    assert (directory, config, keep, tokenizer) == (str(tmp_path), "config", 2, None)
    assert {name: values.tolist() for name, values in weights.items()} == {"w": [1, 1]}
    assert {name: values.tolist() for name, values in optimizer.items()} == {"m.w": [2, 2]}
    assert (state.step, state.sequences, state.seed, state.fields) == (3, 6, 1, {"seed": 1})


@pytest.mark.parametrize("options", [{"save_checkpoint_steps": 0}, {"keep_checkpoint_max": "5"}])
def test_bad_options(options):
    with pytest.raises(PanguError, match=f"callbacks.PanguCheckpoint.{next(iter(options))}: found .* wanted an int"):
        PanguCheckpoint(**options)
