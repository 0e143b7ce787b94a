"""The examples run as a user runs them."""
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.text.byte_tokenizer import save_tokenizer

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


@pytest.fixture
def chat_directory(data, tmp_path):
    """The tiny checkpoint with a chat tokenizer, its vocabulary padded to more rows than the tokenizer has."""
    vocab_size = save_tokenizer(tmp_path) + 16
    config = json.loads((data / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(
        config | {"vocab_size": vocab_size, "bos_token_id": 296, "eos_token_id": 297}))
    random = np.random.default_rng(0)
    tensors = load_file(data / "tiny" / "model.safetensors")
    shared = {side: random.normal(0, 1, (vocab_size, config["hidden_size"])).astype(np.float32)
              for side in ("embed_tokens.weight", "head.weight")}
    for name in tensors:
        for side in shared:
            if name.endswith(side):  # the MTP layers repeat those of the trunk
                tensors[name] = shared[side]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.slow
def test_02_chat_with_the_toy(tmp_path):
    shown = subprocess.run([sys.executable, ROOT / "examples" / "02_chat.py", "--max-new-tokens", "30"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("[user] What is the capital of Peru?\n[reasoning] The country is Peru.")


@pytest.mark.slow
def test_02_chat(chat_directory):
    """The words are noise; the turns, the parts and the second prompt are not."""
    shown = subprocess.run([sys.executable, ROOT / "examples" / "02_chat.py", "--model", chat_directory,
                            "--num-draft-tokens", "2", "--max-new-tokens", "20"], cwd=chat_directory,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    questions = re.findall(r"^\[user\] (.*)$", shown.stdout, re.MULTILINE)
    assert questions == ["What is the capital of Peru?", "And how many people live there?"]
    assert "\n[reasoning] " in shown.stdout


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
