"""Every tensor of a model: its name, its shape, how ranks share it, what it counts as. Needs no MindSpore.

An architecture lists its tensors in a `Table`; its config says what the words in it mean. Our names are those of the
released checkpoint, with two differences. The routed experts of a layer are stacked into one tensor for each
projection, [experts, rows, columns]. The copies of the embedding and of the head that a release stores in each MTP
layer do not exist here; `mtp_copies` names them.
"""
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import Layer
from pangu_ms.parallel.ranks import Ranks

# How ranks share a tensor: what is cut, over which parallel dimension, and the unit that must not be cut through.
WHOLE = ()
EXPERT = ("members", "expert", "experts")
ROWS, HEAD_ROWS = ("rows", "tensor", None), ("rows", "tensor", "heads")
KV_HEAD_ROWS = ("rows", "tensor", "kv_heads")
COLUMNS, HEAD_COLUMNS = ("columns", "tensor", None), ("columns", "tensor", "heads")
KV_HEAD_COLUMNS = ("columns", "tensor", "kv_heads")

INT8 = "int8"        # the Int8 release stores it as int8 with a `_scale` beside it (section 10)
FLOAT32 = "float32"  # stays float32 in a bfloat16 checkpoint: rounding it would change which experts are chosen

# Initial values. OUTPUT writes to the residual; ROUTED belongs to routers and routed experts.
NORMAL, OUTPUT, ROUTED, ROUTED_OUTPUT, EMBEDDING = "normal", "output", "routed", "routed output", "embedding"
ONE, ZERO, ALPHA, STREAM_GATES = "one", "zero", "alpha", "stream gates"
POST_ATTENTION_NORM, POST_MLP_NORM = "post attention norm", "post mlp norm"  # norms behind a sublayer

MATRICES = {"attention", "indexer", "dense_mlp", "expert", "shared_expert", "mtp_input"}  # components of linear maps


