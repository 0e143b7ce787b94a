"""Reading the fields of a config.json, and what every architecture asks of them. Needs no MindSpore."""
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pangu_ms.architectures.tensors import count_parameters
from pangu_ms.errors import ConfigError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, of a directory that holds an adapter
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Config:
    """What the dataclass of an architecture's config.json inherits: reading, checking, writing back.

    A subclass is a frozen dataclass whose fields have the names of config.json. One that exists is sound: every contradiction is refused, by the name of the
    field, when it is made, and `dataclasses.replace` gives a changed copy, checked again.

    Attributes:
        extra: fields of the file that no part of this package reads.
        implied: fields that the file did not give, with the value they took: not written back while they keep it.

    Attributes of a subclass:
        REQUIRED: fields that decide the model: no default is safe.
        NULL_WHEN_ABSENT: fields whose defaults belong to one released model.
        SPELLINGS: other name of a field -> the field.
        OUR_CHOICES: fields that no release has.
        MTP_FIELD: the field with the number of MTP layers; None for an architecture that has none.

    For networks and files there are, of a subclass: `plan`, what the network is built from; `tensors`, its `Table`;
    `sizes` and `row_patterns`, the meaning of the table's words; `chat`, how it talks; and `cut(first, last, mtp)`, the
    config of a model of these trunk layers alone, renumbered from 0, with or without the MTP layers.
    """

    extra: dict = field(default_factory=dict, repr=False, kw_only=True)
    implied: dict | None = field(default=None, repr=False, compare=False, kw_only=True)     # None on no made config

    REQUIRED: typing.ClassVar[frozenset[str]] = frozenset()
    NULL_WHEN_ABSENT: typing.ClassVar[tuple[str, ...]] = ("bos_token_id", "eos_token_id", "pad_token_id")
    OUR_CHOICES: typing.ClassVar[tuple[str, ...]] = ("compute_dtype",)
    SPELLINGS: typing.ClassVar[dict[str, str]] = {}
    MTP_FIELD: typing.ClassVar[str | None] = None

    def __post_init__(self):
        given = self.given_fields()
        if self.implied is None:                                                # no file gave it
            object.__setattr__(self, "implied", {name: each.default for name, each in given.items()
                                                 if each.default is None or name in self.OUR_CHOICES})
        for name in given:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        # The dtype goes by two names, of which files give one or the other.
        for name, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, other))
        problems = [p for name, each in given.items() if (p := type_problem(each, getattr(self, name)))]
        problems = problems or self.problems()
        if problems:
            raise ConfigError("the configuration is refused:\n  " + "\n  ".join(problems))

    def problems(self) -> list[str]:
        """What contradicts itself or is not implemented, a line each; all types are right."""
        raise NotImplementedError

    def resolve_rope(self, default: float) -> list[str]:
        """`rope_theta`, where it is not given, as its dictionaries give it, else `default` -> `rope_problems`."""
        problems = rope_problems(vars(self))
        if self.rope_theta is None:
            object.__setattr__(self, "rope_theta", (rope_thetas(vars(self)) or [default])[0])
        return problems

    def parameter_count(self) -> dict:
        """Numbers of parameters by component, totals and active; see `count_parameters`."""
        return count_parameters(self)

    @classmethod
    def given_fields(cls) -> dict[str, dataclasses.Field]:
        """The fields that may stand in a config.json, by name."""
        return {each.name: each for each in dataclasses.fields(cls) if each.name not in ("extra", "implied")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]):
        """A config from the contents of a config.json; `ConfigError` names what is missing or wrong."""
        missing = sorted(cls.REQUIRED - fields.keys()) + cls.missing(fields)
        if missing:
            raise ConfigError(f"the configuration lacks {', '.join(missing)}; "
                              "add them as the model was trained: no default is safe")
        given = cls.given_fields()
        known = {name: value for name, value in fields.items() if name in given}
        extra = {name: value for name, value in fields.items() if name not in given}
        for spelling, name in cls.SPELLINGS.items():
            if spelling in extra and known.setdefault(name, extra[spelling]) != extra[spelling]:
                raise ConfigError(f"{name}: found {shown(known[name])}, but {spelling} says {shown(extra[spelling])}; "
                                  "keep the right one")
        config = cls(**dict.fromkeys(cls.NULL_WHEN_ABSENT) | known, extra=extra)
        return dataclasses.replace(config, implied={name: getattr(config, name) for name in given if name not in known})

    @classmethod
    def missing(cls, fields: dict[str, Any]) -> list[str]:
        """What a config.json lacks besides REQUIRED."""
        return [] if rope_thetas(fields) else ["rope_theta"]

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike):
        """Read `directory`/config.json; `ConfigError` names the file when it is absent, not JSON, or refused."""
        fields = read_fields(directory)
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{os.path.join(directory, CONFIG_FILE)}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json: what was given, what was changed since, and unknown fields as they came."""
        fields = {}
        for name in self.given_fields():
            value = getattr(self, name)
            if name not in self.implied or self.implied[name] != value:
                fields[name] = list(value) if isinstance(value, tuple) else value
        if self.dtype:
            fields |= {"torch_dtype": self.dtype, "dtype": self.dtype}
        return fields | self.extra

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `directory`/config.json, making the directory when it is not there."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")


def read_fields(directory: str | os.PathLike) -> dict[str, Any]:
    """The contents of `directory`/config.json; `ConfigError` names the file when it is absent or no JSON object."""
    path = os.path.join(directory, CONFIG_FILE)
    if not os.path.isdir(directory):
        raise ConfigError(f"{directory}: no such directory; give the directory that holds {CONFIG_FILE}")
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except FileNotFoundError:
        if os.path.exists(os.path.join(directory, ADAPTER_CONFIG)):
            raise ConfigError(f"{directory}: holds an adapter and no model; give the model that its {ADAPTER_CONFIG} "
                              "names, and this directory as --adapter, or merge the two by pangu-convert merge-lora"
                              ) from None
        raise ConfigError(f"{path}: no such file; the directory of a checkpoint holds {CONFIG_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: holds a {type(fields).__name__}, wanted a JSON object of fields")
    return fields


def type_problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with the type of a field. int stands for float, as in JSON, but bool never for a number."""
    wanted = field.type
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
    text = (str(wanted) if typing.get_args(wanted) else wanted.__name__).replace(", ...", "")
    return f"{field.name}: found {shown(value)}, wanted {text.replace('tuple', 'list').replace('None', 'null')}"


