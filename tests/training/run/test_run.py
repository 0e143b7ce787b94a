"""Whole runs of pangu-train, each a process of its own: a model as small as they come.

A DSA layer with experts and a sliding MTP layer. Runs with the same graph compile it once, if they say so: most of what
such a run takes is compiling.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_tokenizer import train_tokenizer

from pangu_ms.checkpoint.directory import checkpoints
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.run.state import read_checkpoint, read_state
from pangu_ms.yaml_file import read_yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STEPS = 40
TIMING = ("seconds", "tokens_per_second", "tflops")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, one_layer):
    """A directory to run in: run.yaml, texts and a tokenizer."""
    directory = tmp_path_factory.mktemp("run")
    words = np.random.default_rng(0).integers(0, 50, (60, 12))
    texts = [" ".join(f"word{word}" for word in row) for row in words.tolist()]
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 268, str(directory / "tokenizer"))
    fields = read_yaml(str(ROOT / "configs" / "openpangu_v2" / "pretrain_toy_cpu.yaml"))
    fields["model"]["model_config"] = one_layer
    fields["train_dataset"]["data_loader"].update(path="texts.jsonl", tokenizer="tokenizer", seq_length=24)
    fields["eval_dataset"]["data_loader"].update(path="texts.jsonl", tokenizer="tokenizer", seq_length=24)
    fields["runner_config"].update(epochs=3, batch_size=4)
    fields["callbacks"][1].update(save_checkpoint_steps=3)
    fields["lr_schedule"]["total_steps"] = STEPS
    (directory / "run.yaml").write_text(yaml.safe_dump(fields))
    return directory


def start(directory, *options, same_graph=False):
    """`same_graph` as the uninterrupted run's: MindSpore keeps it beside the directory. It does not check that well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if same_graph:
        environment |= {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": f"{directory}_graph"}
    return subprocess.Popen([sys.executable, str(ROOT / "tools" / "train.py"), "--config", "run.yaml", *options],
                            cwd=directory, env=environment, stderr=subprocess.PIPE, text=True)


def run(directory, *options, same_graph=False):
    process = start(directory, *options, same_graph=same_graph)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return error


def read_log(directory, name):
    lines = [json.loads(line) for line in (directory / name / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMING)} for line in lines]


@pytest.fixture(scope="module")
def whole(directory):
    """The log of a run that nothing interrupts."""
    run(directory, "--options", "output_dir=whole", same_graph=True)
    return read_log(directory, "whole")


def test_a_run_learns_and_leaves_nothing_outside_its_directory(directory, whole):
    assert [line["step"] for line in whole] == list(range(1, len(whole) + 1)) and len(whole) > STEPS
    assert np.mean([line["lm"] for line in whole[-5:]]) < 0.8 * whole[0]["lm"]
    assert {entry.name for entry in directory.iterdir()} <= {"run.yaml", "texts.jsonl", "tokenizer", "whole", "killed"}
    assert [Path(path).name for path in checkpoints(str(directory / "whole"))][-1] == f"step_{len(whole):06}"


def test_a_killed_run_ends_as_if_nothing_had_happened(directory, whole):
    """kill -9 at two steps; the log is the uninterrupted one digit for digit, and so are the parameters."""
    steps = sorted(random.sample(range(2, STEPS - 10), 2))
    for step in steps:
        process = start(directory, "--resume", "--options", "output_dir=killed", same_graph=True)
        log = directory / "killed" / "log.jsonl"
        while not (log.exists() and log.read_bytes().count(b"\n") >= step) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        error = process.communicate()[1]
        assert process.returncode == -9, error
    run(directory, "--resume", "--options", "output_dir=killed", same_graph=True)
    assert read_log(directory, "killed") == whole, steps
    ends = [read_checkpoint(checkpoints(str(directory / name))[-1]) for name in ("whole", "killed")]
    for found, wanted in zip(*ends):
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])


