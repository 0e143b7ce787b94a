"""Measurements that the documentation quotes.

  python tools/bench.py convert --directory /tmp
  python tools/bench.py generate --model DIR --plot contexts.png
  python tools/bench.py train --config configs/openpangu_v2/pretrain_toy_cpu.yaml

convert: how fast pangu-convert moves a generated bfloat16 checkpoint of about --gigabytes, beside cp of the same bytes
in the same run: cp, hf2ms, cp, ms2hf, --rounds times. Every step starts with a quiet disk and ends when its bytes are
on it (fsync). Then the round trip is compared, and the peak memory of a checkpoint half the size is measured. Removes
what it wrote; needs about three times --gigabytes of disk.

generate: speed and memory of generation beside what the machine could do; `generate --help` says what is measured.

train: a training step and where its time goes; `train --help` says what is measured.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import bench_generate
import bench_train
import numpy as np

from pangu_ms.checkpoint.convert import open_source
from pangu_ms.checkpoint.layout import released
from pangu_ms.checkpoint.names import FLOAT32
from pangu_ms.checkpoint.plan import Output, into_shards
from pangu_ms.checkpoint.shards import INDEX_FILE
from pangu_ms.checkpoint.transfer import same_bytes
from pangu_ms.config import PanguConfig

PATTERN = 1 << 20  # bytes; each tensor repeats its own random pattern


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="conversion beside cp")
    convert.add_argument("--gigabytes", type=float, default=6.0)
    convert.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    convert.add_argument("--rounds", type=int, default=3)
    bench_generate.add_arguments(commands.add_parser(
        "generate", help="generation beside the machine", description=bench_generate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    bench_train.add_arguments(commands.add_parser(
        "train", help="a training step by part", description=bench_train.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    arguments = parser.parse_args()
    if arguments.command == "generate":
        return bench_generate.run(arguments)
    if arguments.command == "train":
        return bench_train.run(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="pangu_bench_") as directory:
        return bench_convert(Path(directory), arguments.gigabytes, arguments.rounds)


def bench_convert(directory: Path, gigabytes: float, rounds: int) -> int:
    source, ours, back, copy = (directory / name for name in ("hf", "ms", "back", "copy"))
    size = generate(source, gigabytes)
    print(f"checkpoint: {size / 1e9:.2f} GB of tensors in {len(list(source.glob('*.safetensors')))} shards")
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(rounds):
        for command, read, written in (("hf2ms", source, ours), ("ms2hf", ours, back)):
            shutil.rmtree(written, ignore_errors=True)
            for name, took in zip((f"cp of {read.name}", f"cp and fsync of {read.name}"), timed_copy(read, copy)):
                seconds.setdefault(name, []).append(took)
            shutil.rmtree(copy)
            took, peak = timed_convert(command, read, written)
            seconds.setdefault(command, []).append(took)
            memory[command] = max(memory.get(command, 0), peak)
    for name, took in seconds.items():
        print(f"{name}: best {min(took):.2f} s of {', '.join(f'{second:.2f}' for second in took)}")
    for command, read in (("hf2ms", source), ("ms2hf", ours)):
        took = min(seconds[command])
        plain, durable = (100 * min(seconds[f"{name} of {read.name}"]) / took for name in ("cp", "cp and fsync"))
        print(f"{command}: {sum(path.stat().st_size for path in read.iterdir()) / 1e9 / took:.2f} GB/s read, "
              f"{durable:.0f} % of cp and fsync, {plain:.0f} % of cp alone; peak memory {memory[command] / 1e6:.0f} MB")
    equal = same_tensors(source, back)
    print(f"round trip: {'the same tensors, bit by bit' if equal else 'DIFFERENT'}")
    for path in (source, ours, back):
        shutil.rmtree(path)
    half = generate(source, gigabytes / 2)
    peaks = [timed_convert(*step)[1] / 1e6 for step in (("hf2ms", source, ours), ("ms2hf", ours, back))]
    print(f"half the size ({half / 1e9:.2f} GB): peak memory hf2ms {peaks[0]:.0f} MB, ms2hf {peaks[1]:.0f} MB")
    return 0 if equal else 1


def generate(directory: Path, gigabytes: float, shard_size: int = 10**9) -> int:
    """Write a checkpoint of the release's layout with seeded patterns for weights; returns the bytes of its tensors."""
    layers = 4
    while (size := _size(_config(layers))) < gigabytes * 1e9:
        layers += 1
    config = _config(layers)
    directory.mkdir()
    config.save_pretrained(directory)
    outputs = [Output(s, "F32" if s.parameter.note == FLOAT32 else "BF16", "") for s in released(config)]
    weight_map = {}
    for shard in into_shards(outputs, shard_size):
        with open(directory / shard.name, "wb") as file:
            file.write(shard.header)
            for output in shard.outputs:
                weight_map[output.stored.name] = shard.name
                original = output.stored.name  # a copy repeats its parameter
                if original.endswith((".embed_tokens.weight", ".head.weight")):
                    original = output.stored.parameter.name
                pattern = np.random.default_rng(zlib.crc32(original.encode())).bytes(min(PATTERN, output.nbytes))
                for start in range(0, output.nbytes, PATTERN):
                    file.write(pattern[:output.nbytes - start])
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return size


def _config(layers: int) -> PanguConfig:
    """A narrow model with every kind of layer and two MTP layers."""
    dsa = tuple(range(0, layers, 3))
    return PanguConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=768, num_hidden_layers=layers,
        num_nextn_predict_layers=2, num_attention_heads=16, q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, first_k_dense_replace=1, param_sink_number=32,
        dsa_layers=dsa, swa_layers=tuple(i for i in range(layers) if i not in dsa), sliding_window_list=None,
        index_n_heads=8, index_head_dim=64, block_post_layernorm_idx=(0,), dtype="bfloat16")


def _size(config: PanguConfig) -> int:
    return 2 * config.parameter_count()["with_copies"]


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
    process = subprocess.Popen([sys.executable, "-m", "pangu_ms.checkpoint.convert", command, source, target],
                               stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"bench: pangu-convert {command} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def same_tensors(one: Path, other: Path) -> bool:
    with open_source(str(one)) as left, open_source(str(other)) as right:
        entries = [{entry.name: entry for entry in source.entries} for source in (left, right)]
        return entries[0].keys() == entries[1].keys() and all(
            (entry.dtype, entry.shape) == (entries[1][name].dtype, entries[1][name].shape)
            and same_bytes(entry, entries[1][name]) for name, entry in entries[0].items())


if __name__ == "__main__":
    sys.exit(main())