def size_problems(config: Config, may_be_zero: Collection[str], largest: dict[str, int],
                  judged_elsewhere: Collection[str]) -> list[str]:
    """Numbers that are not positive, or not 0 or more, or absurdly large."""
    problems = []
    for name in config.given_fields():
        value, most = getattr(config, name), largest.get(name, 2**31 - 1)
        if type(value) not in (int, float) or name in judged_elsewhere:
            continue
        if value < 0 or value == 0 and name not in may_be_zero:
            problems.append(f"{name}: found {value}, wanted {'0 or more' if name in may_be_zero else 'more than 0'}")
        elif value > most:
            problems.append(f"{name}: found {value}, wanted at most {most}")
    return problems


def choice_problems(config: Config, choices: dict[str, Collection]) -> list[str]:
    """Fields that have a value which is not implemented."""
    problems = []
    for name, values in choices.items():
        if getattr(config, name) not in values:
            wanted = f"one of {', '.join(values)}" if len(values) > 1 else f"{values[0]!r}: nothing else is implemented"
            problems.append(f"{name}: found {shown(getattr(config, name))}, wanted {wanted}")
    if config.dtype and config.torch_dtype and config.dtype != config.torch_dtype:
        problems.append(f"dtype: found {shown(config.dtype)}, but torch_dtype says {shown(config.torch_dtype)}; "
                        "keep one of them")
    return problems


def order_problems(config: Config, orders: Collection[tuple[str, str, str]]) -> list[str]:
    """Of (field, another, why the first must not be smaller) those in which it is."""
    return [f"{name}: found {getattr(config, name)}, wanted at least {least} = {getattr(config, least)}: {why}"
            for name, least, why in orders if getattr(config, name) < getattr(config, least)]


def rope_thetas(fields: dict[str, Any]) -> list[Any]:
    """What a config.json gives as rope_theta, in the order in which it counts."""
    places = (fields, *_rope_dicts(fields).values())
    return [place["rope_theta"] for place in places if place.get("rope_theta") is not None]


def rope_problems(fields: dict[str, Any]) -> list[str]:
    """Only plain rotary embeddings are implemented; scaling by a factor of 1 changes nothing and is let through."""
    problems, top = [], fields.get("rope_theta")
    for name, place in _rope_dicts(fields).items():
        kind = place.get("rope_type", place.get("type", "default"))
        without_effect = kind in ("linear", "yarn", "deepseek_yarn") and place.get("factor") == 1 \
            and place.get("attention_factor") in (None, 1)
        if kind != "default" and not without_effect:
            problems.append(f"{name}: found rope type {shown(kind)} with factor {shown(place.get('factor'))}, "
                            "wanted \"default\": rope scaling is not implemented")
        theta = place.get("rope_theta", 1.0)
        if type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 0:
            problems.append(f"{name}: rope_theta is {shown(theta)}, wanted a positive number")
        elif "rope_theta" in place and top not in (None, theta):
            problems.append(f"rope_theta: found {top!r}, but {name} says {theta!r}; keep the right one")
    if top is not None and top <= 0:
        problems.append(f"rope_theta: found {top!r}, wanted a positive number")
    return problems


def _rope_dicts(fields: dict[str, Any]) -> dict[str, dict]:
    """The two places beside the top level where a config.json may speak of rotary embeddings."""
    return {name: fields[name] for name in ("rope_parameters", "rope_scaling") if isinstance(fields.get(name), dict)}


def shown(value: Any) -> str:
    """A value as a message shows it: a damaged file may have made it long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def listed(numbers: list[int]) -> str:
    """The first few numbers of a list that a damaged file may have made long."""
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
