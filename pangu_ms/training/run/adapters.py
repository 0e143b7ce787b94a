"""Training an adapter alone: `model.pet_config` of a YAML file. Needs no MindFormers."""
import os

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.adapters import Adapter, adapter_tensors
from pangu_ms.architectures.fields import ADAPTER_CONFIG
from pangu_ms.architectures.tensors import extended, parameters
from pangu_ms.checkpoint.adapter import peft_fields, read_peft_fields
from pangu_ms.errors import ConfigError
from pangu_ms.yaml_file import check_section

SECTION = "model.pet_config"
KEYS = ("pet_type", "lora_rank", "lora_alpha", "lora_dropout", "target_modules")
OTHERS = {  # keys of MindFormers' LoraConfig that are refused, and why
    "lora_a_init": "A is drawn as PEFT does, uniform up to the root of 1 / inputs",
    "lora_b_init": "B is zero",
    "param_init_type": "A and B have the dtype of the model",
    "compute_dtype": "A and B have the dtype of the model",
    "exclude_layers": "say in target_modules what is wanted",
    "freeze_include": "all of the base is frozen",
    "freeze_exclude": "all of the base is frozen",
}


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
    if found[1:] or not isinstance(found[0], dict):
        raise ConfigError(f"{SECTION}: wanted one section, in model or in model.model_config")
    given = found[0]
    for name, reason in OTHERS.items():
        if name in given:
            raise ConfigError(f"{SECTION}.{name}: is not read here: {reason}; leave it out")
    check_section(SECTION, given, KEYS)
    for name, wanted, sound in (
            ("pet_type", "lora, the only kind", lambda value: value == "lora"),
            ("lora_rank", "a positive integer", lambda value: type(value) is int and value > 0),
            ("lora_alpha", "a positive number", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
            ("lora_dropout", "a number from 0 up to 1",
             lambda value: type(value) in (int, float) and 0 <= value < 1),
            ("target_modules", "a regular expression, such as .*\\.self_attn\\.\\w+_proj",
             lambda value: isinstance(value, str) and value)):
        if name in given and not sound(given[name]) or name not in given and name in ("pet_type", "target_modules"):
            raise ConfigError(f"{SECTION}.{name}: found {given.get(name)!r}, wanted {wanted}")
    adapter = Adapter(given.get("lora_rank", 8), given.get("lora_alpha", 16), float(given.get("lora_dropout", 0.01)),
                      given["target_modules"])
    if not (fields.get("load_checkpoint") or fields.get("pretrained_model_dir")):
        raise ConfigError(f"{SECTION}: found without weights that the adapter could belong to; give load_checkpoint")
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
