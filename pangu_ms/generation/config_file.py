"""A YAML file for predict, in MindFormers' 1.x dialect, as pangu-generate takes it. Imports no framework.

Nothing of a file is dropped in silence. A key is applied, or compared with the checkpoint, or known to ask nothing of
this package at the value it has. Every other key is refused by name.
"""
import argparse
import difflib
from dataclasses import dataclass, field
from typing import Any

from pangu_ms.architectures.fields import CONFIG_FILE, Config
from pangu_ms.errors import ConfigError
from pangu_ms.yaml_file import read_yaml
from pangu_ms.yaml_keys import Refused, Section, context_table, read_section

OPTIONS = ("max_new_tokens", "num_draft_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
CONTEXT = context_table(training=False)
OUR_DTYPES = ("compute_dtype", "dtype", "torch_dtype")  # say how to compute or to store, not what the model is

# Keys that are applied, by section.
APPLIED = {
    "": ("run_mode", "seed", "load_checkpoint", "pretrained_model_dir", "use_parallel", "generation_config", "context",
         "parallel", "parallel_config", "model"),
    "generation_config": (*OPTIONS, "do_sample"),
    "parallel_config": ("data_parallel", "model_parallel", "expert_parallel"),
    "model": ("model_config",),
}
ANY = ()
# Keys that MindFormers' files carry and that ask nothing of this package: at these values, or (ANY) at every value.
HARMLESS = {
    "": {
        # what MindFormers writes, and by which of its classes and checkpoint loaders it works
        "output_dir": ANY, "trainer": ANY, "use_legacy": ANY, "trust_remote_code": ANY,
        "load_ckpt_format": ("safetensors",), "use_legacy_format": ANY, "load_ckpt_async": ANY, "auto_trans_ckpt": ANY,
        "transform_process_num": ANY, "src_strategy_path_or_dir": (None, ""), "only_save_strategy": (False,),
        "balanced_load": ANY, "reshard_worker_num": ANY, "remote_save_url": (None, ""), "moe_config": ANY,
        # what it predicts
        "input_data": (None, ""), "save_file": (None, ""), "predict_batch_size": (None, 1), "adapter_id": (None,),
        "processor": (None, {}), "use_past": ANY, "postprocess_use_numpy": ANY, "infer_precision_sync": (None, False),
        "exclude_cann_cpu": (None, False),
        # profiling, when it is on
        "profile": (False,), "profile_communication": ANY, "profile_memory": ANY, "init_start_profile": ANY,
        "profile_start_step": ANY, "profile_stop_step": ANY, "profile_rank_ids": ANY, "profile_pipeline": ANY,
        "profile_level": ANY, "mstx": ANY,
        # training, of which a file for predict may still tell
        "resume_training": (False,), "do_eval": (False,), "eval_step_interval": ANY, "eval_epoch_interval": ANY,
        "print_separate_loss": ANY, "ignore_data_skip": ANY, "data_skip_steps": ANY, "layer_scale": ANY,
        "layer_decay": ANY, "lr_scale": ANY, "lr_scale_factor": ANY, "micro_batch_interleave_num": ANY,
        "train_precision_sync": ANY, "runner_config": ANY, "runner_wrapper": ANY, "optimizer": ANY, "lr_schedule": ANY,
        "metric": ANY, "callbacks": ANY, "eval_callbacks": ANY, "train_dataset": ANY, "train_dataset_task": ANY,
        "eval_dataset": ANY, "eval_dataset_task": ANY, "recompute_config": ANY, "swap_config": ANY,
        "monitor_config": ANY, "pangu_training": ANY,
    },
    "generation_config": {"use_past": ANY, "num_beams": (1,)},
    "parallel_config": {
        "pipeline_stage": (1,), "context_parallel": (1,), "seq_split_num": (1,), "use_seq_parallel": (False,),
        "micro_batch_num": ANY, "vocab_emb_dp": ANY, "optimizer_shard": ANY, "gradient_aggregation_group": ANY,
        "context_parallel_algo": ANY, "ulysses_degree_in_cp": ANY, "mem_coeff": ANY,
    },
    # The ranks' collectives are the network's own. MindSpore's ways of dividing a graph would come on top.
    "parallel": {
        "parallel_mode": (0, "DATA_PARALLEL", "STAND_ALONE", "MANUAL_PARALLEL"), "full_batch": ANY, "search_mode": ANY,
        "enable_parallel_optimizer": ANY, "gradients_mean": ANY, "enable_alltoall": ANY, "strategy_ckpt_save_file": ANY,
    },
    "model": {"arch": ANY},
    # Of what config.json does not have. The cache has no pages; norms, softmax and angles are float32 here.
    "model.model_config": {
        "type": ANY, "auto_register": ANY, "batch_size": (1,), "block_size": ANY, "num_blocks": ANY, "use_past": ANY,
        "use_flash_attention": ANY, "moe_router_fusion": ANY, "normalization": ("RMSNorm",),
        "position_embedding_type": ("rope",), "add_bias_linear": (False,), "gated_linear_unit": (True,),
        "layernorm_compute_dtype": ("float32",), "softmax_compute_dtype": ("float32",), "rotary_dtype": ("float32",),
    },
}


@dataclass(frozen=True)
class PredictFile:
    """What a file for predict asks for; without a file, nothing.

    Attributes:
        path (str | None):
        options (tuple[str, ...]): words of pangu-generate's command line.
        context (dict): what `mindspore.set_context` is to be told: the keys of `context` that are applied. Processes
            that msrun starts get no device_id: each has one of its own.
        model_config (dict): what the file says about the model; `check` compares it with the checkpoint.
    """

    path: str | None = None
    options: tuple[str, ...] = ()
    context: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)

    def check(self, config: Config, directory: str) -> None:
        """`ConfigError` where model.model_config says otherwise than a checkpoint's config.json, or more.

        Args:
            config: of the checkpoint.
            directory: the checkpoint, for the message.
        """
        known = {name: getattr(config, name) for name in config.given_fields()} | config.extra
        unknown = {}
        for name, value in self.model_config.items():
            field_name = config.SPELLINGS.get(name, name)
            if field_name not in known:
                unknown[name] = value
            elif name not in OUR_DTYPES and _comparable(value) != _comparable(known[field_name]):
                raise ConfigError(f"{self.path}: model.model_config.{name}: found {value!r}, but {CONFIG_FILE} of "
                                  f"{directory} has {known[field_name]!r}; leave out of model_config what the "
                                  "checkpoint says")
        # Weights are held in the dtype that is computed in.
        dtypes = {"params_dtype": (self.model_config.get("compute_dtype", "float32"),)}
        _check_keys(self.path, "model.model_config", unknown, known, HARMLESS["model.model_config"] | dtypes)


