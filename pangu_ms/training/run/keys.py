"""The keys of a YAML file for training, checked against the table of `key_table.py`. Needs no MindFormers."""
from pangu_ms.architectures import config_class, config_from_dict
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.errors import ConfigError, one_line
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.run.key_table import KEYS, LR_TYPES, NO_WARMUP
from pangu_ms.yaml_file import check_section
from pangu_ms.yaml_keys import Applied, read_section

RANKS = ("data_parallel", "model_parallel", "expert_parallel")


def read_keys(fields: dict) -> dict:
    """A file's sections with every value as it is meant: 4e-3, which YAML takes for text, is a number.

    Raises:
        ConfigError: the first key that is unknown, without an effect, or of a value that cannot be.
    """
    read = read_section("", fields, KEYS)
    for section in ("train_dataset", "eval_dataset"):
        given = (fields.get(f"{section}_task") or {}).get("dataset_config")
        if given not in (None, fields.get(section)):
            raise ConfigError(f"{section}_task.dataset_config: found other keys than those of {section}, which "
                              "MindFormers puts there; leave it out")
    return read


def check_keys(fields: dict) -> None:
    """`ConfigError` for keys of completed sections that contradict each other, or lack what they need."""
    TrainingSettings.from_dict(fields["pangu_training"])
    _check_model(fields)
    _check_parts(fields)
    _check_steps(fields)
    _check_ranks(fields)


def _check_model(fields):
    weights, directory = fields.get("load_checkpoint"), fields.get("pretrained_model_dir")
    if weights and directory and weights != directory:
        raise ConfigError(f"pretrained_model_dir: found {directory}, but load_checkpoint is {weights}: config.json and "
                          "weights come from one directory; give one of the two")
    model_config = fields["model"]["model_config"]
    extra = read_config(weights or directory).extra if weights or directory else {}
    check_section("model.model_config", model_config, [*config_class(model_config).given_fields(), *extra])
    try:
        config_from_dict(model_config)
    except ConfigError as error:
        raise ConfigError(f"model.model_config: {one_line(error)}") from None


def _check_parts(fields):
    """Our callbacks go with our wrapper; there may be one of the user's."""
    wrapper = fields["runner_wrapper"].get("type")
    ours = {"PanguMonitor", "PanguCheckpoint"} & {each.get("type") for each in fields["callbacks"]}
    if ours and wrapper != "PanguTrainStep":
        raise ConfigError(f"runner_wrapper.type: found {wrapper}, but callbacks name {min(ours)}, which reads what "
                          "PanguTrainStep gives; take that or other callbacks")
    for key in ("do_eval", "tensorboard"):
        if fields.get(key) and "PanguMonitor" not in ours:
            raise ConfigError(f"{key}: callbacks do not name PanguMonitor, which does what it asks; add it")


def _check_steps(fields):
    if fields["runner_config"].get("sink_mode") is None:
        raise ConfigError("runner_config.sink_mode: left out, which means True in MindFormers, wanted False: log, "
                          "checkpoints and data are looked after at every step")
    schedule = fields["lr_schedule"]
    keys = LR_TYPES.get(schedule.get("type"), {})
    for name in ("warmup", "decay", "decay_start"):
        steps, ratio = f"{name}_steps", f"{name}_ratio"
        if steps in schedule and ratio in schedule:
            raise ConfigError(f"lr_schedule.{steps}: found beside {ratio}, which MindFormers goes by; give one")
        needed = isinstance(keys.get(steps), Applied) and name != "decay" and schedule["type"] not in NO_WARMUP
        if needed and not {steps, ratio} & schedule.keys():
            raise ConfigError(f"lr_schedule.{steps}: missing; give it or {ratio}")
    if schedule.get("type") == "WarmUpStableDecayLR" and schedule.get("lr_end", 0) >= schedule["learning_rate"]:
        raise ConfigError(f"lr_schedule.lr_end: found {schedule['lr_end']}, wanted less than learning_rate "
                          f"{schedule['learning_rate']}")


def _check_ranks(fields):
    if fields.get("use_parallel"):
        return
    for section, keys, wanted in (("parallel_config", RANKS, 1), ("parallel", ("enable_parallel_optimizer",), False)):
        for key in keys:
            value = (fields.get(section) or {}).get(key, wanted)
            if value != wanted:
                raise ConfigError(f"{section}.{key}: found {value!r}, wanted {wanted!r} while use_parallel is False: "
                                  "one process holds everything; set use_parallel: True and start by msrun")
