"""pangu-train before MindFormers is imported: files, options, and runs that are there already."""
import os
import sys
from types import SimpleNamespace

import pytest

import pangu_ms.training.run
from pangu_ms.errors import PanguError
from pangu_ms.training.run import command


@pytest.fixture
def train(monkeypatch):
    """Stands in for the module that imports MindFormers; holds what its `train` was called with, and found.

    The files of these tests are parts of files, whose keys `test_keys.py` is about.
    """
    called = SimpleNamespace()

    def record(*arguments):
        print("MindFormers logs")
        called.arguments, called.environment, called.path = arguments, dict(os.environ), list(sys.path)

    def evaluate(*arguments):
        record(*arguments)
        return "held-out lm 1.5"
    module = SimpleNamespace(train=record, evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "pangu_ms.training.run.mindformers", module)
    monkeypatch.setattr(pangu_ms.training.run, "mindformers", module, raising=False)
    monkeypatch.setattr(command, "prepare", lambda *_: None)
    return called


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("output_dir: out\nrunner_config: {epochs: 1}\nseed: 3\n")
    return tmp_path / "run.yaml"


def checkpoint(directory, step):
    path = directory / "out" / "checkpoints" / f"step_{step:06}" / "training"
    path.mkdir(parents=True)
    (path / "state.json").write_text(f'{{"step": {step}, "sequences": 8, "seed": 1, "fields": {{}}}}')
    return str(path.parent)


def test_options_replace_values(train, config, tmp_path):
    assert command.main(["--config", str(config), "--run_mode", "finetune", "--options", "runner_config.epochs=2",
                         "optimizer.betas=[0.9, 0.95]", "seed=5"]) == 0
    fields, output_dir, resume, state = train.arguments
    assert fields == {"output_dir": "out", "runner_config": {"epochs": 2}, "optimizer": {"betas": [0.9, 0.95]},
                      "seed": 5, "run_mode": "finetune"}
    assert (output_dir, resume, state) == (str(tmp_path / "out"), None, None)


@pytest.mark.parametrize("option, wanted", [
    ("callbacks.1.save=50", [{"type": "A"}, {"type": "B", "save": 50}]),
    ("callbacks.0.type=C", [{"type": "C"}, {"type": "B", "save": 100}]),
    ("callbacks.1={type: C}", [{"type": "A"}, {"type": "C"}]),
    ("callbacks=[]", []),
])
def test_options_replace_items_of_lists(train, config, option, wanted):
    config.write_text("callbacks: [{type: A}, {type: B, save: 100}]")
    assert command.main(["--config", str(config), "--options", option]) == 0
    assert train.arguments[0]["callbacks"] == wanted


def test_options_fill_a_section_that_is_empty(train, config):
    config.write_text("model:\n")
    assert command.main(["--config", str(config), "--options", "model.model_config.hidden_size=8"]) == 0
    assert train.arguments[0]["model"] == {"model_config": {"hidden_size": 8}}


