"""Conversion beside cp. python tools/bench.py convert --directory DIR

How fast pangu-convert moves a generated bfloat16 checkpoint of about --gigabytes, beside cp of the same bytes in the
same run: cp, hf2ms, cp, ms2hf, --rounds times. Every step starts with a quiet disk and ends when its bytes are on it
(fsync). Then the round trip is compared, and the peak memory of a checkpoint half the size is measured. Removes what it
wrote; needs about three times --gigabytes of disk.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from make_model import own_name, write_model
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.tensors import count_parameters
from pangu_ms.checkpoint.copying import same_bytes
from pangu_ms.checkpoint.layout import LayoutTensor
from pangu_ms.checkpoint.source import open_source
from pangu_ms.errors import PanguError

PATTERN = 1 << 20  # bytes; each tensor repeats its own random pattern
STEPS = ("hf2ms", "ms2hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=6.0, metavar="N", help="default: 6")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")


def measure(arguments: argparse.Namespace) -> dict:
    if arguments.rounds < 1 or not arguments.gigabytes > 0:
        raise PanguError(f"--rounds {arguments.rounds}, --gigabytes {arguments.gigabytes}: wanted at least 1 and "
                         "more than 0")
    try:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="pangu_bench_") as directory:
            return measure_in(Path(directory), arguments.gigabytes, arguments.rounds)
    except OSError as error:
        raise PanguError(f"{error.filename or arguments.directory}: {error.strerror}") from None


def measure_in(directory: Path, gigabytes: float, rounds: int) -> dict:
    source, ours, back, copy = (directory / name for name in ("hf", "ms", "back", "copy"))
    moves = dict(zip(STEPS, ((source, ours), (ours, back))))
    size = generate(source, gigabytes)
    seconds: dict[str, dict[str, list[float]]] = {step: {"convert": [], "cp": [], "cp_fsync": []} for step in STEPS}
    memory = dict.fromkeys(STEPS, 0)
    for _ in range(rounds):
        for step, (read, written) in moves.items():
            shutil.rmtree(written, ignore_errors=True)
            for name, took in zip(("cp", "cp_fsync"), timed_copy(read, copy)):
                seconds[step][name].append(took)
            shutil.rmtree(copy)
            took, peak = timed_convert(step, read, written)
            seconds[step]["convert"].append(took)
            memory[step] = max(memory[step], peak)
    read_bytes = {step: sum(path.stat().st_size for path in read.iterdir()) for step, (read, _) in moves.items()}
    if not same_tensors(source, back):
        raise PanguError("the round trip gave other tensors than went in: a defect of pangu-convert, or of the disk")
    for path in (source, ours, back):
        shutil.rmtree(path)
    half = generate(source, gigabytes / 2)
    return {"bytes": size, "rounds": rounds, "seconds": seconds, "read_bytes": read_bytes, "peak_memory_bytes": memory,
            "half": {"bytes": half, "peak_memory_bytes": {step: timed_convert(step, *moves[step])[1]
                                                          for step in STEPS}}}


def report(found: dict) -> str:
    lines = [f"a bfloat16 checkpoint of {found['bytes'] / 1e9:.2f} GB, there and back: the same tensors, bit by bit"]
    for step, took in found["seconds"].items():
        best = {name: min(each) for name, each in took.items()}
        rounds = ", ".join(f"{each:.2f}" for each in took["convert"])
        lines.append(f"{step}: {best['convert']:.2f} s, best of {rounds}: "
                     f"{found['read_bytes'][step] / 1e9 / best['convert']:.2f} GB/s read, "
                     f"{best['cp_fsync'] / best['convert']:.0%} of cp and fsync, {best['cp'] / best['convert']:.0%} of "
                     f"cp alone; peak memory {found['peak_memory_bytes'][step] / 1e6:.0f} MB, at half the size "
                     f"{found['half']['peak_memory_bytes'][step] / 1e6:.0f} MB")
    return "\n".join(lines)


def generate(directory: Path, gigabytes: float, shard_size: int = 10**9) -> int:
    """Write a checkpoint of the release's layout with seeded patterns for weights; returns the bytes of its tensors."""
    layers = 4
    while 2 * count_parameters(narrow_config(layers))["with_copies"] < gigabytes * 1e9:
        layers += 1
    return write_model(directory, narrow_config(layers), pattern, shard_size)


def narrow_config(layers: int) -> PanguConfig:
    """Every kind of layer, and two MTP layers."""
    dsa = tuple(range(0, layers, 3))
    return PanguConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=768, num_hidden_layers=layers,
        num_nextn_predict_layers=2, num_attention_heads=16, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, first_k_dense_replace=1, param_sink_number=32,
        dsa_layers=dsa, swa_layers=tuple(i for i in range(layers) if i not in dsa), sliding_window_list=None,
        index_n_heads=8, index_head_dim=64, block_post_layernorm_idx=(0,), dtype="bfloat16")


def pattern(tensor: LayoutTensor):
    """In blocks, as what this process needs at its largest is counted for the processes that it starts, too."""
    bits = np.random.default_rng(zlib.crc32(own_name(tensor).encode())).bytes(min(PATTERN, tensor.nbytes))
    for start in range(0, tensor.nbytes, PATTERN):
        yield bits[:tensor.nbytes - start]


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds until cp returns, and until its bytes are on the disk, as pangu-convert's are when it returns."""
    os.sync()
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.monotonic() - started
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return copied, time.monotonic() - started


def timed_convert(command: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds of a pangu-convert of its own process, and its peak resident memory in bytes."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pangu_ms.conversion.command", command, source, target],
                               stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise PanguError(f"pangu-convert {command} failed: see above")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def same_tensors(one: Path, other: Path) -> bool:
    with open_source(str(one)) as left, open_source(str(other)) as right:
        found, wanted = ({stored.name: stored for stored in source.tensors} for source in (left, right))
        return found.keys() == wanted.keys() and all(
            (stored.dtype, stored.shape) == (wanted[name].dtype, wanted[name].shape)
            and same_bytes(stored, wanted[name]) for name, stored in found.items())