@dataclass(frozen=True)
class Table:
    """The tensors of an architecture.

    A row is (name, shape in words of `config.sizes`, how it is cut, component, storage note, initial values).

    Attributes:
        first, last: rows of what is stored before and behind the layers.
        layers: pairs (condition on a `Layer`, rows); names go below "model.layers.{i}.".
        copies: stored a second time in every MTP layer of the release: name below the layer -> what it repeats.
        copies_known: whether it is known that the release stores them. If not they are read and never written.
        computed: names below a layer that a release may store although they follow from the config: never read.
        spellings: other name below a layer that a file may give a tensor -> the release's.
        quantised: how names end that only a quantised release has, which is refused.
    """

    first: tuple[tuple, ...]
    layers: tuple[tuple[Callable[[Layer], bool], tuple[tuple, ...]], ...]
    last: tuple[tuple, ...]
    copies: dict[str, str]
    copies_known: bool = True
    computed: tuple[str, ...] = ()
    spellings: dict[str, str] = field(default_factory=dict)
    quantised: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """One cut of a tensor among ranks: `axis` of `members` | `rows` | `columns`, over `tensor` | `expert` ranks."""

    axis: str
    over: str
    units: int  # the number of ranks must divide it: a head, an expert or a row is never cut through
    unit: str


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model under our name.

    `sources` are the release's names of it: itself, or one for each routed expert along the first axis. Seen as rows
    and columns, a parameter is `members` matrices of `rows` x `columns`: one for each expert, or one.

    Attributes:
        row_pattern: (periods, sizes): the rows are `periods` times the sizes in turn. What stands at one place of the
            pattern, over all periods, is one linear map: the nope rows of all heads, for example. Ranks that share the
            rows share the periods; of a single period each of them has a part of every size, one below the other.
        layer: of the plan; None for what belongs to no layer.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    splits: tuple[Split, ...]
    note: str | None  # INT8, FLOAT32 or None
    initial: str
    sources: tuple[str, ...]
    row_pattern: tuple[int, tuple[int, ...]]
    layer: Layer | None

    @property
    def stacked(self) -> bool:
        return self.sources != (self.name,)

    @property
    def members(self) -> int:
        return len(self.sources)

    @property
    def member_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def rows(self) -> int:
        return self.member_shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.member_shape[1:])

    @property
    def shared_rows(self) -> tuple[int, ...]:
        """The rows in parts, of each of which ranks that share the rows have one piece."""
        periods, sizes = self.row_pattern
        return sizes if periods == 1 else (self.rows,)

    def joined_pattern(self, parts: int) -> tuple[int, tuple[int, ...]]:
        """`row_pattern` of what so many ranks hold, one below the other."""
        if len(self.shared_rows) == 1:
            return self.row_pattern
        return parts, tuple(size // parts for size in self.shared_rows)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear map between hidden vectors, or some: no table, gate, filter or vector."""
        return self.component in MATRICES and len(self.member_shape) == 2

    def split_over(self, dimension: str) -> Split | None:
        """How the ranks of a dimension share it, if they do."""
        return next((split for split in self.splits if split.over == dimension), None)

    def local_shape(self, ranks: Ranks) -> tuple[int, ...]:
        """Of what one of the ranks holds; all hold equally much."""
        shape, axes = list(self.shape), ("members", "rows", "columns")[0 if self.stacked else 1:]
        for split in self.splits:
            shape[axes.index(split.axis)] //= ranks.size(split.over)
        return tuple(shape)


def parameters(config) -> dict[str, Parameter]:
    """Every parameter of the model by its name, in the order they are stored: embedding, layers, head.

    A config keeps the dict once it is made, as a cached property does. So it must not be changed.
    """
    if "_parameters" not in vars(config):
        vars(config)["_parameters"] = _parameters(config)
    return vars(config)["_parameters"]


def extended(config, more: dict[str, Parameter]):
    """A copy of a config whose `parameters` are `more` besides: those of an adapter that stands beside the model's."""
    found = copy.copy(config)
    vars(found)["_parameters"] = parameters(config) | more
    return found


def _parameters(config) -> dict[str, Parameter]:
    table = config.tensors
    found = [_parameter(config, row, "", None) for row in table.first]
    for layer in config.plan.layers:
        for applies, rows in table.layers:
            if applies(layer):
                found += [_parameter(config, row, layer_prefix(layer.index), layer) for row in rows]
    found += [_parameter(config, row, "", None) for row in table.last]
    return {parameter.name: parameter for parameter in found}


def mtp_copies(config) -> dict[str, str]:
    """The release's repetitions of embedding and head: name of the copy -> name of the parameter it repeats."""
    return {layer_prefix(layer.index) + copy: original
            for layer in config.plan.mtp_layers for copy, original in config.tensors.copies.items()}


def computed_tensors(config) -> set[str]:
    """Names of tensors that a release may store and nothing reads, because they follow from the config."""
    return {layer_prefix(layer.index) + name for layer in config.plan.layers for name in config.tensors.computed}


def spellings(config) -> dict[str, str]:
    """Other names that a released file may give tensors -> their names."""
    return {layer_prefix(layer.index) + other: layer_prefix(layer.index) + name
            for layer in config.plan.layers for other, name in config.tensors.spellings.items()}


def has_gradient(name: str) -> bool:
    """The routers' selection biases have none: they follow the experts' load instead."""
    return not name.endswith("e_score_correction_bias")


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def _parameter(config, row: tuple, prefix: str, layer: Layer | None) -> Parameter:
    name, words, splits, component, note, initial = row
    sizes, words = config.sizes, words.split()
    shape = tuple(sizes[word] for word in words)
    sources, member_words = (prefix + name,), words
    if component == "expert":
        head, tail = name.split("experts.")
        sources = tuple(f"{prefix}{head}experts.{e}.{tail}" for e in range(shape[0]))
        member_words = words[1:]
    rows, *columns = (sizes[word] for word in member_words)
    cut = {"rows": rows, "columns": math.prod(columns)}
    resolved = tuple(Split(axis, over, sizes[unit] if unit else cut[axis], unit or axis) for axis, over, unit in splits)
    pattern = config.row_patterns.get(member_words[0], (1, (rows,)))
    return Parameter(prefix + name, shape, component, resolved, note, initial, sources, pattern, layer)


def count_parameters(config) -> dict:
    """Numbers of parameters (section 2.2).

    `components`: of the trunk, by component. `trunk`, `mtp` (all MTP layers), `trunk_and_mtp`, `with_copies` (as the
    release stores them). `active`: used for one token by the trunk, `layers` alone, then `with_head`, then
    `with_head_and_embedding`, where a tied head is the embedding and counts once.
    """
    found = parameters(config)
    components: dict[str, int] = {}
    idle = 0  # parameters of the trunk's experts that a token does not go to
    for p in found.values():
        if p.layer is None or p.layer.mtp_depth == 0:
            components[p.component] = components.get(p.component, 0) + p.count
            if p.component == "expert":
                idle += p.count // p.members * (p.members - p.layer.feed_forward.experts_per_token)
    trunk, total = sum(components.values()), sum(p.count for p in found.values())
    copies = sum(found[original].count for original in mtp_copies(config).values()) * config.tensors.copies_known
    embedding, tied = components["embedding"], config.plan.tied_head
    layers = trunk - idle - embedding - (0 if tied else components["head"])
    return {
        "components": components, "trunk": trunk, "mtp": total - trunk, "trunk_and_mtp": total,
        "with_copies": total + copies,
        "active": {"layers": layers, "with_head": trunk - idle - (0 if tied else embedding),
                   "with_head_and_embedding": trunk - idle},
    }


def fitting(config, dimension: str) -> list[int]:
    """The numbers of `tensor` or `expert` ranks that cut through no head, expert or row; all without any to share."""
    units = math.gcd(*(split.units for p in parameters(config).values() if (split := p.split_over(dimension))))
    return [n for n in range(1, units + 1) if units % n == 0] or [1]


def check_ranks(config, ranks: Ranks) -> None:
    """`ConfigError` when ranks would cut through a head, a row or an expert; it says which numbers would fit."""
    problems = []
    for dimension in ("tensor", "expert"):
        size, cut = ranks.size(dimension), {}
        for name, p in parameters(config).items():
            split = p.split_over(dimension)
            if split and split.units % size:
                cut.setdefault(f"{split.units} {split.unit}", name.removeprefix(layer_prefix(p.layer.index))
                               if p.layer else name)
        if cut:
            found = ", ".join(f"{units} ({name})" for units, name in cut.items())
            problems.append(f"{dimension} parallel {size} does not divide {found}: take one of "
                            f"{', '.join(map(str, fitting(config, dimension)))}")
    if problems:
        raise ConfigError("; ".join(problems))
