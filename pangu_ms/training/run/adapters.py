"""Training an adapter alone: `model.pet_config` of a YAML file. Needs no MindFormers."""
import os

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.adapters import Adapter, adapter_tensors
from pangu_ms.architectures.fields import ADAPTER_CONFIG
from pangu_ms.architectures.tensors import extended, parameters
from pangu_ms.checkpoint.adapter import peft_fields, read_peft_fields
from pangu_ms.errors import ConfigError
from pangu_ms.training.run.key_table import PET
from pangu_ms.yaml_keys import read_section

SECTION = "model.pet_config"


def take_adapter(fields: dict) -> Adapter | None:
    """Takes `pet_config` out of `model`, or out of `model.model_config` where MindFormers' own models have it.

    The defaults are MindFormers'.

    Raises:
        ConfigError: an unknown key, a value out of its range, or what does not go with an adapter.
    """
    found = [given for section in (fields["model"], fields["model"]["model_config"])
             if (given := section.pop("pet_config", None))]
    if not found:
        return None
    if found[1:]:
        raise ConfigError(f"{SECTION}: wanted one section, in model or in model.model_config")
    given = read_section(SECTION, found[0], PET)
    adapter = Adapter(given.get("lora_rank", 8), given.get("lora_alpha", 16), given.get("lora_dropout", 0.01),
                      given["target_modules"])
    if not (fields.get("load_checkpoint") or fields.get("pretrained_model_dir")):
        raise ConfigError(f"{SECTION}: found without weights that the adapter could belong to; give load_checkpoint")
    if fields["run_mode"] == "eval":
        raise ConfigError(f"{SECTION}: found with run_mode eval; evaluate what pangu-convert merge-lora makes of it")
    if fields.get("load_optimizer"):
        raise ConfigError(f"load_optimizer: found True beside {SECTION}, whose run keeps no states of the base; leave "
                          "it out")
    training = fields["pangu_training"]
    for name, left in (("router_bias_update_rate", 0), ("indexer_loss", "off")):
        if training.get(name, left) != left:
            raise ConfigError(f"pangu_training.{name}: found {training[name]!r}, wanted {left!r} beside {SECTION}, for "
                              "all of the base stays as it is")
    adapter_tensors(config_from_dict(fields["model"]["model_config"]), adapter)  # says what target_modules gets wrong
    return adapter


def check_adapter_ranks(ranks) -> None:
    """`ConfigError` where ranks share the model."""
    if ranks.model.count > 1:
        raise ConfigError(f"{SECTION}: found with model_parallel or expert_parallel above 1, whose ranks hold parts of "
                          "the matrices; take data_parallel alone")


def add_adapter(model, adapter: Adapter, base: str, seed: int) -> None:
    """Gives a `PanguForCausalLM` the pairs of an adapter, of which checkpoints say that they belong to `base`."""
    from pangu_ms.model.adapters import attach
    tensors = adapter_tensors(model.config, adapter)
    attach(model, {name: p.shape for name, p in tensors.items()}, adapter.scale, adapter.dropout, seed)
    model.config = extended(model.config, tensors)
    model.adapter = peft_fields(adapter, os.path.abspath(base))


def share_trained(config, adapter: Adapter) -> str:
    """How much of a model an adapter has to train, in words."""
    own, base = (sum(p.count for p in each.values()) for each in (adapter_tensors(config, adapter), parameters(config)))
    return f"{own:,} parameters of the adapter are trained, {own / base:.2%} of the {base:,} that stay as they are"


def weights_of(checkpoint: str) -> str:
    """The directory whose weights a resumed run begins with: the checkpoint, or of an adapter's what it belongs to."""
    if not os.path.exists(os.path.join(checkpoint, ADAPTER_CONFIG)):
        return checkpoint
    base = read_peft_fields(checkpoint).get("base_model_name_or_path")
    if not os.path.isdir(str(base)):
        raise ConfigError(f"{os.path.join(checkpoint, ADAPTER_CONFIG)}: base_model_name_or_path: {base} is no "
                          "directory; put the model there that the run began with")
    return base
