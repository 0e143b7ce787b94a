"""The members of the family: what differs between them, one file each. Needs no MindSpore."""
import os

from pangu_ms.architectures import (
    openpangu_v2, pangu_embedded, pangu_pro_moe, pangu_pro_moe_v2, pangu_ultra_moe,
)
from pangu_ms.architectures.fields import CONFIG_FILE, Config, read_fields
from pangu_ms.errors import ConfigError

# Name in `architectures` of config.json -> the class of its fields.
ARCHITECTURES = {
    "OpenPanguV2ForCausalLM": openpangu_v2.PanguConfig,
    "PanguV2MoEForCausalLM": openpangu_v2.PanguConfig,
    "PanguEmbeddedForCausalLM": pangu_embedded.PanguEmbeddedConfig,
    "PanguProMoEForCausalLM": pangu_pro_moe.PanguProMoEConfig,
    "PanguProMoEV2ForCausalLM": pangu_pro_moe_v2.PanguProMoEV2Config,
    "PanguUltraMoEForCausalLM": pangu_ultra_moe.PanguUltraMoEConfig,
}


def config_class(fields: dict) -> type[Config]:
    """The class of a config.json's fields, by `architectures`; `ConfigError` when it is none of those known."""
    names = fields.get("architectures", ["OpenPanguV2ForCausalLM"])
    known = [name for name in names if str(name) in ARCHITECTURES] if isinstance(names, list | tuple) else []
    if not known:
        raise ConfigError(f"architectures: found {str(names)[:100]}, wanted one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[known[0]]


def config_from_dict(fields: dict) -> Config:
    """The config that the contents of a config.json describe; `ConfigError` names what is wrong with them."""
    return config_class(fields).from_dict(fields)


def read_config(directory: str | os.PathLike) -> Config:
    """The config of a directory that holds config.json; `ConfigError` names the file and what is wrong with it."""
    fields = read_fields(directory)
    try:
        return config_from_dict(fields)
    except ConfigError as error:
        raise ConfigError(f"{os.path.join(directory, CONFIG_FILE)}: {error}") from None
