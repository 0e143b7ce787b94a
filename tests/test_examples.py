"""The examples run as a user runs them."""
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_01_generate(tmp_path):
    shown = subprocess.run([sys.executable, ROOT / "examples" / "01_generate.py"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "RANDOM weights" in shown.stdout
    assert re.search(r"^  dsa +2 of 4 ", shown.stdout, re.MULTILINE)
    assert re.search(r"^parameters: 199,005 in the trunk, 122,604 in the MTP layers", shown.stdout, re.MULTILINE)
    new_ids = re.search(r"64 greedy ones:\n([\d ]+)\n", shown.stdout)[1].split()
    assert len(new_ids) == 64 and all(0 <= int(i) < 199 for i in new_ids)
    for phase in ("prefill", "decode"):
        speed = re.search(rf"^  {phase} +([\d,]+) tokens a second$", shown.stdout, re.MULTILINE)[1]
        assert int(speed.replace(",", "")) > 0


@pytest.mark.slow
def test_02_chat(tmp_path):
    shown = subprocess.run([sys.executable, ROOT / "examples" / "02_chat.py", "--max-new-tokens", "30"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("[user] What is the capital of Peru?\n[reasoning] The country is Peru.")
    questions = re.findall(r"^\[user\] (.*)$", shown.stdout, re.MULTILINE)
    assert questions == ["What is the capital of Peru?", "And how many people live there?"]


def test_05_goes_on_where_it_was(tmp_path, monkeypatch):
    """Interrupted before its first checkpoint, too; what has ended is not begun again, nor taken for another length."""
    example, commands = import_module("05_train_toy"), []

    def run(directory, *command):
        (directory / "output").mkdir(exist_ok=True)
        commands.append(command)

    monkeypatch.setattr(example, "run", run)

    def train(steps):
        commands.clear()
        example.train(tmp_path, "run.yaml", "output", steps)
        return [word for command in commands for word in command[1:]]

    config = ["--config", example.CONFIGS / "run.yaml"]
    assert train(None) == config and train(None) == []
    (tmp_path / "output" / "finished").unlink()
    assert train(2)[:3] == [*config, "--resume"]
    callbacks = yaml.safe_load(commands[0][-1].removeprefix("callbacks="))
    assert [callback["type"] for callback in callbacks] == ["PanguMonitor", "PanguCheckpoint", "TrainCallBack"]
    assert callbacks[1]["save_checkpoint_steps"] == callbacks[2]["stop_step"] == 2
    with pytest.raises(SystemExit, match="output: ended with --steps 2; choose another --directory"):
        train(None)
