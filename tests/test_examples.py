"""The examples run as a user runs them."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.generation.tokenizer import save_tokenizer

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
def test_02_chat(chat_directory):
    """The words are noise; the turns, the parts and the second prompt are not."""
    shown = subprocess.run([sys.executable, ROOT / "examples" / "02_chat.py", "--model", chat_directory,
                            "--num-draft-tokens", "2", "--max-new-tokens", "20"], cwd=chat_directory,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    questions = re.findall(r"^\[user\] (.*)$", shown.stdout, re.MULTILINE)
    assert questions == ["What is the capital of Peru?", "And how many people live there?"]
    assert "\n[reasoning] " in shown.stdout
