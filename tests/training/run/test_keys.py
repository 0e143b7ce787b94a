"""No key of MindFormers without effect: the table of keys, what it says of MindFormers' own files, and its messages."""
import copy
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.run import command
from pangu_ms.training.run.fields import prepare
from pangu_ms.training.run.key_page import page
from pangu_ms.training.run.key_table import CALLBACKS, DATASET, KEYS, LR_TYPES, OPTIMIZERS, WRAPPERS
from pangu_ms.training.run.keys import read_keys
from pangu_ms.yaml_file import read_yaml
from pangu_ms.yaml_keys import Applied, Refused, Section

ROOT = Path(__file__).parents[3]
TOY = read_yaml(str(ROOT / "configs" / "openpangu_v2" / "pretrain_toy_cpu.yaml"))


def changed(**values):
    """The toy file with values by dotted key ("__" for the dot)."""
    fields = copy.deepcopy(TOY)
    for key, value in values.items():
        section, *inner = fields, *key.split("__")
        for name in inner[:-1]:
            section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
        section[inner[-1]] = value
    return fields


@pytest.mark.parametrize("values, message", [
    # no such key
    ({"lr_schedule__lerning_rate": 1e-3}, "lr_schedule.lerning_rate: no such key; did you mean learning_rate?"),
    ({"runner_config__bacth_size": 4}, "runner_config.bacth_size: no such key; did you mean batch_size?"),
    ({"context__device_taget": "CPU"}, "context.device_taget: no such key; did you mean device_target?"),
    ({"context__jit_config": {"jit_levl": "O0"}}, "context.jit_config.jit_levl: no such key; did you mean jit_level?"),
    ({"callbacks__1__save_chekpoint_steps": 1}, "save_chekpoint_steps: no such key; did you mean save_"),
    ({"use_paralel": True}, "use_paralel: no such key; did you mean use_parallel?"),
    ({"zzz": 1}, "zzz: no such key; leave it out"),
    ({"train_dataset__data_loader__num_shards": 2}, "data_loader.num_shards: no such key"),
    # values
    ({"lr_schedule__learning_rate": "fast"}, "lr_schedule.learning_rate: found 'fast', wanted a number of at least 0"),
    ({"lr_schedule__learning_rate": True}, "lr_schedule.learning_rate: found True, wanted a number"),
    ({"lr_schedule__learning_rate": ".inf"}, "lr_schedule.learning_rate: found '.inf', wanted a number"),
    ({"lr_schedule__learning_rate": float("nan")}, "lr_schedule.learning_rate: found nan, wanted a number"),
    ({"lr_schedule": {"type": "cosine"}}, "lr_schedule.learning_rate: missing, wanted a number of at least 0"),
    ({"lr_schedule__warmup_ratio": 2}, "lr_schedule.warmup_ratio: found 2, wanted a number from 0 to 1"),
    ({"lr_schedule__warmup_steps": 10}, "lr_schedule.warmup_steps: found beside warmup_ratio, .*give one"),
    ({"lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1, "lr_end": 0}},
     "lr_schedule.lr_end: found 0, wanted none: ConstantWarmUpLR does not read it"),
    ({"lr_schedule": {"type": "linear", "learning_rate": 1}}, "lr_schedule.warmup_steps: missing; give it or warmup_r"),
    ({"lr_schedule": {"type": "WarmUpStableDecayLR", "learning_rate": 1, "warmup_steps": 1}},
     "lr_schedule.decay_start_steps: missing; give it or decay_start_ratio"),
    ({"lr_schedule": {"type": "WarmUpStableDecayLR", "learning_rate": 1, "lr_end": 1, "warmup_steps": 1,
                      "decay_start_ratio": 0.9}}, "lr_schedule.lr_end: found 1.0, wanted less than learning_rate 1.0"),
    ({"lr_schedule": None}, "lr_schedule: found None, wanted a section"),
    ({"runner_wrapper__max_grad_norm": -1}, "runner_wrapper.max_grad_norm: found -1, wanted a number above 0"),
    ({"runner_wrapper__use_clip_grad": "yes please"}, "use_clip_grad: found 'yes please', wanted True or False"),
    ({"runner_config__batch_size": 4.5}, "runner_config.batch_size: found 4.5, wanted an integer of at least 1"),
    ({"runner_config__epochs": 1.5}, "runner_config.epochs: found 1.5, wanted an integer of at least 1"),
    ({"runner_config__epochs": "2"}, "runner_config.epochs: found '2', wanted an integer"),
    ({"seed": "one"}, "seed: found 'one', wanted an integer from 0 to 4294967295"),
    ({"run_mode": "evaluate"}, "run_mode: found 'evaluate', wanted 'train' or 'finetune' or 'eval'"),
    ({"run_mode": "eval"}, "run_mode: found eval without weights; give load_checkpoint"),
    ({"optimizer__adamw_betas": [0.9]}, "optimizer.adamw_betas: found .0.9., wanted two numbers"),
    ({"optimizer__ns_coefficients": [[1, 2]]}, "optimizer.ns_coefficients: found .* wanted a list of steps"),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay: found -0.1, wanted a number of at least 0"),
    ({"train_dataset__data_loader__seq_length": "4k"}, "seq_length: found '4k', wanted an integer of at least 1"),
    ({"context__max_device_memory": 58}, "context.max_device_memory: found 58, wanted such as 58GB"),
    ({"context__device_target": "GPU"}, "context.device_target: found 'GPU', wanted Ascend or CPU"),
    ({"pangu_training__z_loss_coeff": "much"}, "pangu_training.z_loss_coeff: found 'much', wanted a number"),
    ({"model__model_config__hidden_size": "big"}, "model.model_config: .*hidden_size: found 'big', wanted int"),
    ({"output_dir": 3}, "output_dir: found 3, wanted text"),
    # types
    ({"optimizer__type": "AdamWW"}, "optimizer.type: no AdamWW; did you mean AdamW?"),
    ({"optimizer__type": None}, "optimizer.type: found None, wanted one of PanguMuon, AdamW, "),
    ({"optimizer__type": "Muon"}, "optimizer.type: found Muon: it reads parts of .* take PanguMuon"),
    ({"lr_schedule__type": "CosineWithWarmupLR"}, "lr_schedule.type: no CosineWithWarmupLR; did you mean CosineWithW"),
    ({"callbacks__0__type": "TopkBiasBalanceCallback"}, "callbacks.0.type: found TopkBias.* give pangu_training"),
    ({"callbacks__0__type": "MFLossMonitor"}, "callbacks.0.type: found MFLossMonitor: it would take"),
    ({"callbacks__0__type": "PanguMoniter"}, "callbacks.0.type: no PanguMoniter; did you mean PanguMonitor?"),
    # sections
    ({"callbacks": {"type": "PanguMonitor"}}, "callbacks: found .* wanted a list of sections"),
    ({"callbacks": ["PanguMonitor"]}, "callbacks.0: found 'PanguMonitor', wanted a section of keys and values"),
    ({"model": [1]}, r"model: found \[1\], wanted a section of keys and values"),
    ({"model__model_config": "tiny"}, "model.model_config: found 'tiny', wanted keys and values"),
    ({"train_dataset__data_loader": None}, "train_dataset.data_loader: missing, wanted a section"),
    ({"optimizer": []}, r"optimizer: found \[\], wanted a section of keys and values"),
    # without effect
    ({"runner_config__sink_mode": True}, "runner_config.sink_mode: found True, wanted False: log, checkpoints"),
    ({"runner_config__sink_mode": None}, "sink_mode: left out, which means True in MindFormers, wanted F"),
    ({"runner_config__stop_step": 3}, "runner_config.stop_step: found 3, wanted 0: .* give the callback TrainCallBack"),
    ({"swap_config": {"swap": True, "default_prefetch": 1}}, "swap_config: found .* wanted none: nothing is moved"),
    ({"checkpoint": {"load_path": "x"}}, "checkpoint: found .* load_checkpoint reads ours, and PanguCheckpoint of"),
    ({"monitor_config": {"monitor_on": True}}, "monitor_config: found .* in log.jsonl"),
    ({"resume_training": True}, "resume_training: found True, wanted False: pangu-train --resume goes on"),
    ({"parallel_config__use_seq_parallel": True}, "parallel_config.use_seq_parallel: found True, wanted False: "),
    ({"parallel_config__pipeline_stage": 2}, "parallel_config.pipeline_stage: found 2, wanted 1: there are no"),
    ({"parallel_config__micro_batch_num": 2}, "parallel_config.micro_batch_num: found 2, wanted 1: .*accumulation"),
    ({"parallel__parallel_mode": 1}, "parallel.parallel_mode: found 1, wanted 0: ranks share the network by coll"),
    ({"parallel__gradients_mean": False}, "parallel.gradients_mean: found False, wanted True: gradients are means"),
    ({"parallel_config__model_parallel": 2}, "model_parallel: found 2, wanted 1 while use_parallel is False: one pro"),
    ({"parallel__enable_parallel_optimizer": True}, "optimizer: found True, wanted False while use_parallel is False"),
    ({"train_dataset__data_loader__max_document_length": 0}, "max_document_length: found 0, wanted an integer of at"),
    ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate: found 0.001, wanted none: the rate is"),
    ({"train_dataset_task__dataset_config": {"seed": 3}}, "train_dataset_task.dataset_config: found other keys"),
])
def test_a_key_without_effect_or_of_a_wrong_value_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as raised:
        prepare(changed(**values))
    assert "\n" not in str(raised.value)


def places(value, way=()):
    if way:
        yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if value and isinstance(value, list) and \
        isinstance(value[0], dict) else ()
    for key, each in items:
        yield from places(each, (*way, key))


@pytest.mark.parametrize("value", [[], {}, "x", "", -1, None, 3.5, True, [[1]], {"a": 1}, [None], {"type": []},
                                   float("nan"), 10 ** 40], ids=repr)
def test_no_value_anywhere_in_a_file_is_more_than_one_line(value):
    for way in places(TOY):
        fields = section = copy.deepcopy(TOY)
        for key in way[:-1]:
            section = section[key]
        section[way[-1]] = value
        try:
            prepare(fields)
        except PanguError as error:
            assert "\n" not in str(error), way


def test_numbers_that_yaml_takes_for_text():
    text = yaml.safe_load("{lr: 4e-3, decay: 1e-1, ramp: [[0, 1e-3], [10, 5e-4]], theta: 1e6}")
    assert [type(text[key]) for key in ("lr", "decay", "theta")] == [str] * 3
    _, fields, *_ = prepare(changed(lr_schedule__learning_rate=text["lr"], optimizer__weight_decay=text["decay"],
                                   optimizer__adamw_betas=[0.9, "9.5e-1"], pangu_training__z_loss_coeff="1e-4",
                                   model__model_config__rope_theta=text["theta"], runner_wrapper__max_grad_norm=1))
    assert (fields["lr_schedule"]["learning_rate"], fields["optimizer"]["weight_decay"]) == (0.004, 0.1)
    assert fields["optimizer"]["adamw_betas"] == [0.9, 0.95]
    assert type(fields["runner_wrapper"]["max_grad_norm"]) is float
    assert (fields["pangu_training"]["z_loss_coeff"], fields["model"]["model_config"]["rope_theta"]) == (1e-4, 1e6)
    # Of a list by steps its owner looks at the rest.
    assert read_keys({"pangu_training": {"z_loss_coeff": text["ramp"]}})["pangu_training"]["z_loss_coeff"] == [
        [0, 1e-3], [10, 5e-4]]


def test_what_asks_for_nothing_may_stand():
    """Of MindFormers' files: switches that are off, defaults, an alias of the data, empty sections."""
    prepare(changed(swap_config={"swap": False, "layer_swap": None}, monitor_config={"monitor_on": False}, metric=None,
                    auto_trans_ckpt=True, load_ckpt_format="safetensors", resume_training=False,
                    context__mode="GRAPH_MODE", recompute_config=None,
                    train_dataset_task__dataset_config=copy.deepcopy(TOY["train_dataset"]),
                    profile=False, profile_start_step=10, lr_schedule__total_steps=-1, processor={}, callbacks=None))
    own = {"type": "Mine", "auto_register": "mine.Mine", "anything": 1}
    assert prepare(changed(callbacks=[own]))[1]["callbacks"] == [own]


def test_two_directories_with_weights(data):
    tiny, other = str(data / "tiny"), str(data / "eps")
    both = changed(load_checkpoint=tiny, pretrained_model_dir=tiny, model={"model_config": {}})
    assert prepare(both)[1]["load_checkpoint"] == tiny
    with pytest.raises(ConfigError, match=f"pretrained_model_dir: found {other}, but load_checkpoint is {tiny}: "):
        prepare(both | {"pretrained_model_dir": other})


def test_use_parallel_without_msrun(monkeypatch):
    monkeypatch.delenv("MS_WORKER_NUM", raising=False)
    with pytest.raises(ConfigError, match="use_parallel: found True, but msrun has not started this process; set it"):
        prepare(changed(use_parallel=True))
    with pytest.raises(ConfigError, match="makes 2 processes, and this run has 1: start it by msrun"):
        prepare(changed(use_parallel=True, parallel_config__data_parallel=2))


def test_no_ascend(mindformers):
    for context in ({"device_target": "Ascend"}, {}):  # which MindFormers takes for Ascend
        with pytest.raises(ConfigError, match="context.device_target: found Ascend, but MindSpore has none here; give"):
            mindformers.check_device({"context": context})
    mindformers.check_device(TOY)


def test_said_before_mindformers_is_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "surroundings", lambda *_: pytest.fail("MindFormers would be imported"))
    monkeypatch.setattr(command, "check_paths", lambda *_: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed(runner_config__bacth_size=3)))
    assert command.main(["--config", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert "runner_config.bacth_size: no such key; did you mean batch_size?" in error and error.count("\n") == 1


# ---- the table against MindFormers

def entries(fields, table=KEYS, name=""):
    """(dotted key, entry or None) of every key of a file that this package or a class of ours would have to read."""
    for key, value in fields.items():
        entry = table.get(key)
        full = f"{name}.{key}".lstrip(".")
        yield full, entry
        if isinstance(entry, Section) and value is not None:
            for each in value if entry.many else [value]:
                types = entry.types or {None: {}}
                kind = each.get("type") if entry.types else None
                own = types.get(kind)
                if isinstance(own, dict):
                    given = {key: value for key, value in each.items() if key != "type" or not entry.types}
                    yield from entries(given, entry.keys | own, full)
                elif kind is not None and kind not in types:
                    yield f"{full}.type: {kind}", None


def test_every_key_of_mindformers_templates_is_known(mindformers):
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS
    walked = 0
    for name, owner in CONFIG_NAME_TO_CLASS.items():
        keys = {key: getattr(owner, key) for key in owner.keys()}
        if isinstance(KEYS.get(name), Refused):
            assert name not in ("general_config", *(key for key, entry in KEYS.items() if isinstance(entry, Section)))
            continue
        if name == "callbacks":
            fields = {"callbacks": list(keys.values())}
        elif name == "general_config":
            fields = keys
        else:
            fields = {name: keys}
        known = {full: entry for full, entry in entries(fields) if full != "train_dataset_task"}
        assert None not in known.values(), [full for full, entry in known.items() if entry is None]
        walked += len(known)
    assert walked > 100


def mindformers_files():
    return sorted((Path(importlib.util.find_spec("mindspore").origin).parents[1] / "configs").glob("*/*.yaml"))


def test_every_key_of_mindformers_own_files_is_known():
    """And each by itself is read, or refused in one line."""
    walked = set()
    for path in mindformers_files():
        fields = yaml.safe_load(path.read_text())
        if fields.get("run_mode") not in ("train", "finetune"):
            continue
        known = dict(entries(fields))
        assert None not in known.values(), (path.name, [full for full, entry in known.items() if entry is None])
        walked |= known.keys()
        for key, value in fields.items():
            for part in [{each: value[each]} for each in value] if isinstance(value, dict) else [value]:
                typed = isinstance(part, dict) and isinstance(KEYS[key], Section) and KEYS[key].types is not None
                if typed:
                    part = {"type": value["type"], **part}
                try:
                    read_keys({key: part})
                except ConfigError as error:
                    assert "\n" not in str(error) and "no such" not in str(error), (path.name, str(error))
    assert len(walked) > 100


def test_the_table_has_the_keys_of_our_own_classes(mindformers):
    """But for what the trainer gives them."""
    ours = ((DATASET["data_loader"].types["PanguJsonlLoader"], mindformers.PanguJsonlLoader.__new__,
             {"cls", "epochs", "tensor_parallel", "num_shards", "shard_id", "_"}),
            (DATASET["data_loader"].types["PanguIndexedLoader"], mindformers.PanguIndexedLoader.__new__,
             {"cls", "epochs", "tensor_parallel", "num_shards", "shard_id", "_"}),
            (OPTIMIZERS["PanguMuon"], mindformers.PanguMuon,
             {"params", "config", "learning_rate", "ranks", "shard_states"}),
            (WRAPPERS["PanguTrainStep"], mindformers.PanguTrainStep,
             {"network", "optimizer", "accumulation", "bias_update_rate", "sequences", "skips", "_"}),
            (CALLBACKS["PanguMonitor"], mindformers.PanguMonitor, set()),
            (CALLBACKS["PanguCheckpoint"], mindformers.PanguCheckpoint, set()))
    for table, owner, given in ours:
        assert table.keys() == inspect.signature(owner).parameters.keys() - given
    assert KEYS["pangu_training"].keys.keys() == {each.name for each in dataclasses.fields(TrainingSettings)}


@pytest.mark.parametrize("kind, types", [("LR", LR_TYPES), ("OPTIMIZER", OPTIMIZERS), ("WRAPPER", WRAPPERS),
                                         ("CALLBACK", CALLBACKS), ("DATASET_LOADER", DATASET["data_loader"].types)])
def test_types_of_the_table_are_mindformers_and_read_their_keys(mindformers, kind, types):
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    registered = MindFormerRegister.registry[getattr(MindFormerModuleType, kind)]
    assert not types.keys() - registered.keys()
    for name, table in types.items():
        if isinstance(table, dict) and not name.startswith("Pangu"):
            known = set(inspect.signature(registered[name]).parameters)
            applied = {key for key, entry in table.items() if isinstance(entry, Applied)}
            # Of the schedules the trainer itself reads total_steps.
            assert applied <= known, (name, applied - known)


# Files that read the keys of sections without a type, by the folder that they are in.
READERS = {
    "mindformers": ("trainer/trainer.py", "trainer/base_trainer.py", "trainer/utils.py",
                    "core/context/build_context.py", "dataset/utils.py", "dataset/base_dataset.py",
                    "dataset/causal_language_model_dataset.py"),
    "mindspore": ("context.py",),
    "pangu_ms": ("training/run/fields.py", "training/run/ranks.py", "training/run/keys.py",
                 "training/run/mindformers.py", "training/run/command.py", "training/run/tensorboard.py",
                 "training/run/adapters.py"),
}


def test_what_is_applied_is_read():
    """Each such key is an attribute or a string of a file that reads keys. More than a look would be a run for each."""
    site = Path(importlib.util.find_spec("mindspore").origin).parents[1]
    text = "".join((folder / name / file).read_text(encoding="utf-8") for name, files in READERS.items()
                   for folder in [ROOT if name == "pangu_ms" else site] for file in files)

    def applied(table):
        for key, entry in table.items():
            if isinstance(entry, Section):
                yield key
                if key != "pangu_training":
                    yield from applied(entry.keys)
            elif isinstance(entry, Applied):
                yield key
    missing = [key for key in applied(KEYS) if not re.search(rf"""(\.|["']){key}\b""", text)]
    assert not missing


def test_the_page_is_the_table():
    assert (ROOT / "configs" / "README.md").read_text() == page()


def test_the_command_prints_the_page(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--list-keys"])
    assert capsys.readouterr().out == page()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_our_files_hold_no_key_without_effect(path, data):
    """But for sink_mode, which left out means True."""
    fields = read_yaml(str(path))
    if fields["run_mode"] != "predict":
        read_keys(fields)
        found = {full for full, entry in entries(fields) if not isinstance(entry, (Applied, Section))}
        assert found == {"runner_config.sink_mode"}