def test_mindformers_finds_its_surroundings_and_leaves_none_behind(train, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", "the user's")
    monkeypatch.delenv("GLOG_v", raising=False)
    (tmp_path / "own").mkdir()
    environment, path, stdout = dict(os.environ), list(sys.path), sys.stdout
    assert command.main(["--config", str(config), "--register_path", "own"]) == 0
    assert train.path == [*path, str(tmp_path / "own")] and train.environment == environment | {
        "REGISTER_PATH": str(tmp_path / "own"), "LOCAL_DEFAULT_PATH": str(tmp_path / "out" / "mindformers"),
        "HF_HUB_OFFLINE": "1", "GLOG_v": "3"}
    assert (tmp_path / "out" / "mindformers" / "stdout.log").read_text() == "MindFormers logs\n"
    assert (dict(os.environ), sys.path, sys.stdout) == (environment, path, stdout) and capsys.readouterr().out == ""


def test_surroundings_are_put_back_after_a_failure_and_keep_the_users_log_level(train, config, monkeypatch):
    def fail(*_):
        assert os.environ["GLOG_v"] == "1"
        raise PanguError("no")
    monkeypatch.setenv("GLOG_v", "1")
    monkeypatch.setattr(sys.modules["pangu_ms.training.run.mindformers"], "train", fail)
    environment = dict(os.environ)
    assert command.main(["--config", str(config)]) == 2
    assert os.environ == environment


def test_resume_takes_the_newest_complete_one(train, config, tmp_path, capsys):
    newest = [checkpoint(tmp_path, step) for step in (5, 20)][-1]
    (tmp_path / "out" / "checkpoints" / "step_000030.partial").mkdir()
    assert command.main(["--config", str(config), "--resume"]) == 0
    assert train.arguments[2] == newest and train.arguments[3].step == 20
    assert f"resuming from {newest}" in capsys.readouterr().err


def test_resume_says_that_there_is_nothing_to_resume(train, config, capsys):
    assert command.main(["--config", str(config), "--resume"]) == 0
    assert train.arguments[2:] == (None, None)
    assert "no complete checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("text, options, message", [
    (None, [], "run.yaml: No such file or directory; see configs/openpangu_v2"),
    ("a: [", [], "run.yaml: not YAML: "),
    ("- a", [], "run.yaml: holds a list, wanted sections such as model:"),
    ("base_config: a.yaml", [], "base_config is not supported"),
    ("run_mode: predict", [], "run_mode is 'predict', wanted train, finetune or eval; pangu-generate --config"),
    ("a: 1", ["--options", "a"], "--options a: wanted key=value"),
    ("a: 1", ["--options", "a=["], "--options a=[: '[' is no YAML value"),
    ("a: 1", ["--options", "a=2001-99-99"], "'2001-99-99' is no YAML value"),
    ("a: 2001-99-99", [], "run.yaml: not YAML: month must be in 1..12"),
    ("a: 1", ["--options", "a.b=1"], "--options a.b=1: a is no section"),
    ("a: 1", ["--options", "a..b=1"], "--options a..b=1: wanted key=value"),
    ("a: [{}, {}]", ["--options", "a.2.b=1"], "--options a.2.b=1: a.2: no such item; a has 2, counted from 0"),
    ("a: [{}, {}]", ["--options", "a.b.c=1"], "a.b: no such item; a has 2, counted from 0"),
    ("a: {b: [1, 2]}", ["--options", "a.b.-1=1"], "a.b.-1: no such item; a.b has 2, counted from 0"),
    ("a: []", ["--options", "a.0=1"], "a.0: no such item; a has 0, counted from 0"),
    ("a: [3]", ["--options", "a.0.b=1"], "a.0 is no section in the file"),
    ("b: 1", ["--options", "a.0.b=1"], "--options a.0.b=1: a: no such list in the file"),
])
def test_wrong_input_is_one_line(train, config, text, options, message, capsys):
    config.unlink() if text is None else config.write_text(text)
    assert command.main(["--config", str(config), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pangu-train: error: ") and message in error and error.count("\n") == 1
    assert not hasattr(train, "arguments")


LOADER = "train_dataset: {{data_loader: {{type: PanguJsonlLoader, path: {}, tokenizer: {}}}}}"
INDEXED = "train_dataset: {{data_loader: {{type: PanguIndexedLoader, data_path: {}, tokenizer: known}}}}"


@pytest.mark.parametrize("text, message", [
    ("load_checkpoint: none", "load_checkpoint: none: no such directory; give one that holds a checkpoint or a run"),
    ("pretrained_model_dir: a/model", "pretrained_model_dir: a/model: no such directory"),
    (LOADER.format("none.jsonl", "own"), "train_dataset.data_loader.path: none.jsonl: is not there; give a JSONL file"),
    (LOADER.format("own", "own"), "train_dataset.data_loader.path: own: holds none; give a JSONL file"),
    (LOADER.format("run.yaml", "some/hub"), "train_dataset.data_loader.tokenizer: some/hub: is not there; give a "
                                            "directory with tokenizer.json or tokenizer.model"),
    (LOADER.format("run.yaml", "own"), "train_dataset.data_loader.tokenizer: own: holds none; give a directory with"),
    ("do_eval: True\n" + LOADER.format("none", "own").replace("train_", "eval_"),
     "eval_dataset.data_loader.path: none: is not there"),
    (LOADER.format("run.yaml", "''"), "train_dataset.data_loader.tokenizer: missing; give a directory with"),
    (INDEXED.format("none"), "data_loader.data_path: none.bin: is not there; give the path of .bin and .idx without"),
    (INDEXED.format("[1, known/c, 2, known/d]"), "data_loader.data_path: known/d.bin: is not there; give the path of"),
    (INDEXED.format("[known/c, 1]"), "data_loader.data_path: found 'known/c' before 1, wanted a positive weight"),
    (INDEXED.format("''"), "data_loader.data_path: found '', wanted the path of .bin and .idx without"),
])
def test_what_is_not_there_is_said_before_mindformers_is_imported(train, config, tmp_path, text, message, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "known").mkdir()
    for name in ("tokenizer.json", "c.bin", "c.idx"):
        (tmp_path / "known" / name).touch()
    config.write_text(text)
    assert command.main(["--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not hasattr(train, "arguments")


def test_a_resumed_run_needs_no_other_weights(train, config, tmp_path):
    checkpoint(tmp_path, 5)
    assert command.main(["--config", str(config), "--resume", "--options", "load_checkpoint=none"]) == 0


@pytest.mark.parametrize("there", ["log", "checkpoint"])
def test_another_run_is_not_written_over(train, config, tmp_path, there, capsys):
    if there == "log":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "log.jsonl").write_text("")
    else:
        checkpoint(tmp_path, 5)
    assert command.main(["--config", str(config)]) == 2
    assert "out: holds another run; go on with it by --resume" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_where_a_run_is(train, config, tmp_path, capsys):
    checkpoint(tmp_path, 5)
    assert command.main(["--config", str(config), "--run_mode", "eval", "--options", "load_checkpoint=out"]) == 0
    assert train.arguments[1] == str(tmp_path / "out") and capsys.readouterr().out == "held-out lm 1.5\n"
    assert command.main(["--config", str(config), "--run_mode", "eval", "--resume"]) == 2
    assert "--resume: nothing is trained with run_mode eval" in capsys.readouterr().err


def test_ctrl_c(train, config, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(sys.modules["pangu_ms.training.run.mindformers"], "train", interrupted)
    assert command.main(["--config", str(config)]) == 130
    assert "--resume goes on" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml" in capsys.readouterr().out
