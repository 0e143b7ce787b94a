"""The YAML files of configs/: MindFormers' 1.x dialect."""
from collections.abc import Collection, Iterable

import yaml

from pangu_ms.errors import ConfigError
from pangu_ms.yaml_keys import nearest


def read_yaml(path: str) -> dict:
    """The contents of a YAML file; `ConfigError` names the file when it cannot be read or holds no sections."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; see configs/openpangu_v2 for files to start from") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or what looks like a date and is none
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: holds a {type(fields).__name__}, wanted sections such as model:")
    if "base_config" in fields:
        raise ConfigError(f"{path}: base_config is not supported; write its keys into this file")
    return fields


def check_section(section: str, names: Iterable, known: Collection[str]) -> None:
    """`ConfigError` for the first of a section's keys that is not a known one, with the nearest that is."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{section}.{name}: no such key" + nearest(name, known))
