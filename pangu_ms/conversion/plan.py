"""The plan of a conversion: everything it will write, to the last byte of a header, before it writes anything."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import FLOAT32, check_ranks, layer_prefix, parameters
from pangu_ms.checkpoint.dtypes import CARRIERS, CODES
from pangu_ms.checkpoint.layout import LayoutTensor, released, stacked
from pangu_ms.checkpoint.shards import SINGLE_FILE, file_header
from pangu_ms.checkpoint.source import Source
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks

SHARD_SIZE = 4 * 10**9


@dataclass(frozen=True)
class Options:
    """What the user may ask of a conversion.

    Attributes:
        to: layout to write, "stacked" or "released".
        dtype: "keep", "float32", "float16" or "bfloat16".
        shard_size: of the largest shard, in bytes.
        mtp: keep the MTP layers.
        mtp_copies: write the release's copies of embedding and head.
        layers: first and last trunk layer to keep; None for all.
        dequantize: turn the Int8 release into floats.
        ranks: the ranks to slice for.
    """

    to: str
    dtype: str = "keep"
    shard_size: int = SHARD_SIZE
    mtp: bool = True
    mtp_copies: bool = True
    layers: tuple[int, int] | None = None
    dequantize: bool = False
    ranks: Ranks = Ranks()


@dataclass(frozen=True)
class Shard:
    """A file to write: its header, and the tensors that follow in this order.

    The slices of the tensors name parameters of the checkpoint that is read, whose layers may have other numbers.
    """

    name: str
    header: bytes
    tensors: tuple[LayoutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A directory to write.

    Attributes:
        config: of the model that is written.
        ranks: the ranks it is sliced for, seen from the one whose directory it is.
        digest: names the conversion. It is the same for an interrupted one and for all ranks of one.
    """

    config: Config
    shards: tuple[Shard, ...]
    ranks: Ranks
    digest: str

    @property
    def tensors(self) -> list[LayoutTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def plan_conversion(source: Source, options: Options) -> list[Plan]:
    """Plan a conversion: one directory for each rank.

    Raises:
        CheckpointError: the source has not the layout, formats or layers that the options ask for.
        ConfigError: the ranks would cut through a head, a row or an expert.
    """
    if source.int8 != options.dequantize:
        raise CheckpointError(
            f"{source.directory}: is the Int8 release; add --dequantize to turn its int8 weights into floats"
            if source.int8 else f"{source.directory}: holds no int8 weights; leave out --dequantize")
    known = parameters(source.config)
    # A model without experts has the same tensors in both layouts. Nothing tells which of them the source is.
    if options.to == source.layout == "released" and not source.adapter and any(p.name not in p.sources for p in known.values()):
        raise CheckpointError(f"{source.directory}: already has the Hugging Face layout; ms2hf reads one of ours")
    trunk = len(source.config.plan.trunk)
    first, last = options.layers or (0, trunk - 1)
    if not 0 <= first <= last < trunk:
        raise CheckpointError(f"--layers {first}-{last}: wanted a range within 0-{trunk - 1}, the trunk's layers")
    config = source.config.cut(first, last, options.mtp)
    # Layer to write -> layer to read: trunk layers move down by `first`, MTP layers follow the trunk.
    removed = trunk - len(config.plan.trunk)
    origin = {p.index: p.index + (removed if p.mtp_depth else first) for p in config.plan.layers}

    def planned(tensor: LayoutTensor) -> LayoutTensor:
        """The tensor with slices of the source's parameter and the format to write it in."""
        p = tensor.parameter
        name = p.name
        if p.layer:
            name = layer_prefix(origin[p.layer.index]) + name.removeprefix(layer_prefix(p.layer.index))
        found = list(known[name].shape) if name in known else "no such tensor"
        if found != list(p.shape):  # nothing would fill the rest of it
            raise CheckpointError(f"--layers {first}-{last}: the layers kept want {name} {list(p.shape)}, the model "
                                  f"that is read has {found}; convert all layers, this model cannot be cut there")
        slices = tuple(dataclasses.replace(part, parameter=known[name]) for part in tensor.slices)
        stored_as = {(stored.scale or stored).dtype for part in slices for _, stored in source.held[name, part.member]}
        if options.dtype != "keep":
            dtype = "F32" if p.note == FLOAT32 else CODES[options.dtype]
        elif len(stored_as) == 1:
            dtype = stored_as.pop()
        else:
            raise CheckpointError(f"{source.directory}: the parts of {name} are stored as "
                                  f"{' and '.join(sorted(stored_as))}; choose one format with --dtype")
        return dataclasses.replace(tensor, slices=slices, dtype=dtype)

    config = _describe(config, options)
    digest = _digest(source, config, options)
    if options.to == "released":
        layouts = [released(config, options.mtp_copies and config.tensors.copies_known)]
    else:
        check_ranks(config, options.ranks)
        layouts = [stacked(config, options.ranks.at(rank)) for rank in range(options.ranks.count)]
    tensors = [[planned(tensor) for tensor in layout] for layout in layouts]
    return [Plan(config, into_shards(each, options.shard_size), options.ranks.at(rank), digest)
            for rank, each in enumerate(tensors)]


def _describe(config: Config, options: Options) -> Config:
    """The config to write beside the tensors: it names their number format."""
    fields = config.to_dict()
    if options.dequantize:
        fields.pop("quantization_config", None)
    if options.dtype != "keep":
        for name in [name for name in ("dtype", "torch_dtype") if fields.get(name)] or ["dtype"]:
            fields[name] = options.dtype
    return type(config).from_dict(fields)


def into_shards(tensors: list[LayoutTensor], shard_size: int) -> tuple[Shard, ...]:
    """Deal tensors in their order to files of at most `shard_size` bytes of tensors; a larger one has its own file."""
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # Wide formats first, so that every tensor lies at a multiple of its item size.
        group.sort(key=lambda tensor: -CARRIERS[tensor.dtype].itemsize)
        header = file_header((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in group)
        shards.append(Shard(name, header, tuple(group)))
    return tuple(shards)


def _digest(source: Source, config: Config, options: Options) -> str:
    """A hash of all that decides the output: names, sizes and times of the files read, the configs, the options."""
    text = json.dumps([1, source.identity, source.config.to_dict(), config.to_dict(), dataclasses.asdict(options)])
    return hashlib.sha256(text.encode()).hexdigest()