def find_predict_file(argv: list[str]) -> PredictFile:
    """The file that a command line names as --config; an empty `PredictFile` where it names none.

    Raises:
        ConfigError: as `read_predict_file`.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    return PredictFile() if path is None else read_predict_file(path)


def read_predict_file(path: str) -> PredictFile:
    """What a file asks for.

    The model's directory is `load_checkpoint` or `pretrained_model_dir`, the dtype `model.model_config.compute_dtype`;
    `generation_config` holds further options under their names, and `seed` is the one of sampling where that holds
    none. `parallel_config` counts where use_parallel is True.

    Raises:
        ConfigError: the file cannot be read, is for training, contradicts itself, or asks for what is not done here.
    """
    fields = read_yaml(path)
    if fields.get("run_mode") != "predict":
        raise ConfigError(f"{path}: run_mode is {fields.get('run_mode')!r}, wanted predict; "
                          "pangu-train --config reads files for training")
    _check_section(path, "", fields)
    sections = {name: _section(path, name, fields.get(name)) for name in ("generation_config", "model")}
    for name, section in sections.items():
        _check_section(path, name, section)
    generation = sections["generation_config"]
    context = _context(path, _section(path, "context", fields.get("context")))
    model_config = _section(path, "model.model_config", sections["model"].get("model_config"))
    parallel = _parallel_options(path, fields)
    options = {"model": _model(path, fields), "dtype": model_config.get("compute_dtype"), **parallel,
               "seed": fields.get("seed"), **_generation_options(path, generation)}
    words = [word for name, value in options.items() if value is not None
             for word in ("--" + name.replace("_", "-"), str(value))]
    if parallel:
        context.pop("device_id", None)
    return PredictFile(path, tuple(words), context, model_config)


def _model(path, fields):
    found = [fields[key] for key in ("load_checkpoint", "pretrained_model_dir") if fields.get(key)]
    if len(found) > 1 and found[0] != found[1]:
        raise ConfigError(f"{path}: load_checkpoint is {found[0]!r}, pretrained_model_dir {found[1]!r}; give one of "
                          "them: a directory with config.json, weights and tokenizer")
    return found[0] if found else None


def _parallel_options(path, fields):
    """tensor_parallel and expert_parallel; {} where the file is for one process."""
    if not fields.get("use_parallel"):
        return {}
    for name in ("parallel", "parallel_config"):
        _check_section(path, name, _section(path, name, fields.get(name)))
    given = fields.get("parallel_config") or {}
    data, tensor, expert = (given.get(f"{name}_parallel", 1) for name in ("data", "model", "expert"))
    if data not in (1, expert):  # in MindFormers ranks that share experts are data parallel
        raise ConfigError(f"{path}: parallel_config.data_parallel: found {data!r}, wanted 1 or expert_parallel "
                          f"{expert!r}: all ranks work on one text")
    return {"tensor_parallel": tensor, "expert_parallel": expert}


def _generation_options(path, section):
    """The options of generation_config; `do_sample` gives none, and must agree with the temperature."""
    options = {name: value for name, value in section.items() if name in OPTIONS and value is not None}
    temperature, sample = options.get("temperature", 0), section.get("do_sample")
    if sample is not None and sample != (temperature != 0):
        raise ConfigError(f"{path}: generation_config.do_sample: found {sample!r}, but temperature is {temperature}, "
                          f"which {'samples' if temperature else 'is greedy'}; give what you want as temperature")
    return options if sample is None else options | {"temperature": temperature}  # greedy in words, too


def _context(path, section):
    """The keys of `context` that are applied."""
    try:
        return _applied(read_section("context", section, CONTEXT.keys), CONTEXT.keys)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _applied(section, table):
    found = {}
    for key, value in section.items():
        if isinstance(table[key], Section):
            value = _applied(value or {}, table[key].keys) or None
        if not isinstance(table[key], Refused) and value is not None:
            found[key] = value
    return found


def _section(path, name, section):
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} holds {section!r}, wanted keys and values")
    return section or {}


def _check_section(path, name, section):
    _check_keys(path, name, section, APPLIED.get(name, ()), HARMLESS[name])


def _check_keys(path, section, given, applied, harmless):
    """`ConfigError` for the first key that is neither applied nor harmless at its value."""
    for key, value in given.items():
        name = f"{section}.{key}" if section else key
        if key in applied:
            continue
        if key not in harmless:
            near = difflib.get_close_matches(str(key), [*applied, *harmless], 1)
            raise ConfigError(f"{path}: {name}: " + (f"no such key; did you mean {near[0]}?" if near else
                                                     "pangu-generate does not know what to do with it; leave it out"))
        if harmless[key] != ANY and value not in harmless[key]:
            wanted = " or ".join(repr(one) for one in harmless[key])
            raise ConfigError(f"{path}: {name}: found {value!r}, wanted {wanted}: pangu-generate does nothing else")


def _comparable(value):
    return tuple(value) if isinstance(value, list) else value
