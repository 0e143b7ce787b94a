"""Compares every intermediate result of a model with a golden file, in the order of computation.

The first thing to run after a port to a new device: it names the first piece that is off. Floats are compared by
max|ours - golden| / max|golden|, layer by layer where there are layers; selections and expert ids must be equal.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pangu_ms
from pangu_ms.errors import PanguError, one_line

EXAMPLE = """example:
  python tools/compare_golden.py --model tests/data/tiny --golden tests/data/tiny/T24.npz

Exit code 0 when every piece is within the tolerance, 1 with the first piece that is off, 2 when the input is wrong.
"""
ABOUT_THE_FILE = {"ids", "gap", "gaps", "meta"}  # what went in and where it came from: not results of the model
OTHER_CHOICE = re.compile(r"mtp\d+_logits_raw")  # what a depth would give if the first one read un-normed hidden rows
INNER = ("attn", "router_ids", "router_w", "mlp")  # of an MTP layer: not every golden file shows its inside


@dataclass(frozen=True)
class Row:
    """One compared piece: `difference` is relative for floats, the number of differing entries for integers."""

    piece: str
    difference: float
    exact: bool

    def within(self, tolerance: float) -> bool:
        return self.difference <= (0 if self.exact else tolerance)  # NaN compares false: it counts as off


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_golden.py", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--golden", required=True, metavar="FILE.npz", help="golden file made for that checkpoint")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="largest relative difference (default: 2e-5)")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    try:
        golden = read_golden(arguments.golden)
        note = note_on_weights(arguments.model, arguments.golden, golden)
        model = pangu_ms.PanguForCausalLM.from_pretrained(arguments.model)
        rows = compare(model.trace(golden["ids"]), golden)
    except PanguError as error:
        print(f"compare_golden.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    if note:
        print(note)
    return report(rows, arguments.tolerance)


def read_golden(path) -> dict[str, np.ndarray]:
    """Every array of a golden file; nothing is ever unpickled.

    Raises:
        PanguError: the file is not there, is no npz, is damaged, or does not say what went in and for which weights.
    """
    if not Path(path).is_file():
        raise PanguError(f"{path}: no such file; give a golden .npz file")
    if not zipfile.is_zipfile(path):
        raise PanguError(f"{path}: is not an npz file; give a golden .npz file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            golden = dict(arrays)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise PanguError(f"{path}: cannot be read as an npz file ({error}); fetch it again") from None
    missing = {"ids", "meta"} - golden.keys()
    if missing:
        raise PanguError(f"{path}: lacks {', '.join(sorted(missing))}; a golden file holds the ids that went in (ids) "
                         "and the checkpoint it was made for (meta)")
    return golden


def note_on_weights(directory, path, golden) -> str:
    """"" when the directory holds the very file that the golden data was made for, by sha256; else what to think of it.

    A converted checkpoint has the same tensors in other files, so that another file is no error: the comparison tells.

    Raises:
        PanguError: the golden file does not say what it was made for.
    """
    try:
        meta = json.loads(str(golden["meta"]))
        wanted, name = meta["sha256"], meta["ckpt"]
    except (ValueError, KeyError, TypeError):
        raise PanguError(f"{path}: meta does not hold the sha256 of a checkpoint; give a golden file") from None
    weights = Path(directory) / "model.safetensors"
    if weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == wanted:
        return ""
    return (f"note: the golden data was made for another file than {directory} holds, the weights of {name}: "
            "they agree if this checkpoint was converted from it")


def compare(trace: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> list[Row]:
    """One row for each piece, in the order of computation.

    Raises:
        PanguError: the two do not hold the same keys, or a key has another shape.
    """
    trace, golden = ({key: np.asarray(value) for key, value in arrays.items()
                      if key not in ABOUT_THE_FILE and not OTHER_CHOICE.fullmatch(key)} for arrays in (trace, golden))
    trace = {key: value for key, value in trace.items()
             if key in golden or key.partition("_")[2] not in INNER or not key.startswith("mtp")}
    if trace.keys() != golden.keys():
        raise PanguError(f"the model gives {listed(trace.keys() - golden.keys())} that the golden file lacks, and the "
                         f"golden file holds {listed(golden.keys() - trace.keys())} that the model does not give; "
                         "give a golden file made for this architecture")
    for key in golden:
        if trace[key].shape != golden[key].shape:
            raise PanguError(f"{key}: the model gives shape {trace[key].shape}, wanted that of the golden file, "
                             f"{golden[key].shape}")
    order = list(pieces(golden))
    unknown = golden.keys() - {key for _, key, _ in order}
    if unknown:
        raise PanguError(f"the golden file holds {listed(unknown)}, which this tool cannot place; compare with the "
                         "tool of the version that made it")
    return [row(name, trace[key][part], golden[key][part]) for name, key, part in order]


def pieces(golden):
    """(name, key, part of the array) of every piece, in the order of computation."""
    after = "streams" if "streams" in golden else "hidden"                      # each layer
    layers = list(range(len(golden[after])))
    indexed, routed = (list(golden.get(key, [])) for key in ("index_layers", "router_layers"))
    for key in ("index_layers", "router_layers"):
        if key in golden:
            yield key, key, ...
    for layer in layers:
        for key, holders in (("index_scores", indexed), ("index_sel", indexed), ("attn", layers),
                             ("router_ids", routed), ("router_w", routed), ("mlp", layers), (after, layers)):
            if layer in holders:
                yield f"layer {layer} {key}", key, holders.index(layer)
    for key in ("merged", "final", "logits"):
        if key in golden:
            yield key, key, ...
    depth = 1
    while f"mtp{depth}_logits" in golden:
        for key in (*(f"mtp{depth}_{inner}" for inner in INNER), f"mtp{depth}_hidden", f"mtp{depth}_logits"):
            if key in golden:
                yield key, key, ...
        depth += 1


def row(piece: str, ours: np.ndarray, golden: np.ndarray) -> Row:
    unequal = ours != golden  # equal entries are left out below: both sides hold -inf where the future is masked
    if np.issubdtype(golden.dtype, np.integer):
        return Row(piece, np.count_nonzero(unequal), exact=True)
    ours, golden = ours.astype(np.float64), golden.astype(np.float64)
    largest = np.abs(golden, where=np.isfinite(golden), out=np.zeros_like(golden)).max(initial=0)
    difference = np.abs(ours[unequal] - golden[unequal]).max(initial=0)
    with np.errstate(divide="ignore"):  # something where the golden file has only zeros is infinitely off
        return Row(piece, difference / largest if difference else 0.0, exact=False)


def report(rows: list[Row], tolerance: float) -> int:
    """Prints the table and its conclusion; the exit code."""
    for r in rows:
        shown = f"{r.difference} differ" if r.exact else f"{r.difference:.2e}"
        print(f"{r.piece:<24}{shown:>16}{'' if r.within(tolerance) else '   off'}")
    off = next((r for r in rows if not r.within(tolerance)), None)
    if off:
        print(f"first piece that is off: {off.piece}")
        return 1
    worst = max((r for r in rows if not r.exact), key=lambda r: r.difference)
    print(f"all {len(rows)} pieces agree to {tolerance:g}; largest difference: {worst.difference:.2e} in {worst.piece}")
    return 0


def listed(keys) -> str:
    return ", ".join(sorted(keys)) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
