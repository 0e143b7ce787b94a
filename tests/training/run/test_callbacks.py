"""What a run logs, refuses and saves; the training step is stood in for by its outputs."""
import json
import os
import signal
import sys
import threading
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from pangu_ms.errors import PanguError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.run import callbacks
from pangu_ms.training.run.callbacks import PanguCheckpoint, PanguMonitor, Run
from pangu_ms.training.run.held_out import HeldOut
from pangu_ms.training.run.keys import read_keys

PARTS = ("lm", "mtp_1")


@pytest.fixture(autouse=True)
def measures(monkeypatch):
    """tests/training/run/test_measures.py has the numbers that come from here."""
    monkeypatch.setattr(callbacks, "Measures", lambda network, device: lambda outputs, length, rate: {"tflops": 0.5})


class Source:
    def documents(self, n):
        return [f"a{n}", f"b{n}"]


class Training:
    """A run of `steps` whose step n gives outputs(n); two sequences of five tokens a step."""

    def __init__(self, directory, outputs, steps, start=0, rate=0.5, **options):
        network = SimpleNamespace(objective=SimpleNamespace(part_names=PARTS),
                                  optimizer=SimpleNamespace(learning_rate=rate))
        self.run = Run(str(directory), {"seed": 1}, 1, steps, start, sequences_per_step=2, **options)
        pipeline = SimpleNamespace(children=[SimpleNamespace(children=[], source=Source())])
        self.parameters = SimpleNamespace(train_network=network, train_dataset=pipeline,
                                          train_dataset_element=(ms.Tensor(np.zeros((2, 5), np.int32)),))
        self.context = SimpleNamespace(original_args=lambda: self.parameters)
        self.outputs, self.steps, self.start = outputs, steps, start
        self.run.held_out, self.run.evaluation = HeldOut({}, step_interval=2), Evaluation()

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
                callback.__exit__(*sys.exc_info())


class Evaluation:
    sequences, tokens = 3, 12

    def __call__(self):
        return {"lm": 1.5, "perplexity": 4.5}


def outputs(step, **broken):
    values = {"total": 8.0 / step, "parts": [4.0 / step, 2.0], "norm": 0.25, "load": [[1, 3], [2, 2]],
              "squares": [0.0625]} | broken
    return tuple(ms.Tensor(np.array(value, np.float32)) for value in values.values())


def test_the_largest_logit_is_a_number_where_the_step_gives_logits():
    assert "largest_attention_logit" not in callbacks.numbers(PARTS, outputs(1))
    assert callbacks.numbers(PARTS, outputs(1, largest=[[1, 7], [2, -9]]))["largest_attention_logit"] == 7


def read_log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_a_line_for_each_step(tmp_path):
    Training(tmp_path, outputs, 2, rate=ms.Tensor(0.5))(PanguMonitor())
    first, second = read_log(tmp_path)
    timing = {name: first.pop(name) for name in ("seconds", "seconds/data", "tokens_per_second", "tflops")}
    assert timing["tokens_per_second"] == pytest.approx(10 / timing["seconds"]) and timing["tflops"] == 0.5
    assert first == {"step": 1, "loss": 8.0, "lm": 4.0, "mtp_1": 2.0, "grad_norm": 0.25, "expert_balance": 1.5,
                     "learning_rate": 0.5}
    assert (second["step"], second["loss"]) == (2, 4.0)


def test_an_evaluation_is_in_the_line_of_its_step(tmp_path, capsys):
    """Every second step, and the last one."""
    Training(tmp_path, outputs, 5, rate=ms.Tensor(0.5))(PanguMonitor())
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if "eval/lm" in line] == [2, 4, 5]
    assert (lines[1]["eval/lm"], lines[1]["eval/perplexity"]) == (1.5, 4.5) and lines[1]["seconds/evaluation"] >= 0
    assert "step 2: held-out lm 1.5000 perplexity 4.5000 (3 sequences, 12 tokens)\n" in capsys.readouterr().err


def test_seconds_are_those_of_the_step_alone(tmp_path, monkeypatch):
    """Whatever the order of the callbacks; a checkpoint's are in the line of the step that waited for it."""
    clock = iter(range(1000))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(PanguCheckpoint, "_save", lambda self, network, step: [next(clock) for _ in range(20)])
    for name, order in (("after", 1), ("before", -1)):
        Training(tmp_path / name, outputs, 3, rate=ms.Tensor(0.5))(
            *[PanguMonitor(), PanguCheckpoint(save_checkpoint_steps=2)][::order])
        first, second, third = read_log(tmp_path / name)
        assert all(line["seconds"] < 5 and line["seconds/data"] < 5 for line in (first, second, third))
        saved = (second, third) if order < 0 else (third,)
        assert [line.get("seconds/checkpoint") for line in saved] == [21.0] * len(saved)
        assert "seconds/checkpoint" not in first


