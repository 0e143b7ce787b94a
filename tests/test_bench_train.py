"""tools/bench.py train: its arithmetic by hand, what it refuses, and one run on a model as small as they come."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bench_train import by_part, report

from pangu_ms.config import PanguConfig
from pangu_ms.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]


def test_parts_are_differences():
    parts = by_part({"forward": 2.0, "gradients": 5.0, "step": 6.5})
    assert parts == {"forward": 2.0, "backward": 3.0, "optimizer": 1.5, "step": 6.5}


@pytest.fixture
def config(small, tmp_path):
    """config(**sections): the path of a file like the toy's, with one DSA layer with experts and one MTP depth."""
    fields = read_yaml(str(ROOT / "configs" / "openpangu_v2" / "pretrain_toy_cpu.yaml"))
    fields["model"]["model_config"] = json.loads(json.dumps(small(
        num_hidden_layers=1, first_k_dense_replace=0, swa_layers=[1], sliding_window_list=[7],
        block_post_layernorm_idx=[0]).to_dict()))  # lists for tuples, as YAML has them
    fields["train_dataset"]["data_loader"]["seq_length"] = 24
    fields["runner_config"]["batch_size"] = 2

    def write(**sections):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields | sections))
        return tmp_path / "run.yaml"
    return write


def bench(*options):
    return subprocess.run([sys.executable, ROOT / "tools" / "bench.py", "train", *map(str, options)],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.parametrize("sections, options, words", [
    ({}, ("--steps", "0"), "--steps is 0: wanted at least 1"),
    ({"optimizer": {"type": "AdamW"}}, (), "optimizer.type is AdamW, wanted PanguMuon"),
    ({"optimizer": {"type": "PanguMuon", "weight_decy": 1}}, (), "optimizer.weight_decy: no such key; did you mean"),
    ({"runner_config": {}}, (), "run.yaml: lacks runner_config.batch_size"),
    ({"pangu_training": {"mtp_weight": 1}}, (), "pangu_training.mtp_weight: no such key"),
])
def test_wrong_input_is_one_line(config, sections, options, words):
    done = bench("--config", config(**sections), *options)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_train_on_a_small_model(config):
    path = config()
    done = bench("--config", path, "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["config"], found["batch_size"], found["sequence_length"], found["steps"]) == (str(path), 2, 24, 3)
    assert found["parameters"] == PanguConfig.from_dict(
        read_yaml(str(path))["model"]["model_config"]).parameter_count()["trunk_and_mtp"]
    assert all(seconds > 0.1 for seconds in found["compile_seconds"].values()) and len(found["compile_seconds"]) == 3
    seconds = found["seconds"]
    assert seconds["forward"] + seconds["backward"] + seconds["optimizer"] == pytest.approx(seconds["step"])
    assert 0 < seconds["forward"] < seconds["step"]
    assert found["tokens_per_second"]["best"] == pytest.approx(2 * 24 / seconds["step"])
    assert found["tokens_per_second"]["best"] >= found["tokens_per_second"]["median"]
    assert found["experts"]["moe_layers"] == 2 and 0 < found["experts"]["share"] < 1
    assert found["experts"]["seconds"] == pytest.approx(found["experts"]["share"] * seconds["step"])
    assert found["peak_memory_bytes"] > 100 * 2 ** 20
    assert "2 times 24 tokens, 3 steps" in report(found)
