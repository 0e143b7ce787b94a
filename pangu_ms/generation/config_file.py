"""A YAML file for predict as options of pangu-generate. Needs neither MindSpore nor MindFormers."""
import argparse
from typing import Any

from pangu_ms.errors import ConfigError, check_section
from pangu_ms.yaml_file import read_yaml

OPTIONS = ("max_new_tokens", "num_draft_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def with_config(argv: list[str]) -> list[str]:
    """`argv` behind the options that the file of its --config stands for, so that those given beside it win.

    The model's directory is `load_checkpoint` or `pretrained_model_dir`, the dtype `model.model_config.compute_dtype`;
    `generation_config` holds further options under their names. Other sections are MindFormers'.

    Raises:
        ConfigError: the file cannot be read, is for training, or has an unknown key in generation_config.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return argv
    fields = read_yaml(path)
    if fields.get("run_mode") != "predict":
        raise ConfigError(f"{path}: run_mode is {fields.get('run_mode')!r}, wanted predict; "
                          "pangu-train --config reads files for training")
    generation = _section(path, fields, "generation_config")
    check_section(f"{path}: generation_config", generation, OPTIONS)
    parallel = _section(path, fields, "parallel_config")
    options = {"model": fields.get("load_checkpoint") or fields.get("pretrained_model_dir"),
               "dtype": _section(path, _section(path, fields, "model"), "model_config").get("compute_dtype"),
               "tensor_parallel": parallel.get("model_parallel"), "expert_parallel": parallel.get("expert_parallel")}
    return [word for name, value in (options | generation).items() if value is not None
            for word in ("--" + name.replace("_", "-"), str(value))] + argv


def _section(path: str, fields: dict[str, Any], name: str) -> dict[str, Any]:
    section = fields.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} holds {section!r}, wanted keys and values")
    return section
