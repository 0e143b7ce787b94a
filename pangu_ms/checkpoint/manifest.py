"""The manifest of a converted directory: what it was made from, which rank it is, and a checksum of every shard.

In the file, which older versions have written too, the ranks stand under "grid".
"""

import os

from pangu_ms.checkpoint.directory import rank_directory
from pangu_ms.checkpoint.shards import parse_json
from pangu_ms.errors import CheckpointError
from pangu_ms.parallel.ranks import Ranks

MANIFEST_FILE = "pangu_manifest.json"
LARGEST_DIMENSION = 1024  # ranks in one parallel dimension


def read_manifest(directory: str) -> dict | None:
    """The manifest of a directory, None when it has none; `CheckpointError` when it is not one of ours."""
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
        and all(type(n) is int and (0 if key == "rank" else 1) <= n <= LARGEST_DIMENSION for key, n in grid.items()) \
        and all(isinstance(f, dict) and type(f.get("bytes")) is type(f.get("crc32")) is int for f in files.values())
    if not sound:
        raise CheckpointError(f"{path}: is not a manifest of pangu-convert; convert the directory again")
    return manifest


def manifest_ranks(manifest: dict) -> Ranks:
    """The ranks that a directory was sliced for, seen from its own: a single one when it holds the whole model."""
    grid = manifest["grid"]
    return Ranks(grid["tensor_parallel"], grid["expert_parallel"], rank=grid["rank"])


def ranks_entry(ranks: Ranks) -> dict:
    """What a manifest says about ranks, the inverse of `manifest_ranks`."""
    return {"grid": {"tensor_parallel": ranks.tensor, "expert_parallel": ranks.expert, "rank": ranks.rank}}


def read_ranks(directory: str, directories: list[str]) -> Ranks:
    """The ranks of a sliced checkpoint, of which rank_directories(directory) are `directories`.

    Raises:
        CheckpointError: some are missing, unfinished, or come from another conversion.
    """
    manifests = [read_manifest(each) for each in directories]
    if None in manifests:
        raise CheckpointError(f"{directories[manifests.index(None)]}: has no {MANIFEST_FILE}; it is not a finished "
                              "rank")
    ranks = manifest_ranks(manifests[0]).at(0)
    missing = [rank for rank in range(ranks.count) if rank_directory(directory, rank) not in directories]
    if missing or len(directories) != ranks.count:
        raise CheckpointError(f"{directory}: found {len(directories)} rank directories, wanted {ranks.count} "
                              f"(missing: {', '.join(map(str, missing)) or 'none'})")
    for rank, (path, manifest) in enumerate(zip(directories, manifests)):
        if manifest_ranks(manifest) != ranks.at(rank) or manifest["plan"] != manifests[0]["plan"]:
            raise CheckpointError(f"{path}: comes from another conversion than {directories[0]}; convert all ranks "
                                  "again")
    return ranks
