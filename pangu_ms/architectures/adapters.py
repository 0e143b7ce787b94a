"""Low-rank adapters (LoRA, arXiv 2106.09685): which matrices of a model they stand beside, and their own tensors.

Beside a frozen matrix W stand A [rank, columns] and B [rows, rank]: y = W x + alpha / rank * B A x. The routed experts
of a layer have one pair each, stacked as they are. Names are those of PEFT: the module's, then `lora_A.weight` and
`lora_B.weight`. Needs no MindSpore.
"""
import re
from dataclasses import dataclass

from pangu_ms.architectures.tensors import NORMAL, ZERO, Parameter, parameters
from pangu_ms.errors import ConfigError

COMPONENT = "adapter"
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
TARGETS = "model.pet_config.target_modules"
LISTED = 3  # modules named in a message


@dataclass(frozen=True)
class Adapter:
    """What describes an adapter.

    Attributes:
        rank, alpha: the pair's product counts alpha / rank.
        dropout: share of a matrix's inputs that its pair does not see in training.
        target_modules: a regular expression that has to match the whole Hugging Face name of a module, as in PEFT.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(name: str) -> bool:
    """Whether this is the name of a tensor of an adapter."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def carries(p: Parameter) -> bool:
    """Whether a pair can stand beside a parameter: projections of attention, feed-forward, experts, MTP inputs."""
    return p.is_matrix and p.component != "indexer" and p.name.endswith(".weight")


def module(name: str) -> str:
    """The module that a tensor belongs to; what is no module's weight or bias stands for itself."""
    head, _, last = name.rpartition(".")
    return head if last in ("weight", "bias") else name


def targets(config, pattern: str) -> list[Parameter]:
    """The matrices whose modules a pattern matches as a whole.

    Raises:
        ConfigError: the pattern is no regular expression, matches nothing, something that carries no pair, or some of
            the experts of a layer and not all.
    """
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ConfigError(f"{TARGETS}: {pattern!r} is no regular expression ({error})") from None
    known, found, others = parameters(config), [], []
    for p in known.values():
        hits = [name for name in map(module, p.sources) if matches(name)]
        if carries(p) and hits:
            if len(hits) < p.members:
                raise ConfigError(f"{TARGETS}: {pattern!r} matches {len(hits)} of the {p.members} experts of "
                                  f"{module(p.name)}, such as {hits[0]}; match all of a layer: experts\\.\\d+")
            found.append(p)
        elif hits and not (f"{hits[0]}.weight" in known and carries(known[f"{hits[0]}.weight"])):   # no bias of one
            others += hits
    if others:
        raise ConfigError(f"{TARGETS}: {pattern!r} matches {_listed(others)}, which can carry no adapter; match "
                          "projections of attention, feed-forward and experts alone")
    if not found:
        examples = dict.fromkeys(re.sub(r"\d+", "0", module(p.sources[0])) for p in known.values() if carries(p))
        raise ConfigError(f"{TARGETS}: {pattern!r} matches the whole name of no module; their names are such as "
                          f"{_listed(list(examples))}")
    return found


def adapter_tensors(config, adapter: Adapter) -> dict[str, Parameter]:
    """The tensors of an adapter by name, A and B of each of its `targets` in turn."""
    pairs = [pair for p in targets(config, adapter.target_modules) for pair in (
        _tensor(p, LORA_A, (adapter.rank, p.columns), NORMAL), _tensor(p, LORA_B, (p.rows, adapter.rank), ZERO))]
    return {p.name: p for p in pairs}


def _tensor(p: Parameter, kind: str, shape: tuple[int, int], initial: str) -> Parameter:
    """One of the two that stand beside `p`, stacked as it is."""
    sources = tuple(f"{module(source)}.{kind}" for source in p.sources)
    shape = (p.members, *shape) if p.stacked else shape
    return Parameter(f"{module(p.name)}.{kind}", shape, COMPONENT, (), None, initial, sources, (1, (shape[-2],)),
                     p.layer)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