def test_a_stage_goes_on_with_moments_and_a_batch_that_grows(directory, whole):
    """Of other sequences, by steps of its own; killed and resumed it makes the same steps."""
    options = ("--options", "output_dir=stage", "load_checkpoint=whole", "load_optimizer=True", "seed=2",
               "train_dataset.data_loader.seq_length=32", "callbacks.1.save_checkpoint_steps=2",
               "runner_config={epochs: 1, batch_size: 2, sink_mode: false}", "pangu_training.skip_nonfinite=2",
               "pangu_training.batch_ramp=[[0, 2], [2, 6]]",
               "pangu_training.router_bias_update_rate=[[0, 1.e-2], [3, 0]]",
               "lr_schedule={type: WarmUpStableDecayLR, learning_rate: 1.e-3, warmup_steps: 0, decay_start_steps: 0}")
    run(directory, *options)
    stage, last = read_log(directory, "stage"), checkpoints(str(directory / "stage"))[-1]
    assert stage[0]["learning_rate"] == pytest.approx(1e-3) and stage[-1]["learning_rate"] < 1e-3 / 3
    assert stage[0]["lm"] < 0.9 * whole[0]["lm"] and len(stage) > 5
    assert read_state(last).sequences == 2 * 2 + 6 * (len(stage) - 2)
    for name, count in (("whole", len(whole)), ("stage", len(stage))):
        (_, states) = read_checkpoint(checkpoints(str(directory / name))[-1])
        assert states["global_step"] == count
    assert states["adam_beta2_power"] == pytest.approx(0.95 ** (len(whole) + len(stage)), rel=1e-4)
    shutil.rmtree(last)
    run(directory, "--resume", *options)
    assert read_log(directory, "stage") == stage


def test_a_finished_run_says_so(directory, whole):
    process = start(directory, "--resume", "--options", "output_dir=whole")
    error = process.communicate()[1]
    assert process.returncode == 2 and f"has made all of its {len(whole)} steps" in error, error


def test_weights_go_on_into_another_run(directory, whole):
    """finetune from a run: its newest checkpoint, which MindFormers' own AdamW trains further on columns that its own
    loader reads from a MindRecord file, each step in two halves. Its loss on the texts is evaluated, too."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(directory / "whole" / "data.mindrecord"), overwrite=True)
    writer.add_schema({name: {"type": "float32" if name == "loss_mask" else "int32", "shape": [24]}
                       for name in ("input_ids", "labels", "loss_mask", "position_ids")})
    tokenizer, lines = Tokenizer(directory / "tokenizer"), (directory / "texts.jsonl").read_text().splitlines()
    for line in lines[:10]:
        ids = np.array(tokenizer.encode(json.loads(line)["text"])[:25], np.int32)
        writer.write_raw_data([{"input_ids": ids[:-1], "labels": ids[1:], "loss_mask": np.ones(24, np.float32),
                                "position_ids": np.arange(24, dtype=np.int32)}])
    writer.commit()
    run(directory, "--run_mode", "finetune", "--options", "output_dir=further", "load_checkpoint=whole",
        "optimizer={type: AdamW, betas: [0.9, 0.95], eps: 1.e-8, weight_decay: 0.1}",
        "train_dataset.data_loader={type: MindDataset, dataset_dir: whole/data.mindrecord, shuffle: false}",
        "runner_config.batch_size=2", "runner_config.gradient_accumulation_steps=2", "do_eval=True",
        "eval_step_interval=5")
    further = read_log(directory, "further")
    assert len(further) == 3 * 10 // 4 - 1  # each epoch drops its remainder
    assert further[0]["lm"] < 0.9 * whole[0]["lm"]
    assert np.mean([line["lm"] for line in further[-2:]]) < further[0]["lm"]
    evaluated = {line["step"]: line["eval/lm"] for line in further if "eval/lm" in line}
    assert list(evaluated) == [5, 6] and evaluated[6] == pytest.approx(whole[-1]["lm"], rel=0.2)