def test_without_a_terminal_a_line_tells_now_and_then(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])

    def slowly(step):
        now[0] += 10
        return outputs(step)
    Training(tmp_path, slowly, 9, rate=ms.Tensor(0.5))(PanguMonitor())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ") and " of 9: " in line]
    assert [line.split()[1] for line in said] == ["2", "6", "9"]
    assert said[0] == ("step 2 of 9: loss 4.000 lm 2.000 mtp_1 2.000 lr 5.00e-01 norm 0.25 balance 1.50 1 tok/s, "
                       "01:10 left")


def events(directory):
    """What TensorBoard reads: {tag: [(step, value), ...]}, and the first event that says where a run went on."""
    from tensorboardX.proto.event_pb2 import Event
    found, begun = {}, []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:                                                          # length, its checksum, event, checksum
            length = int.from_bytes(content[:8], "little")
            event, content = Event.FromString(content[12:12 + length]), content[16 + length:]
            begun += [event.step] * (event.session_log.status == 1)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found, begun


def test_tensorboard_gets_every_number_of_a_line(tmp_path):
    def train(steps, start, **section):
        training = Training(tmp_path, outputs, steps, start, ms.Tensor(0.5))
        training.run.tensorboard = {"tensorboard_dir": str(tmp_path / "curves"), **section}
        training(PanguMonitor())
    train(3, 0)
    found, _ = events(tmp_path / "curves" / "rank_0")
    assert found["loss"] == [(1, 8), (2, 4), (3, pytest.approx(8 / 3))] and found["eval/lm"] == [(2, 1.5), (3, 1.5)]
    assert found.keys() == {name for line in read_log(tmp_path) for name in line} - {"step"}
    train(3, 2, log_timers_to_tensorboard=False, log_expert_load_to_tensorboard=False)
    again, begun = events(tmp_path / "curves" / "rank_0")
    assert begun == [3] and len(again["loss"]) == 4                             # the first run's step 3 is not shown
    assert all(again[name] == found[name] for name in ("seconds", "tflops", "expert_balance"))


@pytest.mark.parametrize("section, message", [
    ("runs", "tensorboard: found 'runs', wanted a section"),
    ({"tensorboard_directory": "runs"}, "tensorboard.tensorboard_directory: no such key; did you mean tensorboard_dir"),
    ({"tensorboard_dir": 3}, "tensorboard_dir: found 3, wanted text"),
    ({"tensorboard_dir": "x", "tensorboard_queue_size": 0}, "queue_size: found 0, wanted an integer of at least 1"),
    ({"log_timers_to_tensorboard": 1}, "log_timers_to_tensorboard: found 1, wanted True or False"),
    ({"log_loss_scale_to_tensorboard": True}, "log_loss_scale_to_tensorboard: found True, wanted False: no loss is"),
])
def test_wrong_keys_of_tensorboard(section, message):
    with pytest.raises(PanguError, match=message):
        read_keys({"tensorboard": section})


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


NAN = {"total": np.nan, "parts": [np.nan, 1], "norm": np.inf}


def test_steps_in_a_row_may_be_skipped(tmp_path, monkeypatch):
    """As many as are allowed, and after each that is finite as many again; their line says what had no number."""
    saved = []
    monkeypatch.setattr(PanguCheckpoint, "_save", lambda self, network, step: saved.append(step))
    training = Training(tmp_path, lambda step: outputs(step, **(NAN if step in (2, 3, 5, 6, 7) else {})), 9,
                        rate=ms.Tensor(0.5), skip_nonfinite=2)
    with pytest.raises(PanguError, match="step 7: loss is nan, with the documents a12, b12, a13, b13"):
        training(PanguCheckpoint(save_checkpoint_steps=1), PanguMonitor())
    lines = read_log(tmp_path)
    assert [line.get("skipped") for line in lines] == [None, 1, 2, None, 1, 2] and saved == [1, 2, 3, 4, 5, 6]
    assert [lines[1][name] for name in ("loss", "lm", "mtp_1", "grad_norm")] == [None, None, 1, None]
    assert lines[1]["learning_rate"] == 0.5


def test_a_part_alone_that_is_not_finite_was_not_skipped(tmp_path):
    """The step looks at the loss and the norm, and has changed the parameters."""
    with pytest.raises(PanguError, match="step 1: mtp_1 is nan"):
        Training(tmp_path, lambda step: outputs(step, parts=[1, np.nan]), 2, rate=ms.Tensor(0.5), skip_nonfinite=2)(
            PanguMonitor())


