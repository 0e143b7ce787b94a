"""What a conversion will write, down to the last header byte, decided before anything is written."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from pangu_ms.checkpoint.dtypes import CARRIERS, CODES
from pangu_ms.checkpoint.layout import Grid, Stored, check_grid, released, stacked
from pangu_ms.checkpoint.names import FLOAT32, layer_prefix, parameters
from pangu_ms.checkpoint.shards import SINGLE_FILE, file_header
from pangu_ms.checkpoint.source import Source
from pangu_ms.config import PanguConfig
from pangu_ms.errors import CheckpointError

SHARD_SIZE = 4 * 10**9


@dataclass(frozen=True)
class Options:
    """What the user may ask of a conversion. `layers`: first and last trunk layer to keep, both included."""

    to: str  # "stacked" or "released"
    dtype: str = "keep"
    shard_size: int = SHARD_SIZE
    mtp: bool = True
    mtp_copies: bool = True
    layers: tuple[int, int] | None = None
    dequantize: bool = False
    grid: Grid = Grid()


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write: `source` is its parameter's name in the checkpoint that is read."""

    stored: Stored
    dtype: str
    source: str

    @property
    def nbytes(self) -> int:
        return self.stored.rows * self.stored.columns * CARRIERS[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, and the tensors that follow in this order."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Plan:
    """One directory to write. `digest` names the conversion: equal for what can be resumed and for ranks to join."""

    config: PanguConfig
    shards: tuple[Shard, ...]
    grid: Grid
    rank: int
    digest: str

    @property
    def outputs(self) -> list[Output]:
        return [output for shard in self.shards for output in shard.outputs]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def plan_conversion(source: Source, options: Options) -> list[Plan]:
    """One plan per rank of the grid. `CheckpointError` or `ConfigError` names what cannot be done."""
    if source.int8 != options.dequantize:
        raise CheckpointError(
            f"{source.directory}: is the Int8 release; add --dequantize to turn its int8 weights into floats"
            if source.int8 else f"{source.directory}: holds no int8 weights; leave out --dequantize")
    if options.to == source.layout == "released":
        raise CheckpointError(f"{source.directory}: already has the Hugging Face layout; ms2hf reads one of ours")
    first, last = options.layers or (0, source.config.num_hidden_layers - 1)
    config = cut(source.config, first, last, options.mtp)
    # The layer of the output -> the layer that is read: trunk layers move down by `first`, MTP layers follow the trunk.
    removed = source.config.num_hidden_layers - config.num_hidden_layers
    origin = {p.index: p.index + (removed if p.mtp_depth else first) for p in config.layers}
    known = parameters(source.config)

    def output(stored: Stored) -> Output:
        p = stored.parameter
        name = p.name
        if p.plan:
            name = layer_prefix(origin[p.plan.index]) + name.removeprefix(layer_prefix(p.plan.index))
        assert known[name].shape == p.shape, f"{name}: the cut config wants another shape"
        stored_as = {h.scale.dtype if h.scale else h.entry.dtype
                     for m in {part.member for part in stored.parts} for h in source.held[name, m]}
        if options.dtype != "keep":
            dtype = "F32" if p.note == FLOAT32 else CODES[options.dtype]
        elif len(stored_as) == 1:
            dtype = stored_as.pop()
        else:
            raise CheckpointError(f"{source.directory}: the parts of {name} are stored as "
                                  f"{' and '.join(sorted(stored_as))}; choose one format with --dtype")
        return Output(stored, dtype, name)

    config = _describe(config, options)
    digest = _digest(source, config, options)
    if options.to == "released":
        layouts = [released(config, options.mtp_copies)]
    else:
        check_grid(config, options.grid)
        layouts = [stacked(config, options.grid, rank) for rank in range(options.grid.ranks)]
    return [Plan(config, into_shards([output(s) for s in layout], options.shard_size), options.grid, rank, digest)
            for rank, layout in enumerate(layouts)]


def cut(config: PanguConfig, first: int, last: int, mtp: bool) -> PanguConfig:
    """The config of trunk layers `first` to `last`, renumbered from 0, with or without the MTP layers."""
    trunk = config.num_hidden_layers
    if not 0 <= first <= last < trunk:
        raise CheckpointError(f"--layers {first}-{last}: wanted a range within 0-{trunk - 1}, the trunk's layers")
    if (first, last) == (0, trunk - 1) and (mtp or not config.num_nextn_predict_layers):
        return config
    kept = {i: i - first for i in range(first, last + 1)}
    if mtp:
        kept |= {p.index: last + 1 - first + p.mtp_depth - 1 for p in config.layers if p.mtp_depth}
    windows = {kept[p.index]: p.window for p in config.layers if p.index in kept and p.kind == "swa"}
    return dataclasses.replace(
        config,
        num_hidden_layers=last + 1 - first,
        num_nextn_predict_layers=config.num_nextn_predict_layers if mtp else 0,
        first_k_dense_replace=min(max(config.first_k_dense_replace - first, 0), last + 1 - first),
        dsa_layers=tuple(kept[i] for i in config.dsa_layers if i in kept),
        swa_layers=tuple(windows),
        # MTP layers that had no entry of their own get one: the default is the last entry, which may be gone.
        sliding_window_list=tuple(windows.values()) if config.sliding_window_list is not None else None,
        block_post_layernorm_idx=tuple(kept[i] for i in config.block_post_layernorm_idx or () if i in kept),
    )


def _describe(config: PanguConfig, options: Options) -> PanguConfig:
    """The config with the number format of the tensors that go with it."""
    fields = config.to_dict()
    if options.dequantize:
        fields.pop("quantization_config", None)
    if options.dtype != "keep":
        for name in [name for name in ("dtype", "torch_dtype") if fields.get(name)] or ["dtype"]:
            fields[name] = options.dtype
    return PanguConfig.from_dict(fields)


def into_shards(outputs: list[Output], shard_size: int) -> tuple[Shard, ...]:
    """Files of at most `shard_size` bytes of tensors each, unless one tensor alone is larger, in the given order."""
    groups, size = [[]], 0
    for output in outputs:
        if groups[-1] and size + output.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # Wide formats first, so that every tensor lies at a multiple of its item size.
        group.sort(key=lambda output: -CARRIERS[output.dtype].itemsize)
        header = file_header((output.stored.name, output.dtype, output.stored.shape, output.nbytes) for output in group)
        shards.append(Shard(name, header, tuple(group)))
    return tuple(shards)


def _digest(source: Source, config: PanguConfig, options: Options) -> str:
    """What decides every byte of the output: the files read, as far as their names, sizes and times tell, and how."""
    text = json.dumps([1, source.identity, source.config.to_dict(), config.to_dict(), dataclasses.asdict(options)])
    return hashlib.sha256(text.encode()).hexdigest()
