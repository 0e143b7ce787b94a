"""The sections of a YAML file for training, completed and compared. Needs no MindFormers."""
import copy
import json

from pangu_ms.architectures import config_class
from pangu_ms.checkpoint.directory import checkpoint_directory, read_config
from pangu_ms.errors import ConfigError
from pangu_ms.training.run.state import flatten

# A resumed run may have these otherwise: they change where things are written and computed, not what.
FREE_KEYS = ("output_dir", "callbacks", "use_parallel", "parallel", "parallel_config", "runner_config.batch_size",
             "runner_config.gradient_accumulation_steps", "do_eval", "eval_dataset", "eval_dataset_task",
             "eval_step_interval", "eval_epoch_interval", "tensorboard")


def kept_fields(fields):
    """What of a file's keys a resumed run must have alike: values by dotted key, as a checkpoint gives them back."""
    given = {key: value for key, value in flatten(fields).items()
             if key not in FREE_KEYS and key.partition(".")[0] not in FREE_KEYS}
    return json.loads(json.dumps(given, default=str))


def complete(fields):
    """The sections as given, with defaults where a section of ours would otherwise depend on MindFormers'."""
    fields = {"seed": 0, "run_mode": "train", "pangu_training": {}, "runner_wrapper": {"type": "PanguTrainStep"},
              "callbacks": [{"type": "PanguMonitor"}, {"type": "PanguCheckpoint"}]} | copy.deepcopy(fields)
    for section in ("trainer", "train_dataset", "optimizer", "runner_config"):
        if not isinstance(fields.get(section), dict):
            raise ConfigError(f"{section}: found {fields.get(section)!r}, wanted a section; see configs/openpangu_v2")
    loader = fields["train_dataset"].setdefault("data_loader", {})
    if loader.get("type") == "PanguJsonlLoader":
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
    # One name for each member, whatever a file calls it: MindFormers finds the model by it.
    model["model_config"] |= {"model_type": member.model_type, "architectures": list(member.architectures)}
    return fields
