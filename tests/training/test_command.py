"""pangu-train before MindFormers is imported: files, options, and runs that are there already."""
import sys
from types import SimpleNamespace

import pytest

import pangu_ms.training
from pangu_ms.training import command


@pytest.fixture
def train(monkeypatch):
    """Stands in for the module that imports MindFormers; holds what its `train` was called with."""
    called = SimpleNamespace()
    module = SimpleNamespace(train=lambda *arguments: setattr(called, "arguments", arguments))
    monkeypatch.setitem(sys.modules, "pangu_ms.training.mindformers", module)
    monkeypatch.setattr(pangu_ms.training, "mindformers", module, raising=False)
    for name in ("LOCAL_DEFAULT_PATH", "REGISTER_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.setattr(sys, "path", list(sys.path))
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


def test_register_path_is_importable(train, config, tmp_path):
    (tmp_path / "own").mkdir()
    assert command.main(["--config", str(config), "--register_path", "own"]) == 0
    assert str(tmp_path / "own") in sys.path


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
    ("run_mode: predict", [], "run_mode is 'predict', wanted train or finetune; pangu-generate --config"),
    ("a: 1", ["--options", "a"], "--options a: wanted key=value"),
    ("a: 1", ["--options", "a=["], "--options a=[: '[' is no YAML value"),
    ("a: 1", ["--options", "a.b=1"], "--options a.b=1: a is no section"),
])
def test_wrong_input_is_one_line(train, config, text, options, message, capsys):
    config.unlink() if text is None else config.write_text(text)
    assert command.main(["--config", str(config), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pangu-train: error: ") and message in error and error.count("\n") == 1
    assert not hasattr(train, "arguments")


@pytest.mark.parametrize("there", ["log", "checkpoint"])
def test_another_run_is_not_written_over(train, config, tmp_path, there, capsys):
    if there == "log":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "log.jsonl").write_text("")
    else:
        checkpoint(tmp_path, 5)
    assert command.main(["--config", str(config)]) == 2
    assert "out: holds another run; go on with it by --resume" in capsys.readouterr().err


def test_ctrl_c(train, config, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(sys.modules["pangu_ms.training.mindformers"], "train", interrupted)
    assert command.main(["--config", str(config)]) == 130
    assert "--resume goes on" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml" in capsys.readouterr().out
