"""Tables of a YAML file's keys: what each may hold, and whether it is applied or refused. Imports no framework.

A table is a dictionary from a key to `Applied`, `Refused` or a `Section` with a table of its own.
"""
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pangu_ms.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A kind of value: `read` gives what a value means, or raises ValueError; `wanted` says what would do."""

    wanted: str
    read: Callable[[Any], Any]


def _require(condition, value):
    if not condition:
        raise ValueError
    return value


def as_number(value):
    """A float; text too where it means one: YAML 1.1 takes 4e-3 for text. ValueError for all else."""
    number = float(_require(type(value) in (int, float, str), value))
    return _require(math.isfinite(number), number)


def number(wanted: str, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Kind:
    def read(value):
        found = as_number(value)
        return _require(least <= found <= most and found > above, found)
    return Kind(wanted, read)


def integer(least: int, most: float = math.inf) -> Kind:
    wanted = f"an integer of at least {least}" if most == math.inf else f"an integer from {least} to {most}"
    return Kind(wanted, lambda value: _require(type(value) is int and least <= value <= most, value))


def choice(*values) -> Kind:
    """One of these values; 1 is not True here."""
    return Kind(" or ".join(repr(value) for value in values), lambda value: _require(
        any(type(value) is type(each) and value == each for each in values), value))


def or_none(kind: Kind, *others) -> Kind:
    return Kind(kind.wanted, lambda value: value if value is None or value in others else kind.read(value))


def numbers_in(value):
    """The same value, with numbers where text means them, in lists too: its owner looks at the rest."""
    if isinstance(value, list):
        return [numbers_in(each) for each in value]
    try:
        return as_number(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _memory(value):
    return _require(isinstance(value, str) and value.endswith("GB") and as_number(value[:-2]) > 0, value)


ANY = Kind("anything", lambda value: value)
BOOL = choice(True, False)
POSITIVE, NOT_NEGATIVE = number("a number above 0", above=0), number("a number of at least 0", least=0)
RATIO = number("a number from 0 to 1", least=0, most=1)
NUMBERS = Kind("a number", numbers_in)
TEXT = Kind("text", lambda value: _require(isinstance(value, str) and value, value))
PATH = Kind("a path", lambda value: _require(value is None or isinstance(value, str), value))
MEMORY = Kind("such as 58GB", _memory)
MAPPING = Kind("keys and values", lambda value: _require(isinstance(value, dict), value))


@dataclass(frozen=True)
class Applied:
    """A key that does something.

    Attributes:
        does: what, in a few words.
        kind: of its values.
        needed: its section must have it.
    """

    does: str
    kind: Kind = ANY
    needed: bool = False


@dataclass(frozen=True)
class Refused:
    """A key whose effect there is none of, or a type that does not fit.

    Attributes:
        why: ends the message, and says what to do.
        off: values that ask for nothing, or for what is done anyway. None always does. A dictionary among them stands
            for each of its parts: a section that has some of its values is off.
    """

    why: str
    off: tuple = ()

    def allows(self, value) -> bool:
        return value is None or any(value == each or isinstance(each, Mapping) and isinstance(value, Mapping) and
                                    value.items() <= each.items() for each in self.off)


@dataclass(frozen=True)
class Section:
    """Keys and values.

    Attributes:
        does: what the section is for, in a few words.
        keys: its table; of a section with a type, the keys of every type.
        types: where the section has a `type`: the table of each; None for one that looks at its keys itself.
        many: a list of such sections.
    """

    does: str
    keys: dict[str, Any] = field(default_factory=dict)
    types: dict[str, dict[str, Any] | Refused | None] | None = None
    many: bool = False


def read_section(name: str, given: dict[str, Any], table: dict[str, Any], of: str | None = None) -> dict[str, Any]:
    """The values of a section as they are meant.

    Args:
        name: dotted, for messages; "" for the whole file.
        given: its keys and values.
        of: what messages call the section where that is not its name.

    Raises:
        ConfigError: the first key that is unknown, refused, missing, or holds what it cannot.
    """
    read = {}
    for key, value in given.items():
        full = f"{of or name}.{key}" if name else str(key)
        entry = table.get(key)
        if entry is None:
            noun = "section" if not name and isinstance(value, (dict, list)) else "key"
            raise ConfigError(f"{full}: no such {noun}" + nearest(key, table))
        if isinstance(entry, Refused):
            if not entry.allows(value):
                wanted = " or ".join(repr(each) for each in entry.off if not isinstance(each, Mapping)) or "none"
                raise ConfigError(f"{full}: found {_short(value)}, wanted {wanted}: {entry.why}")
            read[key] = value
        elif isinstance(entry, Section):
            read[key] = _read_nested(full, value, entry)
        else:
            read[key] = _read_value(full, value, entry.kind)
    for key, entry in table.items():
        if isinstance(entry, Applied) and entry.needed and key not in given:
            raise ConfigError(f"{of or name}.{key}: missing, wanted {entry.kind.wanted}")
    return read


def nearest(key: Any, known, otherwise: str = "; leave it out") -> str:
    """The end of a message about an unknown key."""
    near = difflib.get_close_matches(str(key), [str(each) for each in known], 1)
    return f"; did you mean {near[0]}?" if near else otherwise


def _read_value(full, value, kind):
    try:
        return kind.read(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{full}: found {_short(value)}, wanted {kind.wanted}") from None


def _read_nested(full, value, entry):
    if value is None:
        return None
    if entry.many:
        if not isinstance(value, list):
            raise ConfigError(f"{full}: found {_short(value)}, wanted a list of sections (- type: ...)")
        return [_read_typed(f"{full}.{n}", each, entry, full) for n, each in enumerate(value)]
    return _read_typed(full, value, entry, None)


def _read_typed(full, value, entry, many):
    """A section; of a list `many`, messages about its keys call it by its type."""
    if not isinstance(value, dict):
        raise ConfigError(f"{full}: found {_short(value)}, wanted a section of keys and values")
    if entry.types is None:
        return read_section(full, value, entry.keys)
    kind = value.get("type")
    fits = [name for name, keys in entry.types.items() if not isinstance(keys, Refused)]
    if "auto_register" in value:  # a class of the user's, which knows its keys
        keys = None
    elif not isinstance(kind, str) or kind not in entry.types:
        wanted = f"found {kind!r}, wanted {'one of ' if len(fits) > 1 else ''}{', '.join(fits)}"
        near = nearest(kind, fits, "")
        raise ConfigError(f"{full}.type: " + (f"no {kind}{near}" if near else wanted))
    elif isinstance(keys := entry.types[kind], Refused):
        wanted = f", wanted {fits[0]}" if len(fits) == 1 else ""
        raise ConfigError(f"{full}.type: found {kind}{wanted}: {keys.why}")
    common = {"type": Applied("", ANY), **entry.keys}
    if keys is None:
        own = {key: each for key, each in value.items() if key not in entry.keys}
        return own | read_section(full, {key: value[key] for key in value if key in entry.keys}, entry.keys)
    return read_section(full, value, common | keys, f"{many}.{kind}" if many else None)


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def context_table(training: bool) -> Section:
    """`context` of a file for training, or for predict."""
    jit_level = choice("O0", "O1") if training else choice("O0")
    infer_boost = Refused("it chooses among operators of MindFormers' own inference", ("off", "on", False, True))
    precision = ("force_fp16", "allow_fp32_to_fp16", "allow_mix_precision", "must_keep_origin_dtype", "force_fp32",
                 "allow_fp32_to_bf16", "allow_mix_precision_fp16", "allow_mix_precision_bf16")
    ascend = {
        "precision_mode": Applied("of CANN's operators", choice(*precision)),
        "parallel_speed_up_json_path": Refused("its switches are for graphs that MindSpore divides", ("",)),
        "jit_compile": Applied("whether CANN compiles operators", BOOL),
        "atomic_clean_policy": Applied("how CANN clears memory", choice(0, 1)),
        "matmul_allow_hf32": Applied("HF32 in products", BOOL),
        "conv_allow_hf32": Applied("HF32 in convolutions", BOOL),
        "op_precision_mode": Applied("a file of precision modes", TEXT),
        "op_debug_option": Applied("CANN's checks of operators", TEXT),
        "hccl_watchdog": Applied("HCCL's watchdog", BOOL),
    }
    table = {
        "mode": Refused("the network is written for graph mode", (0, "GRAPH_MODE")),
        "device_target": Applied("the device", Kind("Ascend or CPU", choice("Ascend", "CPU").read)),
        "device_id": Applied("which of this machine's; msrun gives each process its own",
                             Kind("a number of at least 0", integer(0).read)),
        "max_device_memory": Applied("how much of the device's memory is used", MEMORY),
        "mempool_block_size": Applied("by how much the memory pool grows", MEMORY),
        "memory_optimize_level": Applied("whether MindSpore trades time for memory", choice("O0", "O1")),
        "max_call_depth": Applied("depth of calls in a graph", integer(1)),
        "save_graphs": Applied("whether compiled graphs are written", choice(False, True, 0, 1, 2, 3)),
        "save_graphs_path": Applied("where they are", TEXT),
        "jit_config": Section("the compiler", {"jit_level": Applied("how graphs are compiled", jit_level),
                                               "infer_boost": infer_boost}),
        "ascend_config": Section("CANN", ascend),
        "jit_level": Refused("give it in context.jit_config", () if training else ("O0",)),
        "infer_boost": infer_boost,
        "deterministic": Refused("train_precision_sync: True does it, in training", ("OFF", False)),
        "enable_graph_kernel": Refused("jit_config.jit_level says how graphs are compiled", (False,)),
        "graph_kernel_flags": Refused("jit_config.jit_level says how graphs are compiled", ("",)),
        "dataset_broadcast_opt_level": Refused("it goes with runner_config.sink_mode, which must be False", (0,)),
        "affinity_cpu_list": Refused("processes of pangu-generate are not bound to cores", ("None", False)),
        "affinity_config": Refused("processes of pangu-generate are not bound to cores", ({},)),
    }
    if training:  # MindFormers does it
        table["affinity_cpu_list"] = Applied("binds a process to cores", or_none(MAPPING, False, "None"))
        table["affinity_config"] = Applied("binds processes to cores, one by one", or_none(
            Kind("keys and values, or a .json file", lambda value: _require(isinstance(value, (dict, str)), value))))
    return Section("MindSpore's settings", table)
