"""The sections of a YAML file for training, completed and compared. Needs no MindFormers."""
import copy
import json

from pangu_ms.architectures import config_class
from pangu_ms.checkpoint.directory import checkpoint_directory, read_config
from pangu_ms.errors import ConfigError
from pangu_ms.training.data import LOADERS
from pangu_ms.training.run.adapters import check_adapter_ranks, take_adapter, weights_of
from pangu_ms.training.run.held_out import read_held_out
from pangu_ms.training.run.keys import check_keys, read_keys
from pangu_ms.training.run.ranks import find_ranks
from pangu_ms.training.run.schedules import check_load_optimizer, check_schedules
from pangu_ms.training.run.state import check_fields, flatten
from pangu_ms.yaml_keys import numbers_in

# A resumed run may have these otherwise: they change where things are written and computed, not what.
FREE_KEYS = ("output_dir", "callbacks", "use_parallel", "parallel", "parallel_config", "runner_config.batch_size",
             "runner_config.gradient_accumulation_steps", "do_eval", "eval_dataset", "eval_dataset_task",
             "eval_step_interval", "eval_epoch_interval", "tensorboard")


def prepare(fields, resume=None, state=None):
    """All that is looked at of a file before MindFormers is.

    Args:
        fields: the file's sections.
        resume, state: the checkpoint to go on from, and its `RunState`.

    Returns:
        The keys that a resumed run must have alike, the completed sections, the `Ranks`, the `Adapter` that is trained
        or None.

    Raises:
        ConfigError: a key that is unknown, without an effect, of a wrong value, or against another.
    """
    fields = read_keys(fields)
    given = kept_fields(fields)
    if state:
        check_fields(resume, state, given)
        fields |= {"load_checkpoint": weights_of(resume), "pretrained_model_dir": ""}
    fields = complete(fields)
    adapter = take_adapter(fields)
    check_keys(fields)
    check_schedules(fields)
    if not state:
        check_load_optimizer(fields)
    if fields["model"]["model_config"].get("compute_dtype") == "float16":
        raise ConfigError("model.model_config.compute_dtype: found float16, wanted bfloat16 or float32: gradients in "
                          "float16 need a scaled loss, which training here does not have")
    read_held_out(fields)
    if fields["run_mode"] != "train" and not (fields.get("load_checkpoint") or fields.get("pretrained_model_dir")):
        raise ConfigError(f"run_mode: found {fields['run_mode']} without weights; give load_checkpoint or "
                          "pretrained_model_dir")
    ranks = find_ranks(fields)
    if adapter:
        check_adapter_ranks(ranks)
    return given, fields, ranks, adapter


def kept_fields(fields):
    """What of a file's keys a resumed run must have alike: values by dotted key, as a checkpoint gives them back."""
    given = {key: value for key, value in flatten(fields).items()
             if key not in FREE_KEYS and key.partition(".")[0] not in FREE_KEYS}
    return json.loads(json.dumps(given, default=str))


def complete(fields):
    """The sections as given, with defaults where a section of ours would otherwise depend on MindFormers'."""
    defaults = {"seed": 0, "run_mode": "train", "pangu_training": {}, "runner_wrapper": {"type": "PanguTrainStep"},
                "train_dataset_task": {"type": "CausalLanguageModelDataset"},
                "callbacks": [{"type": "PanguMonitor"}, {"type": "PanguCheckpoint"}]}
    for section in ("trainer", "train_dataset", "optimizer", "lr_schedule", "runner_config"):
        if not isinstance(fields.get(section), dict):
            raise ConfigError(f"{section}: found {fields.get(section)!r}, wanted a section; see configs/openpangu_v2")
    fields = defaults | copy.deepcopy({key: value for key, value in fields.items() if value is not None})
    fields["lr_schedule"] = {key: value for key, value in fields["lr_schedule"].items() if value is not None}
    loader = fields["train_dataset"].get("data_loader")
    if not loader:
        raise ConfigError("train_dataset.data_loader: missing, wanted a section; see configs/openpangu_v2")
    if loader.get("type") in LOADERS:
        loader.setdefault("seed", fields["seed"])
        loader["epochs"] = fields["runner_config"].get("epochs", 1)
    for key in ("load_checkpoint", "pretrained_model_dir"):
        if fields.get(key):
            fields[key] = checkpoint_directory(fields[key])
    model = fields["model"] = fields.get("model") or {}
    directory = fields.get("pretrained_model_dir") or fields.get("load_checkpoint")
    known = read_config(directory).to_dict() if directory else {}
    model["model_config"] = known | (model.get("model_config") or {})
    member = config_class(model["model_config"])
    floats = [name for name, each in member.given_fields().items() if "float" in str(each.type)]
    model["model_config"] |= {name: numbers_in(value) for name, value in model["model_config"].items()
                              if name in floats}
    # One name for each member, whatever a file calls it: MindFormers finds the model by it.
    model["model_config"] |= {"model_type": member.model_type, "architectures": list(member.architectures)}
    return fields
