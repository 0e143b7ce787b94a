"""The manifest of a converted directory: what it was made from, how it is cut, and a checksum of every shard."""

import os
import re

from pangu_ms.checkpoint.layout import Grid
from pangu_ms.checkpoint.shards import parse_json
from pangu_ms.errors import CheckpointError

MANIFEST_FILE = "pangu_manifest.json"
LARGEST_GRID = 1024  # ranks in one parallel dimension


def read_manifest(directory: str) -> dict | None:
    """The manifest of a directory, None when it has none. `CheckpointError` when it is not one of ours."""
    path = os.path.join(directory, MANIFEST_FILE)
    try:
        with open(path, "rb") as file:
            manifest = parse_json(path, file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    grid, files = manifest.get("grid"), manifest.get("files")
    sound = isinstance(grid, dict) and isinstance(files, dict) and isinstance(manifest.get("plan"), str) \
        and grid.keys() == {"tensor_parallel", "expert_parallel", "rank"} \
        and all(type(n) is int and 0 <= n <= LARGEST_GRID for n in grid.values()) \
        and all(isinstance(f, dict) and type(f.get("bytes")) is type(f.get("crc32")) is int for f in files.values())
    if not sound:
        raise CheckpointError(f"{path}: is not a manifest of pangu-convert; convert the directory again")
    return manifest


def rank_directories(directory: str) -> list[str]:
    """The rank_* directories of a sliced checkpoint in the order of their ranks, none for any other."""
    try:
        ranks = sorted(int(m[1]) for name in os.listdir(directory) if (m := re.fullmatch(r"rank_(\d{1,6})", name)))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from None
    return [os.path.join(directory, f"rank_{rank}") for rank in ranks]


def read_grid(directory: str, ranks: list[str]) -> Grid:
    """The grid that the rank directories form; `CheckpointError` when some are missing or belong to another set."""
    manifests = [read_manifest(rank) for rank in ranks]
    if None in manifests:
        raise CheckpointError(f"{ranks[manifests.index(None)]}: has no {MANIFEST_FILE}; it is not a finished rank")
    first = manifests[0]["grid"]
    grid = Grid(first["tensor_parallel"], first["expert_parallel"])
    missing = [rank for rank in range(grid.ranks) if os.path.join(directory, f"rank_{rank}") not in ranks]
    if missing or len(ranks) != grid.ranks:
        raise CheckpointError(f"{directory}: found {len(ranks)} rank directories, wanted {grid.ranks} "
                              f"(missing: {', '.join(map(str, missing)) or 'none'})")
    for rank, (path, manifest) in enumerate(zip(ranks, manifests)):
        if manifest["grid"] != first | {"rank": rank} or manifest["plan"] != manifests[0]["plan"]:
            raise CheckpointError(f"{path}: comes from another conversion than {ranks[0]}; convert all ranks again")
    return grid
