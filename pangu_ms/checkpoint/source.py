"""A checkpoint of any layout, checked against its config: it knows which stored bytes make which tensor.

`Source` opens a directory, recognises its layout, and accounts for every tensor before it reads any values. One error
names all tensors that are missing, unexpected, or of a wrong shape or dtype.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterator

import numpy as np
from tqdm import tqdm

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import INT8, computed_tensors, mtp_copies, parameters, spellings
from pangu_ms.checkpoint.copying import BLOCK, Copy, fill, same_bytes, steps
from pangu_ms.checkpoint.directory import checkpoint_directory, rank_directories, read_config
from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.checkpoint.layout import LayoutTensor, Slice, released, stacked
from pangu_ms.checkpoint.manifest import manifest_ranks, read_manifest, read_ranks
from pangu_ms.checkpoint.shards import Shards, StoredTensor
from pangu_ms.errors import CheckpointError, ConfigError
from pangu_ms.parallel.ranks import Ranks

LISTED = 20  # tensors named per kind of problem


def open_source(directory: str | os.PathLike) -> "Source":
    """The checkpoint of a directory, whole, in ranks, or the newest of a run, with the config that lies beside it.

    Raises:
        CheckpointError: a file is damaged or missing, or the tensors do not fit the config.
        ConfigError: config.json is missing or refused.
    """
    directory = checkpoint_directory(directory)  # once: a run that goes on writes newer ones
    return Source(directory, read_config(directory))


class Source:
    """A checkpoint open for reading.

    Attributes:
        layout: "released", "stacked" or "sliced". A model without experts has the same tensors in the first two: it
            counts as "released".
        int8: whether it is the quantised release.
        held: where each matrix of a parameter lies: (name, member) -> its slices, each with the tensor that stores it.
        repeats: tensors that must equal another one (MTP copies, what several ranks hold), paired with that one.
        computed: names of tensors that are there and follow from the config: nothing reads them.
    """

    def __init__(self, directory: str | os.PathLike, config: Config, reader: Ranks | None = None):
        """Open a directory and check it; errors as in `open_source`.

        Args:
            reader: the rank that will read its part. Of a directory sliced for the same ranks nothing else is opened.
        """
        self.directory = checkpoint_directory(directory)
        self.config = config
        self.adapter = None  # of `Merged`
        self._reader = reader and reader.model
        self.held: dict[tuple[str, int], list[tuple[Slice, StoredTensor]]] = {}
        self.repeats: list[tuple[StoredTensor, StoredTensor]] = []
        self.computed: list[str] = []
        self.int8 = False
        self.shards: list[Shards] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        directories = rank_directories(self.directory)
        if directories:
            self.layout, ranks = "sliced", read_ranks(self.directory, directories)
            same = self._reader is not None and self._reader.at(0) == ranks
            for rank in [self._reader.rank] if same else range(ranks.count):
                self.shards.append(Shards(directories[rank]))
                self._account(self.shards[-1], stacked(self.config, ranks.at(rank)))
            return
        manifest = read_manifest(self.directory)
        if manifest and manifest_ranks(manifest).count > 1:
            raise CheckpointError(f"{self.directory}: is rank {manifest_ranks(manifest).rank} of a sliced checkpoint; "
                                  "give the directory that holds all rank_* directories")
        shards = Shards(self.directory)
        self.shards.append(shards)
        # A model without experts has no such names: the two layouts have the same tensors.
        if any(p.name not in p.sources and p.name in shards.tensors for p in parameters(self.config).values()):
            self.layout = "stacked"
            self._account(shards, stacked(self.config))
        else:
            self.layout = "released"
            self._account(shards, released(self.config))

    def close(self) -> None:
        for shards in self.shards:
            shards.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def tensors(self) -> list[StoredTensor]:
        return [tensor for shards in self.shards for tensor in shards.tensors.values()]

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change (ns) of every file: they tell whether the checkpoint is still the same."""
        return [(os.path.relpath(file.name, self.directory), stat.st_size, stat.st_mtime_ns)
                for shards in self.shards for file in shards.files for stat in [os.fstat(file.fileno())]]

    def _account(self, shards: Shards, wanted: list[LayoutTensor]) -> None:
        """Give every stored tensor its place; `CheckpointError` names tensors without one and places left empty."""
        found = dict(shards.tensors)
        int8 = self.layout == "released" and any(
            w.parameter.note == INT8 and w.name in found and found[w.name].dtype == "I8" for w in wanted)
        self.int8 |= int8
        if self.layout == "released":
            self.computed = sorted(computed_tensors(self.config) & found.keys())
            for name in self.computed:
                del found[name]
            for other, name in spellings(self.config).items():
                if other in found and name not in found:
                    found[name] = found.pop(other)
        missing: dict[str, tuple[int, ...]] = {}
        wrong: list[str] = []

        def take(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> StoredTensor | None:
            stored = found.pop(name, None)
            if stored is None:
                missing[name] = shape
            elif stored.shape != shape or stored.dtype not in dtypes:
                wrong.append(f"{name}: found {stored.dtype} {list(stored.shape)}, "
                             f"wanted {' or '.join(dtypes)} {list(shape)}")
            return stored

        floats = ("F32", "F16", "BF16")
        copies = mtp_copies(self.config)
        for tensor in wanted:
            if tensor.name in copies and tensor.name not in found:  # a smaller checkpoint leaves them out
                continue
            quantised = int8 and tensor.parameter.note == INT8
            stored = take(tensor.name, tensor.shape, ("I8",) if quantised else floats)
            scale = take(f"{tensor.name}_scale", (tensor.rows, 1), floats) if quantised else None
            if stored is None:
                continue
            if scale:
                stored = dataclasses.replace(stored, scale=scale)
            for part in tensor.slices:
                others = self.held.setdefault((part.parameter.name, part.member), [])
                same = [other for held, other in others if (held.row, held.column) == (part.row, part.column)]
                if not same:
                    others.append((part, stored))
                elif part is tensor.slices[0]:                                  # what repeats one, repeats the others
                    self.repeats.append((stored, same[0]))
        if missing or found or wrong:
            kinds = {"missing": [f"{name} {list(shape)}" for name, shape in missing.items()],
                     "unexpected": sorted(found), "wrong": wrong}
            hints = self._mtp_hints(wanted, missing.keys(), found.keys())
            if any(name.endswith(self.config.tensors.quantised) for name in found):
                hints.append("Some belong to a quantised release, which is not supported; fetch the bfloat16 one")
            if self.int8 and wrong:
                hints.append("Tensors of the Int8 release and of the bfloat16 one are never mixed; fetch one of them "
                             "whole")
            raise CheckpointError("\n".join([f"{shards.directory}: the tensors do not fit config.json",
                                             *_listed(kinds), *hints]))

    def _mtp_hints(self, wanted: list[LayoutTensor], missing: Collection[str],
                   unexpected: Collection[str]) -> list[str]:
        """What to set in config.json when it speaks of more or fewer MTP layers than the checkpoint has."""
        field, layers = self.config.MTP_FIELD, self.config.plan.mtp_layers
        if field is None:
            return []
        hints, says = [], f"config.json says {field} {len(layers)}"
        numbers = {int(match[1]) for name in unexpected if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))}
        depth = max(numbers, default=0) - len(self.config.plan.trunk) + 1
        if depth > len(layers) and self._holds_mtp(depth, unexpected):
            hints.append(f"{says}, the checkpoint holds {depth} MTP layers: set it to {depth} (pangu-convert --mtp "
                         "drop then makes a directory without them)")
        absent = sum(all(tensor.name in missing for tensor in wanted if tensor.parameter.layer is layer)
                     for layer in layers)
        if absent:
            hints.append(f"{says}, {absent} of these layers are not there: set it to {len(layers) - absent} to do "
                         "without them")
        return hints

    def _holds_mtp(self, depth: int, unexpected: Collection[str]) -> bool:
        """Whether the unexpected tensors include all that `depth` MTP layers have more than the config's."""
        known = len(self.config.plan.mtp_layers)
        try:
            deeper = dataclasses.replace(self.config, **{self.config.MTP_FIELD: depth})
        except ConfigError:
            return False
        return any(all(tensor.name in unexpected for tensor in layout(deeper)
                       if tensor.parameter.layer and tensor.parameter.layer.mtp_depth > known)
                   for layout in (released, stacked))

    def check_repeats(self) -> None:
        """Compare byte by byte what is stored more than once; `CheckpointError` names the first that differs."""
        for one, other in tqdm(self.repeats, desc="compare repeats", unit="tensor", disable=None, leave=False):
            if one.dtype != other.dtype or one.nbytes != other.nbytes or not same_bytes(one, other):
                raise CheckpointError(f"{one.file.name}: {one.name} differs from {other.name} in "
                                      f"{other.file.name}, which it must repeat; fetch both files again")

    def copies(self, tensor: LayoutTensor) -> list[Copy]:
        """The copies that make `tensor`, which may be of any layout of this checkpoint's parameters."""
        found = []
        for part in tensor.slices:
            for held, stored in self.held[part.parameter.name, part.member]:
                row, column = max(part.row, held.row), max(part.column, held.column)
                rows = min(part.row + part.rows, held.row + held.rows) - row
                columns = min(part.column + part.columns, held.column + held.columns) - column
                if rows > 0 and columns > 0:
                    found.append(Copy(stored, held.columns, held.at + row - held.row, column - held.column,
                                      part.at + row - part.row, column - part.column, rows, columns))
        return found

    def blocks(self, tensor: LayoutTensor) -> Iterator[tuple[np.ndarray, int]]:
        """`tensor` in its dtype, some rows at a time: (values [rows, columns], how many finite ones became infinite).

        A block is valid until the next one is asked for, which may overwrite it.
        """
        buffer = np.empty(BLOCK, np.uint8)
        carrier = CARRIERS[tensor.dtype]
        for first, rows, band in steps(self.copies(tensor), tensor):
            nbytes = rows * tensor.columns * carrier.itemsize
            if nbytes > len(buffer):  # one row may be longer than a block
                buffer = np.empty(nbytes, np.uint8)
            values = buffer[:nbytes].view(carrier).reshape(rows, tensor.columns)
            yield values, self.fill(tensor, band, first, values)

    def fill(self, tensor: LayoutTensor, copies: list[Copy], first: int, out: np.ndarray) -> int:
        """`copying.fill` of `tensor`, all of whose `copies` that make these rows are given."""
        return fill(copies, first, out, tensor.dtype)


def _listed(kinds: dict[str, list[str]]) -> Iterator[str]:
    """The lines of a message that names tensors by what is wrong with them, at most `LISTED` of each kind."""
    for kind, names in kinds.items():
        if names:
            yield f"{len(names)} {kind}:"
            yield from (f"  {name}" for name in names[:LISTED])
            if len(names) > LISTED:
                yield f"  ... and {len(names) - LISTED} more"
