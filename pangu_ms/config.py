"""The configuration of an openPangu-2.0 model: the fields of the released config.json, under their own names.

A `PanguConfig` that exists is sound: every contradiction is refused, by the name of the field, when it is made, and it
cannot be changed afterwards (`dataclasses.replace` gives a changed copy, checked again).
"""

import dataclasses
import functools
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from pangu_ms.errors import ConfigError

CONFIG_FILE = "config.json"
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
MTP_HIDDEN = ("merged", "final")
MTP_HINT = "an MTP layer has the index num_hidden_layers + depth - 1"
# Bounds against absurd files: everything that is built per layer or per expert stays small.
LARGEST = {"num_hidden_layers": 1000, "num_nextn_predict_layers": 100, "n_routed_experts": 10_000}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer is. `window` counts the current token and is None for kinds that see the whole context."""

    index: int
    kind: str  # "dsa", "swa" or "full"
    window: int | None
    moe: bool
    block_post_layernorm: bool
    mtp_depth: int  # 0 in the trunk, 1.. for MTP layers


@dataclass(frozen=True)
class PanguConfig:
    """All fields of config.json (defaults: openPangu-2.0-Flash, 92B) and three choices of ours.

    Raises `ConfigError` that lists every field found wrong. Fields that this class does not know stay in `extra` and
    are written back; see `from_dict`.
    """

    architectures: tuple[str, ...] = ("OpenPanguV2ForCausalLM",)
    model_type: str = "openpangu_v2"
    vocab_size: int = 151552
    hidden_size: int = 2560
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 46
    num_nextn_predict_layers: int = 3
    num_attention_heads: int = 48
    num_key_value_heads: int | None = None  # without effect: latent attention has no key-value heads
    q_lora_rank: int = 1024
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 524288
    rope_theta: float | None = None  # never None on a made config: resolved from rope_parameters, else 6.4e6
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    rope_interleave: bool = False
    tie_word_embeddings: bool = False
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    n_group: int = 1
    topk_group: int = 1
    router_enable_expert_bias: bool = True
    use_mome: bool = True
    router_sliding_window: int = 3  # the width of the short convolutions, whatever its name says
    use_mhc: bool = True
    mhc_num_stream: int = 4
    mhc_recur_norm: int = 20
    mhc_use_gamma: bool = True
    sandwich_norm: bool = True
    block_post_layernorm_idx: tuple[int, ...] | None = (0, 4, 9, 14, 19, 24, 29, 34, 39)
    param_sink_number: int = 128
    param_sink_with_value: bool = True
    dsa_layers: tuple[int, ...] = tuple(range(0, 46, 3))
    swa_layers: tuple[int, ...] = tuple(i for i in range(49) if i % 3 or i > 45)
    sliding_window: int = 512
    sliding_window_list: tuple[int, ...] | None = (512,) * 30 + (2048,) * 3
    index_n_heads: int = 24
    index_head_dim: int = 128
    index_topk: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = 148899
    eos_token_id: int | tuple[int, ...] | None = 148900
    pad_token_id: int | None = 148900
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict | None = None

    # Where public sources differ: our choice, and the field that changes it.
    mhc_norm_eps: float = 1e-6  # inside the attention and mlp mHC modules; the merge module uses rms_norm_eps
    mtp_hidden: str = "merged"  # what MTP depth 1 reads: the merged streams before ("merged") or after the final norm
    compute_dtype: str = "float32"

    extra: dict = field(default_factory=dict, repr=False)  # fields of config.json that no part of this package reads
    # Fields the source did not give, with the value they took: not written back while they keep it.
    implied: dict = field(default_factory=lambda: dict(_IMPLIED), repr=False, compare=False)

    def __post_init__(self):
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = [p for name in _FIELDS if (p := _type_problem(name, getattr(self, name)))]
        if not problems:  # what follows compares and indexes, and needs the right types
            problems = _rope_problems(self)
            if self.rope_theta is None:
                given = [place["rope_theta"] for place in _rope_dicts(vars(self)).values() if "rope_theta" in place]
                object.__setattr__(self, "rope_theta", given[0] if given else 6.4e6)
            problems += _unsupported(self) + _size_problems(self) + _layer_problems(self)
        if problems:
            raise ConfigError("the configuration is refused:\n  " + "\n  ".join(problems))

    # ---- reading and writing

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "PanguConfig":
        """A config from the contents of a config.json.

        Fields that decide shapes, layer kinds or the meaning of the weights must be there: Flash's values are no
        default for another model. Lists and token ids that are not there are null.
        """
        missing = sorted(_REQUIRED - fields.keys())
        if "sliding_window" not in fields and fields.get("sliding_window_list") is None:
            missing.append("sliding_window")
        if not any("rope_theta" in place for place in (fields, *_rope_dicts(fields).values())):
            missing.append("rope_theta")
        if missing:
            raise ConfigError(f"the configuration lacks {', '.join(missing)}; "
                              "add them as the model was trained: no default is safe")
        known = {name: value for name, value in fields.items() if name in _FIELDS}
        extra = {name: value for name, value in fields.items() if name not in _FIELDS}
        config = cls(**dict.fromkeys(_NULL_WHEN_ABSENT) | known, extra=extra)
        implied = {name: getattr(config, name) for name in _FIELDS if name not in known}
        return dataclasses.replace(config, implied=implied)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "PanguConfig":
        """Read `directory`/config.json; `ConfigError` names the file when it is absent, not JSON, or refused."""
        path = os.path.join(directory, CONFIG_FILE)
        if not os.path.isdir(directory):
            raise ConfigError(f"{directory}: no such directory; give the directory that holds {CONFIG_FILE}")
        try:
            with open(path, encoding="utf-8") as file:
                fields = json.load(file)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; the directory of a checkpoint holds {CONFIG_FILE}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: holds a {type(fields).__name__}, wanted a JSON object of fields")
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json: what was given, what was changed since, and unknown fields as they came."""
        fields = {}
        for name in _FIELDS:
            value = getattr(self, name)
            if name not in self.implied or self.implied[name] != value:
                fields[name] = list(value) if isinstance(value, tuple) else value
        return fields | self.extra

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `directory`/config.json, making the directory when it is not there."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")

    # ---- what follows from the fields

    @functools.cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The trunk's layers 0 .. num_hidden_layers - 1, then the MTP layers by depth."""
        windows = dict(zip(self.swa_layers, self.sliding_window_list or [self.sliding_window] * len(self.swa_layers)))
        mtp_window = self.sliding_window_list[-1] if self.sliding_window_list else self.sliding_window
        plans = []
        for index in range(self.num_hidden_layers):
            kind = "dsa" if index in self.dsa_layers else "swa" if index in windows else "full"
            plans.append(LayerPlan(index, kind, windows.get(index), moe=index >= self.first_k_dense_replace,
                                   block_post_layernorm=index in (self.block_post_layernorm_idx or ()), mtp_depth=0))
        for depth in range(1, self.num_nextn_predict_layers + 1):
            index = self.num_hidden_layers + depth - 1
            plans.append(LayerPlan(index, "swa", windows.get(index, mtp_window), moe=True,
                                   block_post_layernorm=False, mtp_depth=depth))
        return tuple(plans)

    def parameter_count(self) -> dict:
        """Numbers of parameters by component, totals and active; see `checkpoint.names.count_parameters`."""
        from pangu_ms.checkpoint.names import count_parameters  # that table is built from this class
        return count_parameters(self)

    # ---- the released models

    @classmethod
    def flash_92b(cls, **fields) -> "PanguConfig":
        """openPangu-2.0-Flash, 92B with 6B active. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)

    @classmethod
    def pro_505b(cls, **fields) -> "PanguConfig":
        """openPangu-2.0-Pro, 505B with 18B active: widths, experts, layers and vocabulary are public, the rest is not.

        Every field of `UNPUBLISHED` must be given; none is guessed. `ConfigError` names those that are not.
        """
        known = {"hidden_size": 5120, "num_attention_heads": 64, "intermediate_size": 16128, "n_routed_experts": 384,
                 "n_shared_experts": 1, "moe_intermediate_size": 1792, "num_hidden_layers": 50,
                 "num_nextn_predict_layers": 3, "max_position_embeddings": 524288, "dtype": "bfloat16"}
        return cls._published("pro_505b", known, fields)

    @classmethod
    def small_34b(cls, **fields) -> "PanguConfig":
        """The 34B sibling (also called 30B or 35B, 2B active): widths, heads and experts are public, the rest is not.

        Every field of `UNPUBLISHED`, the numbers of layers and the context length must be given; none is guessed.
        """
        known = {"hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 6144, "n_routed_experts": 192,
                 "n_shared_experts": 2, "moe_intermediate_size": 512, "dtype": "bfloat16"}
        return cls._published("small_34b", known, fields)

    @classmethod
    def _published(cls, preset: str, known: dict, fields: dict) -> "PanguConfig":
        wanted = UNPUBLISHED + ("num_hidden_layers", "num_nextn_predict_layers", "max_position_embeddings")
        missing = [name for name in wanted if name not in known | fields]
        if missing:
            raise ConfigError(f"{preset}: no public source gives {', '.join(missing)}; pass them by name")
        return cls(**known | fields)


# What public sources give for Flash alone among the released models.
UNPUBLISHED = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts_per_tok",
    "first_k_dense_replace", "routed_scaling_factor", "router_sliding_window", "mhc_num_stream", "mhc_recur_norm",
    "block_post_layernorm_idx", "param_sink_number", "dsa_layers", "swa_layers", "sliding_window_list",
    "index_n_heads", "index_head_dim", "index_topk", "rms_norm_eps", "rope_theta",
)

_CHOICES = ("mhc_norm_eps", "mtp_hidden", "compute_dtype")
_FIELDS = {f.name: f for f in dataclasses.fields(PanguConfig) if f.name not in ("extra", "implied")}
_IMPLIED = {f.name: f.default for f in _FIELDS.values() if f.default is None or f.name in _CHOICES}
_NULL_WHEN_ABSENT = ("block_post_layernorm_idx", "sliding_window_list", "bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
             "num_nextn_predict_layers", "num_attention_heads", "n_routed_experts", "n_shared_experts",
             "max_position_embeddings", *UNPUBLISHED} - {"rope_theta", *_NULL_WHEN_ABSENT}


def _type_problem(name: str, value: Any) -> str | None:
    """What is wrong with the type of a field. int stands for float, as in JSON, but bool never for a number."""
    wanted = _FIELDS[name].type
    for one in typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,):
        if typing.get_origin(one) is tuple:
            item = typing.get_args(one)[0]
            if isinstance(value, tuple) and all(type(v) is item for v in value):
                return None
        elif one is float:
            if type(value) in (int, float) and math.isfinite(value):
                return None
        elif type(value) is one:
            return None
    text = (wanted.__name__ if isinstance(wanted, type) else str(wanted)).replace(", ...", "")
    return f"{name}: found {_shown(value)}, wanted {text.replace('tuple', 'list').replace('None', 'null')}"


def _rope_dicts(fields: dict[str, Any]) -> dict[str, dict]:
    """The two places beside the top level where a config.json may speak of rotary embeddings."""
    return {name: fields[name] for name in ("rope_parameters", "rope_scaling") if isinstance(fields.get(name), dict)}


def _rope_problems(config: PanguConfig) -> list[str]:
    """Only plain rotary embeddings are implemented; scaling by a factor of 1 changes nothing and is let through."""
    problems = []
    for name, fields in _rope_dicts(vars(config)).items():
        kind = fields.get("rope_type", fields.get("type", "default"))
        without_effect = kind in ("linear", "yarn", "deepseek_yarn") and fields.get("factor") == 1 \
            and fields.get("attention_factor") in (None, 1)
        if kind != "default" and not without_effect:
            problems.append(f"{name}: found rope type {_shown(kind)} with factor {_shown(fields.get('factor'))}, "
                            "wanted \"default\": rope scaling is not implemented")
        theta = fields.get("rope_theta", 1.0)
        if type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 0:
            problems.append(f"{name}: rope_theta is {_shown(theta)}, wanted a positive number")
        elif "rope_theta" in fields and config.rope_theta not in (None, theta):
            problems.append(f"rope_theta: found {config.rope_theta!r}, but {name} says {theta!r}; keep the right one")
    if config.rope_theta is not None and config.rope_theta <= 0:
        problems.append(f"rope_theta: found {config.rope_theta!r}, wanted a positive number")
    return problems


def _unsupported(config: PanguConfig) -> list[str]:
    """Fields with one implemented value: no released model has another."""
    only = {"model_type": "openpangu_v2", "hidden_act": "silu", "rope_interleave": False, "tie_word_embeddings": False,
            "attention_bias": False, "attention_dropout": 0, "n_group": 1, "topk_group": 1,
            "router_enable_expert_bias": True, "use_mome": True, "use_mhc": True, "mhc_use_gamma": True,
            "sandwich_norm": True, "param_sink_with_value": True}
    problems = [f"{name}: found {_shown(getattr(config, name))}, wanted {value!r}: nothing else is implemented"
                for name, value in only.items() if getattr(config, name) != value]
    for name, values in (("mtp_hidden", MTP_HIDDEN), ("compute_dtype", COMPUTE_DTYPES)):
        if getattr(config, name) not in values:
            problems.append(f"{name}: found {_shown(getattr(config, name))}, wanted one of {', '.join(values)}")
    if config.dtype and config.torch_dtype and config.dtype != config.torch_dtype:
        problems.append(f"dtype: found {_shown(config.dtype)}, but torch_dtype says {_shown(config.torch_dtype)}; "
                        "keep one of them")
    return problems


def _size_problems(config: PanguConfig) -> list[str]:
    may_be_zero = {"num_nextn_predict_layers", "first_k_dense_replace",
                   "bos_token_id", "pad_token_id", "eos_token_id"}
    may_be_negative = {"attention_dropout", "rope_theta"}  # judged elsewhere
    problems = []
    for name in _FIELDS:
        value = getattr(config, name)
        if type(value) not in (int, float) or name in may_be_negative:
            continue
        if value < 0 or value == 0 and name not in may_be_zero:
            problems.append(f"{name}: found {value}, wanted {'0 or more' if name in may_be_zero else 'more than 0'}")
        elif value > LARGEST.get(name, 2**31 - 1):
            problems.append(f"{name}: found {value}, wanted at most {LARGEST.get(name, 2**31 - 1)}")
    if config.qk_rope_head_dim % 2:
        problems.append(f"qk_rope_head_dim: found {config.qk_rope_head_dim}, wanted an even number (pairs are rotated)")
    for name, least, why in (
        ("n_routed_experts", "num_experts_per_tok", "the router picks distinct experts"),
        ("index_head_dim", "qk_rope_head_dim", "the indexer rotates that many dimensions"),
        ("num_hidden_layers", "first_k_dense_replace", "they are the first of the trunk's layers"),
    ):
        if getattr(config, name) < getattr(config, least):
            problems.append(f"{name}: found {getattr(config, name)}, wanted at least {least} = "
                            f"{getattr(config, least)}: {why}")
    return problems


def _layer_problems(config: PanguConfig) -> list[str]:
    trunk, last = config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    problems = []
    for name, end, note in (("dsa_layers", trunk, "the trunk's layers"), ("block_post_layernorm_idx", trunk,
                            "the trunk's layers"), ("swa_layers", last, f"trunk and MTP layers; {MTP_HINT}")):
        given = getattr(config, name) or ()
        outside = [i for i in given if not 0 <= i < end]
        if outside:
            problems.append(f"{name}: found {_list(outside)}, wanted 0 to {end - 1} ({note})")
        if len(set(given)) < len(given):
            problems.append(f"{name}: found {_list(sorted(i for i in set(given) if given.count(i) > 1))} twice")
    both = sorted(set(config.dsa_layers) & set(config.swa_layers))
    if both:
        problems.append(f"dsa_layers, swa_layers: found {_list(both)} in both; a layer is of one kind")
    windows = config.sliding_window_list
    if windows is not None:
        if len(windows) != len(config.swa_layers):
            problems.append(f"sliding_window_list: found {len(windows)} entries, wanted one for each of the "
                            f"{len(config.swa_layers)} swa_layers, in their order")
        if any(w < 1 for w in windows):
            problems.append(f"sliding_window_list: found {min(windows)}, wanted windows of at least 1 token")
    return problems


def _shown(value: Any) -> str:
    """A value as a message shows it: a damaged file may have made it long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _list(numbers: list[int]) -> str:
    """The first few numbers of a list that a damaged file may have made long."""
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
