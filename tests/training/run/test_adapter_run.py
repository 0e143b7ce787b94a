"""pangu-train with model.pet_config: an adapter alone is trained and kept, and its run goes on where it was ended."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from toy_tokenizer import train_tokenizer

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import checkpoints
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.yaml_file import read_yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STEPS, STOPPED = 5, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory, one_layer):
    """A directory to run in: run.yaml, chats, a tokenizer, and base/, a model of random values."""
    directory = tmp_path_factory.mktemp("adapter")
    words = np.random.default_rng(0).integers(0, 50, (STEPS * 8, 12))
    texts = [" ".join(f"word{word}" for word in row) for row in words.tolist()]
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 268, str(directory / "tokenizer"))
    config, draw = config_from_dict(one_layer), np.random.default_rng(1)
    (directory / "base").mkdir()
    config.save_pretrained(directory / "base")
    save_file({name: draw.normal(0, 0.05, p.shape).astype(np.float32) for name, p in parameters(config).items()},
              directory / "base" / "model.safetensors")
    fields = read_yaml(str(ROOT / "configs" / "openpangu_v2" / "finetune_toy_lora_cpu.yaml"))
    fields["load_checkpoint"] = "base"
    fields["model"]["pet_config"] |= {"lora_dropout": 0.3,
                                      "target_modules": r".*(self_attn\.\w+_proj|experts\.\d+\.\w+)"}
    fields["train_dataset"]["data_loader"] |= {"path": "texts.jsonl", "tokenizer": "tokenizer", "seq_length": 24,
                                               "documents": "texts"}
    fields["runner_config"] |= {"epochs": 1, "batch_size": 4}
    fields["lr_schedule"]["total_steps"] = 20
    fields["callbacks"] += [{"type": "TrainCallBack", "stop_step": STEPS}]
    (directory / "run.yaml").write_text(yaml.safe_dump(fields))
    return directory


def run(directory, *options):
    """One graph serves all: MindSpore keeps it beside the directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MS_COMPILER_CACHE_ENABLE": "1",
                                "MS_COMPILER_CACHE_PATH": f"{directory}_graph"}
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "train.py"), "--config", "run.yaml", *options],
                          cwd=directory, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def files(path):
    return {name: load_file(Path(path) / name) for name in ("adapter_model.safetensors",
                                                            "training/optimizer.safetensors")}


def test_an_adapter_is_trained_saved_and_resumed(directory):
    """The resumed run ends with the uninterrupted one's numbers, and what it saved is the base's adapter."""
    base = (directory / "base" / "model.safetensors").read_bytes()
    assert "parameters of the adapter are trained" in run(directory, "--options", "output_dir=whole",
                                                          "callbacks.1.save_checkpoint_steps=5")
    short = ("output_dir=short", "callbacks.1.save_checkpoint_steps=1")
    run(directory, "--options", *short, f"callbacks.2.stop_step={STOPPED}")
    assert checkpoints(str(directory / "short"))[-1].endswith(f"step_{STOPPED:06}")
    run(directory, "--resume", "--options", *short, f"callbacks.2.stop_step={STEPS - STOPPED}")
    whole, short = (checkpoints(str(directory / name))[-1] for name in ("whole", "short"))
    assert Path(whole).name == Path(short).name == f"step_{STEPS:06}"
    for one, other in zip(files(whole).values(), files(short).values()):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)
    assert hashlib.sha256(base).digest() == hashlib.sha256((directory / "base/model.safetensors").read_bytes()).digest()

    fields = json.loads((Path(whole) / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (
        str(directory / "base"), 8, 16, 0.3)
    weights, optimizer = files(whole).values()
    assert not [name for name in weights if ".lora_" not in name] and "config.json" not in os.listdir(whole)
    assert {name.split(".")[0] for name in optimizer if "lora_A" in name} == {"adam_m", "adam_v"}
    assert not [name for name in optimizer if ".weight" in name and ".lora_" not in name]
    assert optimizer["lora_dropout_call"].tolist() == [-STEPS]

    expert = "model.layers.0.mlp.experts.3.up_proj"
    down, up = (weights[f"base_model.model.{expert}.lora_{kind}.weight"] for kind in "AB")
    assert np.abs(up).max() > 0
    config = config_from_dict(json.loads((directory / "base" / "config.json").read_text()))
    with read_parameters(directory / "base", config, adapter=directory / "short") as merged:
        found = dict(merged)["model.layers.0.mlp.experts.up_proj.weight"][3]
    before = load_file(directory / "base" / "model.safetensors")["model.layers.0.mlp.experts.up_proj.weight"][3]
    np.testing.assert_allclose(found, before + 2 * up @ down, atol=1e-6)
