"""A checkpoint that has been checked against its config, whatever its layout: which stored bytes make which tensor.

`Source` opens a directory, recognises its layout, and accounts for every tensor before anything is read:
missing, unexpected, wrongly shaped and wrongly typed tensors are named in one error.
"""

import os
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from pangu_ms.checkpoint.dtypes import CARRIERS
from pangu_ms.checkpoint.layout import Grid, Stored, released, stacked
from pangu_ms.checkpoint.manifest import rank_directories, read_grid, read_manifest
from pangu_ms.checkpoint.names import INT8, layer_prefix, mtp_copies
from pangu_ms.checkpoint.shards import Entry, Shards
from pangu_ms.checkpoint.transfer import BLOCK, Held, Move, fill, same_bytes, steps
from pangu_ms.config import PanguConfig
from pangu_ms.errors import CheckpointError

LISTED = 20  # tensors named per kind of problem


class Source:
    """A checkpoint open for reading.

    `layout` is "released", "stacked" or "sliced"; `int8` tells the quantised release; `repeats` pairs each entry that
    must equal another (MTP copies, what several ranks hold) with that other. `reader`: a grid and a rank in it, which
    is all that is opened of a directory sliced by the same grid.
    """

    def __init__(self, directory: str | os.PathLike, config: PanguConfig, reader: tuple[Grid, int] | None = None):
        self.directory = os.fspath(directory)
        self.config, self.reader = config, reader
        self.held: dict[tuple[str, int], list[Held]] = {}
        self.repeats: list[tuple[Entry, Entry]] = []
        self.int8 = False
        self.shards: list[Shards] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        ranks = rank_directories(self.directory)
        if ranks:
            self.layout, grid = "sliced", read_grid(self.directory, ranks)
            same = self.reader is not None and self.reader[0] == grid
            for rank in [self.reader[1]] if same else range(grid.ranks):
                self.shards.append(Shards(ranks[rank]))
                self._account(self.shards[-1], stacked(self.config, grid, rank))
            return
        manifest = read_manifest(self.directory)
        if manifest and manifest["grid"]["tensor_parallel"] * manifest["grid"]["expert_parallel"] > 1:
            raise CheckpointError(f"{self.directory}: is rank {manifest['grid']['rank']} of a sliced checkpoint; "
                                  "give the directory that holds all rank_* directories")
        shards = Shards(self.directory)
        self.shards.append(shards)
        if any(name.endswith(".mlp.experts.gate_proj.weight") for name in shards.entries):
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
    def entries(self) -> list[Entry]:
        return [entry for shards in self.shards for entry in shards.entries.values()]

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file, to tell whether the checkpoint is still the same."""
        return [(os.path.relpath(file.name, self.directory), stat.st_size, stat.st_mtime_ns)
                for shards in self.shards for file in shards.files for stat in [os.fstat(file.fileno())]]

    def _account(self, shards: Shards, wanted: list[Stored]) -> None:
        """Give every entry its place, or name those that have none and the places that stay empty."""
        entries = dict(shards.entries)
        int8 = self.layout == "released" and any(
            s.parameter.note == INT8 and s.name in entries and entries[s.name].dtype == "I8" for s in wanted)
        self.int8 |= int8
        missing, wrong = [], []

        def take(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Entry | None:
            entry = entries.pop(name, None)
            if entry is None:
                missing.append(f"{name} {list(shape)}")
            elif entry.shape != shape or entry.dtype not in dtypes:
                wrong.append(f"{name}: found {entry.dtype} {list(entry.shape)}, "
                             f"wanted {' or '.join(dtypes)} {list(shape)}")
            return entry

        floats = ("F32", "F16", "BF16")
        copies = mtp_copies(self.config)
        for stored in wanted:
            if stored.name in copies and stored.name not in entries:            # a smaller checkpoint leaves them out
                continue
            p = stored.parameter
            quantised = int8 and p.note == INT8
            entry = take(stored.name, stored.shape, ("I8",) if quantised else floats)
            scale = take(f"{stored.name}_scale", (stored.rows, 1), floats) if quantised else None
            if entry is None:
                continue
            for part in stored.parts:
                others = self.held.setdefault((p.name, part.member), [])
                same = [held for held in others if (held.part.row, held.part.column) == (part.row, part.column)]
                if same:
                    self.repeats.append((entry, same[0].entry))
                else:
                    others.append(Held(part, entry, scale))
        self._refuse(shards.directory, missing, sorted(entries), wrong)

    def _refuse(self, directory: str, missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
        if not (missing or unexpected or wrong):
            return
        lines = [f"{directory}: the tensors do not fit config.json"]
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
            if names:
                lines.append(f"{len(names)} {kind}:")
                lines += [f"  {name}" for name in names[:LISTED]]
                if len(names) > LISTED:
                    lines.append(f"  ... and {len(names) - LISTED} more")
        trunk = self.config.num_hidden_layers
        found = {int(m[1]) for name in unexpected if (m := re.match(r"model\.layers\.(\d{1,6})\.", name))}
        beyond = max(found, default=0) - trunk + 1
        depth = self.config.num_nextn_predict_layers
        if beyond > depth and f"{layer_prefix(max(found))}eh_proj.weight" in unexpected:
            lines.append(f"config.json says num_nextn_predict_layers {depth}, the checkpoint holds {beyond} MTP layers:"
                         f" set it to {beyond} (pangu-convert --mtp drop then makes a directory without them)")
        absent = sum(name.split(" ")[0].endswith(".eh_proj.weight") for name in missing)
        if absent:
            lines.append(f"config.json says num_nextn_predict_layers {depth}, {absent} of these layers are not there: "
                         f"set it to {depth - absent} to do without them")
        if self.int8 and wrong:
            lines.append("Tensors of the Int8 release and of the bfloat16 one are never mixed; fetch one of them whole")
        raise CheckpointError("\n".join(lines))

    def check_repeats(self) -> None:
        """Compare, byte by byte, what is stored more than once; `CheckpointError` names the first that differs."""
        for entry, other in tqdm(self.repeats, desc="compare repeats", unit="tensor", disable=None, leave=False):
            if entry.dtype != other.dtype or entry.nbytes != other.nbytes or not same_bytes(entry, other):
                raise CheckpointError(f"{entry.file.name}: {entry.name} differs from {other.name} in "
                                      f"{other.file.name}, which it must repeat; fetch both files again")

    def moves(self, stored: Stored, name: str | None = None) -> list[Move]:
        """What makes the tensor `stored`, by its rows. `name`: the parameter's name here, when it differs."""
        found = []
        for part in stored.parts:
            for held in self.held[name or stored.parameter.name, part.member]:
                row, column = max(part.row, held.part.row), max(part.column, held.part.column)
                rows = min(part.row + part.rows, held.part.row + held.part.rows) - row
                columns = min(part.column + part.columns, held.part.column + held.part.columns) - column
                if rows > 0 and columns > 0:
                    found.append(Move(held, held.part.at + row - held.part.row, column - held.part.column,
                                      part.at + row - part.row, column - part.column, rows, columns))
        return found

    def blocks(self, stored: Stored, dtype: str, name: str | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The tensor `stored` made in `dtype`, in order: (rows [n, columns], finite values that became infinite).

        The next block may overwrite the one before it. `name` as in `moves`.
        """
        buffer = np.empty(BLOCK, np.uint8)
        for first, rows, band in steps(self.moves(stored, name), stored.columns, dtype):
            nbytes = rows * stored.columns * CARRIERS[dtype].itemsize
            if nbytes > len(buffer):  # one row may be longer than a block
                buffer = np.empty(nbytes, np.uint8)
            values = buffer[:nbytes].view(CARRIERS[dtype]).reshape(rows, stored.columns)
            yield values, fill(band, first, values, dtype)
