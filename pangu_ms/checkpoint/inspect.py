"""Look into a checkpoint: what its components hold, whether its values are sound, how it differs from another."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from pangu_ms.architectures.fields import Config
from pangu_ms.architectures.tensors import Parameter, computed_tensors, mtp_copies, parameters, spellings
from pangu_ms.checkpoint.copying import BLOCK, fill, steps
from pangu_ms.checkpoint.directory import checkpoint_directory, rank_directories, read_config
from pangu_ms.checkpoint.dtypes import CARRIERS, NAMES, to_float32
from pangu_ms.checkpoint.layout import released, sliced, stacked
from pangu_ms.checkpoint.shards import Shards, StoredTensor
from pangu_ms.checkpoint.source import Source, open_source
from pangu_ms.errors import PanguError

EXAMPLE = """examples:
  python tools/inspect_checkpoint.py flash-ms --values
  python tools/inspect_checkpoint.py openPangu-2.0-Flash --diff flash-ms
Exit code 0 on success, 1 when --diff finds a difference or the tensors do not fit config.json, 2 on a damaged file.
"""
SHOWN = 30  # differences printed; --json has all


@dataclass
class Component:
    """Totals over the stored tensors of one component. `values` is None unless they were read."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    values: dict[str, float] | None = None

    def add(self, stored: StoredTensor, is_scale: bool) -> None:
        self.tensors += 1
        self.parameters += 0 if is_scale else stored.nbytes // CARRIERS[stored.dtype].itemsize
        self.bytes += stored.nbytes
        self.dtypes.add(NAMES[stored.dtype])

    def add_values(self, values: np.ndarray) -> None:
        """Count a block of float32 values. Minimum, maximum and norm leave out those that are not finite."""
        if self.values is None:
            self.values = {"min": np.inf, "max": -np.inf, "squares": 0.0, "nan": 0, "inf": 0}
        finite = values[np.isfinite(values)]
        nan = int(np.isnan(values).sum())
        self.values["nan"] += nan
        self.values["inf"] += len(values) - len(finite) - nan
        if len(finite):
            self.values["min"] = min(self.values["min"], float(finite.min()))
            self.values["max"] = max(self.values["max"], float(finite.max()))
            self.values["squares"] += float(np.square(finite, dtype=np.float64).sum())

    def to_dict(self) -> dict:
        fields = {"tensors": self.tensors, "parameters": self.parameters, "bytes": self.bytes,
                  "dtypes": sorted(self.dtypes)}
        if self.values:
            fields |= {key: value for key, value in self.values.items() if key != "squares" and np.isfinite(value)}
            fields["norm"] = self.values["squares"] ** 0.5
        return fields


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inspect_checkpoint.py", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", help="checkpoint of any layout, or a training run: its newest")
    parser.add_argument("--values", action="store_true", help="read all values: min, max, norm, counts of NaN and inf")
    parser.add_argument("--diff", metavar="DIR2", help="compare parameter by parameter, whatever the two layouts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        report = diff(arguments.directory, arguments.diff) if arguments.diff else \
            inspect(arguments.directory, arguments.values)
    except PanguError as error:
        print(f"inspect_checkpoint: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(report))
    else:
        print(_differences(report) if arguments.diff else _table(report))
    return 0 if report.get("equal") or report.get("fits") else 1


def inspect(directory: str, values: bool = False) -> dict:
    """Report `components` by name, their `total`, and whether the tensors fit config.json (`fits`, else `problem`).

    The files must be sound, or there is a `CheckpointError`. A tensor that has no place in the model counts as
    "unknown". `values`: read all of them, for minimum, maximum, norm and counts of NaN and infinities.
    """
    directory = checkpoint_directory(directory)
    ranks = rank_directories(directory)
    config = read_config(directory)
    components = _component_of(config)
    found: dict[str, Component] = {}
    total = Component()
    for shard_directory in ranks or [directory]:
        with Shards(shard_directory) as shards:
            for stored in tqdm(shards.tensors.values(), unit="tensor", disable=None if values else True):
                weight = stored.name.removesuffix("_scale")
                is_scale = stored.name not in components and weight in components
                key = components.get(weight if is_scale else stored.name, "unknown")
                for component in (found.setdefault(key, Component()), total):
                    component.add(stored, is_scale)
                for block in _blocks(stored) if values else ():
                    found[key].add_values(block)
                    total.add_values(block)
    order = [key for key in dict.fromkeys(components.values()) if key in found] + ["unknown"] * ("unknown" in found)
    report = {"components": {key: found[key].to_dict() for key in order}, "total": total.to_dict()}
    try:
        Source(directory, config).close()
    except PanguError as error:
        return report | {"fits": False, "problem": str(error)}
    return report | {"fits": True}


def diff(directory: str, other: str) -> dict:
    """Report whether two checkpoints are `equal`, how many parameters were `compared`, and the `differences`.

    A difference is a parameter that one of them lacks, or that has another shape, format or other values. Values are
    compared in float32, int8 ones dequantised; NaN equals NaN. `largest_difference` is None when it is infinite or one
    of two values is no number.
    """
    directory, other = os.fspath(directory), os.fspath(other)
    with open_source(directory) as left, open_source(other) as right:
        known = parameters(left.config), parameters(right.config)
        differences = [{"name": name, "missing_in": directory if name in known[1] else other}
                       for name in sorted(known[0].keys() ^ known[1].keys())]
        common = [name for name in known[0] if name in known[1]]
        for name in tqdm(common, unit="tensor", disable=None):
            one, two = known[0][name], known[1][name]
            if one.shape != two.shape:
                differences.append({"name": name, "shapes": [list(one.shape), list(two.shape)]})
                continue
            dtypes = [_formats(source, one) for source in (left, right)]
            largest = _largest_difference(left, right, one)
            if largest or dtypes[0] != dtypes[1]:
                differences.append({"name": name, "dtypes": dtypes,
                                    "largest_difference": largest if largest < np.inf else None})
    return {"equal": not differences, "compared": len(common), "differences": differences}


def _component_of(config: Config) -> dict[str, str]:
    """The component of every tensor name of either layout."""
    copies = mtp_copies(config)
    found = {}
    for tensor in (*released(config), *stacked(config)):
        layer = tensor.parameter.layer
        found[tensor.name] = "mtp copies" if tensor.name in copies else \
            "mtp" if layer and layer.mtp_depth else tensor.parameter.component
    for name in computed_tensors(config):
        found[name] = "computed"
    for other, name in spellings(config).items():
        if name in found:
            found[other] = found[name]
    return found


def _blocks(stored: StoredTensor) -> Iterator[np.ndarray]:
    carrier = CARRIERS[stored.dtype]
    for start in range(0, stored.nbytes, BLOCK):
        values = np.empty(min(BLOCK, stored.nbytes - start) // carrier.itemsize, carrier)
        stored.read_into(start, memoryview(values).cast("B"))
        yield to_float32(values, stored.dtype)


def _largest_difference(left: Source, right: Source, p: Parameter) -> float:
    """The largest difference of one parameter. It is read in blocks of rows, which the two may keep elsewhere."""
    whole = sliced(p)
    copies = [source.copies(whole) for source in (left, right)]
    largest = 0.0
    for first, rows, _ in steps(copies[0], whole):
        values = np.empty((2, rows, whole.columns), np.float32)
        for i in range(2):
            fill(copies[i], first, values[i], "F32")
        largest = max(largest, _distance(*values))
    return largest


def _formats(source: Source, p: Parameter) -> str:
    return "/".join(sorted({NAMES[stored.dtype] for m in range(p.members) for _, stored in source.held[p.name, m]}))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays; infinite when only one value is no number, or infinities differ."""
    if a.tobytes() == b.tobytes():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(distance, nan=np.inf, posinf=np.inf).max())


def _table(report: dict) -> str:
    rows = [["component", "tensors", "parameters", "bytes", "formats"]]
    keys = [key for key in ("min", "max", "norm", "nan", "inf") if key in report["total"]]
    rows[0] += keys
    for name, fields in (report["components"] | {"total": report["total"]}).items():
        row = [name, *(f"{fields[key]:,}" for key in ("tensors", "parameters", "bytes")), ", ".join(fields["dtypes"])]
        rows.append(row + [f"{fields[key]:,}" if isinstance(fields.get(key), int) else f"{fields.get(key, 0):.4g}"
                           for key in keys])
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = (("  ".join(cell.ljust(width) if i in (0, 4) else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths)))).rstrip() for row in rows)
    return "\n".join([*text, "the tensors fit config.json" if report["fits"] else report["problem"]])


def _differences(report: dict) -> str:
    lines = []
    for found in report["differences"][:SHOWN]:
        if "missing_in" in found:
            lines.append(f"{found['name']}: missing in {found['missing_in']}")
        elif "shapes" in found:
            lines.append(f"{found['name']}: shape {found['shapes'][0]} and {found['shapes'][1]}")
        else:
            largest = found["largest_difference"]
            lines.append(f"{found['name']}: {' and '.join(found['dtypes'])}, largest difference "
                         f"{'infinite' if largest is None else format(largest, '.4g')}")
    if len(report["differences"]) > SHOWN:
        lines.append(f"... and {len(report['differences']) - SHOWN} more")
    lines.append(f"{report['compared']} parameters compared: "
                 f"{'equal' if report['equal'] else str(len(report['differences'])) + ' differences'}")
    return "\n".join(lines)