def test_a_batch_that_grows_is_counted_by_step(tmp_path, monkeypatch):
    states, ramp = [], ByStep((0, 2), (2, 6))
    monkeypatch.setattr(callbacks, "save_checkpoint", lambda *arguments, **_: states.append(arguments[4]))
    monkeypatch.setattr(callbacks, "split_parameters", lambda network: ({}, {}))
    training = Training(tmp_path, lambda step: outputs(step, **(NAN if step == 4 else {})), 4, rate=ms.Tensor(0.5),
                        batch_ramp=ramp)
    training.parameters.train_network.causal_lm = SimpleNamespace(config="config", ranks=Ranks(), adapter=None)
    with pytest.raises(PanguError, match="step 4: loss is nan, with the documents a10, b10, .*, a15, b15; "):
        training(PanguMonitor(), PanguCheckpoint(save_checkpoint_steps=1))
    assert [state.sequences for state in states] == [2, 4, 10]
    tokens = [line["tokens_per_second"] * line["seconds"] for line in read_log(tmp_path)]
    assert tokens == pytest.approx([10, 10, 30])


def test_saves_at_its_steps_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(PanguCheckpoint, "_save", lambda self, network, step: saved.append(step))
    Training(tmp_path, outputs, 7, start=1)(PanguCheckpoint(save_checkpoint_steps=3))
    assert saved == [3, 6, 7]


def test_parameters_are_split_into_weights_and_the_rest(tmp_path, monkeypatch):
    """Weights under the model's names, whatever the optimizer keeps besides, and the cursor."""
    given = {}
    monkeypatch.setattr(callbacks, "save_checkpoint", lambda *arguments, **_: given.update(enumerate(arguments[:7])))
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
    weight.set_data(ms.Tensor(np.zeros(2, np.float32)))
    ms.ops.assign_add(moment, ms.Tensor(np.ones(2, np.float32)))
    assert (weights["w"].tolist(), optimizer["m.w"].tolist()) == ([1, 1], [2, 2])  # what a thread may still write


@pytest.mark.parametrize("broken, message", [({}, "^the disk is full$"), ({"norm": np.inf}, "step 3: grad_norm is")])
def test_what_the_thread_could_not_write_ends_the_run(tmp_path, monkeypatch, capsys, broken, message):
    """At the next step or at the end; where something else has ended the run, it is said besides."""
    def save_checkpoint(*arguments, start, **_):
        def work():
            raise PanguError("the disk is full")
        start("writing", work)

    monkeypatch.setattr(callbacks, "save_checkpoint", save_checkpoint)
    training = Training(tmp_path, lambda step: outputs(step, **broken) if step == 3 else outputs(step), 9,
                        rate=ms.Tensor(0.5))
    network, checkpoint = training.parameters.train_network, PanguCheckpoint(save_checkpoint_steps=2)
    network.causal_lm = SimpleNamespace(get_parameters=lambda: [], config="config", ranks=Ranks(), adapter=None)
    network.get_parameters = lambda: []
    with pytest.raises(PanguError, match=message):
        training(PanguMonitor(), checkpoint)
    assert len(read_log(tmp_path)) <= 4
    assert capsys.readouterr().err.count("pangu-train: the disk is full") == len(broken)


def test_ctrl_c_waits_for_what_is_written(tmp_path, monkeypatch):
    """MindSpore answers Ctrl-C with SIGTERM, which would end the process."""
    written, go, terminate = [], threading.Event(), signal.getsignal(signal.SIGTERM)

    def interrupted(step):
        if step == 2:
            threading.Timer(0.1, go.set).start()
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs(step)

    monkeypatch.setattr(callbacks, "save_checkpoint",
                        lambda *_, start, **__: start("", lambda: written.append(go.wait())))
    training = Training(tmp_path, interrupted, 9)
    network = training.parameters.train_network
    network.causal_lm = SimpleNamespace(get_parameters=lambda: [], config="config", ranks=Ranks(), adapter=None)
    network.get_parameters = lambda: []
    with pytest.raises(KeyboardInterrupt):
        training(PanguCheckpoint(save_checkpoint_steps=1))
    assert written == [True] and signal.getsignal(signal.SIGTERM) is terminate


@pytest.mark.parametrize("options", [{"save_checkpoint_steps": 0}, {"keep_checkpoint_max": "5"}, {"async_save": "no"}])
def test_bad_options(options):
    with pytest.raises(PanguError, match=f"callbacks.PanguCheckpoint.{next(iter(options))}: found .* wanted (an |T)"):
        PanguCheckpoint(**options)
