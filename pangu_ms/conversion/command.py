"""Move a checkpoint between the Hugging Face layout and ours, bit by bit, or merge an adapter; in constant memory."""

import argparse
import dataclasses
import os
import re
import resource
import sys
import time

from tqdm import tqdm

from pangu_ms.architectures.fields import CONFIG_FILE
from pangu_ms.checkpoint.directory import rank_directories, rank_directory
from pangu_ms.checkpoint.dtypes import CODES
from pangu_ms.checkpoint.manifest import LARGEST_DIMENSION, MANIFEST_FILE, read_manifest
from pangu_ms.checkpoint.merged import open_merged
from pangu_ms.checkpoint.shards import INDEX_FILE, contained
from pangu_ms.checkpoint.source import Source, open_source
from pangu_ms.conversion.plan import Options, Plan, plan_conversion
from pangu_ms.conversion.summary import describe
from pangu_ms.conversion.verify import verify
from pangu_ms.conversion.write import Writer, check_space
from pangu_ms.errors import CheckpointError, PanguError
from pangu_ms.parallel.ranks import Ranks

EXAMPLE = """examples:
  pangu-convert hf2ms openPangu-2.0-Flash flash-ms --verify
  pangu-convert ms2hf flash-ms flash-hf
  pangu-convert hf2ms openPangu-2.0-Flash flash-4 --tensor-parallel 2 --expert-parallel 2
  pangu-convert hf2ms openPangu-2.0-Flash first-six --layers 0-5 --mtp drop --dry-run
  pangu-convert merge-lora openPangu-2.0-Flash output/lora_flash flash-merged

An interrupted conversion leaves OUT.partial. The same command goes on from its finished shards.
Exit code 0 on success, 2 when something is wrong (one message says what and how to mend it), 130 when interrupted.
"""
DOCUMENTS = (".json", ".txt", ".model", ".jinja", ".py", ".md")  # copied along: tokenizer, template, licence
LARGEST_DOCUMENT = 100_000_000
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code. Wrong options end in argparse's SystemExit with code 2."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except PanguError as error:
        print(f"pangu-convert: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"pangu-convert: error: {error.filename or arguments.output}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pangu-convert: interrupted; the same command goes on from the finished shards", file=sys.stderr)
        return 130
    return 0


def main_with_flags(command: str, argv: list[str] | None = None) -> int:
    """Run the command with MindFormers' flags --input_path, --output_path and --dtype bf16 | fp16 | fp32.

    All other arguments are passed on.
    """
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"All options of pangu-convert {command} may follow.")
    parser.add_argument("--input_path", required=True, metavar="IN")
    parser.add_argument("--output_path", required=True, metavar="OUT")
    parser.add_argument("--dtype", default="keep", choices=["keep", *CODES, *SHORT_DTYPES])
    known, others = parser.parse_known_args(argv)
    dtype = SHORT_DTYPES.get(known.dtype, known.dtype)
    return main([command, known.input_path, known.output_path, "--dtype", dtype, *others])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pangu-convert", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("hf2ms", "Hugging Face layout to ours"), ("ms2hf", "ours, whole or in ranks, to Hugging Face"),
                       ("merge-lora", "a model and a LoRA adapter to one model, in the layout of the first")):
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLE,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        merging = name == "merge-lora"
        command.add_argument("input", metavar="BASE" if merging else "IN",
                             help="checkpoint of any layout, or a training run: its newest")
        if merging:
            command.add_argument("adapter", metavar="ADAPTER",
                                 help="directory in PEFT's layout, or a training run: its newest")
        command.add_argument("output", metavar="OUT", help="directory to make; must not exist, or be empty")
        command.add_argument("--dtype", default="keep", choices=["keep", *CODES], help="number format (default: keep)")
        command.add_argument("--shard-size", type=_bytes, default="4GB", metavar="4GB", help="largest shard (4GB)")
        if not merging:
            command.add_argument("--mtp", default="keep", choices=["keep", "drop"], help="multi-token prediction layers")
            command.add_argument("--layers", type=_layers, metavar="0-5", help="keep these trunk layers only")
        command.add_argument("--verify", action="store_true", help="read everything back and compare it")
        command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
        command.add_argument("--allow-overflow", action="store_true", help="let values too large for float16 be inf")
        command.set_defaults(mtp_copies="keep", dequantize=False, tensor_parallel=1, expert_parallel=1, rank=None,
                             adapter=None, mtp="keep", layers=None)
        if name == "ms2hf":
            command.add_argument("--mtp-copies", default="keep", choices=["keep", "drop"],
                                 help="embedding and head, where the release repeats them in each MTP layer")
        else:
            command.add_argument("--dequantize", action="store_true", help="turn the Int8 release into floats")
        if name == "hf2ms":
            command.add_argument("--tensor-parallel", type=_positive, metavar="T", help="cut heads for T ranks")
            command.add_argument("--expert-parallel", type=_positive, metavar="E", help="deal experts to E ranks")
            command.add_argument("--rank", type=int, metavar="R", help="write OUT/rank_R alone")
    return parser


def run(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    output = os.path.realpath(arguments.output)
    ranks = Ranks(arguments.tensor_parallel, arguments.expert_parallel)
    options = Options(to="stacked" if arguments.command == "hf2ms" else "released", dtype=arguments.dtype,
                      shard_size=arguments.shard_size, mtp=arguments.mtp == "keep", layers=arguments.layers,
                      mtp_copies=arguments.mtp_copies == "keep", dequantize=arguments.dequantize, ranks=ranks)
    opened = open_merged(arguments.input, arguments.adapter) if arguments.adapter else open_source(arguments.input)
    with opened as source:
        if arguments.adapter:                                                   # as the base is, copies included
            options = dataclasses.replace(options, to="released" if source.layout == "released" else "stacked",
                                          mtp_copies=bool(source.repeats))
        plans = plan_conversion(source, options)
        if arguments.rank is not None:
            if not 0 <= arguments.rank < ranks.count:
                raise CheckpointError(f"--rank {arguments.rank}: wanted 0 to {ranks.count - 1}, the ranks of "
                                      f"{ranks.tensor} x {ranks.expert}")
            plans = [plans[arguments.rank]]
        documents, ignored = find_documents(source)
        if source.directory != os.fspath(arguments.input):
            print(f"newest checkpoint of the run: {source.directory}")
        print(describe(source, plans))
        if documents:
            print(f"copy: {', '.join(documents)}")
        if ignored:
            print(f"not copied: {', '.join(ignored)}")
        if arguments.dry_run:
            print("dry run: nothing was written")
            return
        targets = _targets(output, plans)
        writers = [Writer(source, plan, target, arguments.allow_overflow) for plan, target in zip(plans, targets)]
        pending = [writer for writer in writers if not writer.finished()]
        if pending:
            check_space(pending)
            source.check_repeats()
        for writer in pending:
            with tqdm(total=writer.plan.nbytes, unit="B", unit_scale=True, desc=arguments.command, disable=None) as bar:
                writer.write(documents, _check(source, writer.plan, arguments.verify), bar.update)
        for writer in writers:
            if writer not in pending and arguments.verify:
                _check(source, writer.plan, True)(writer.target)
    _report(writers, pending, time.monotonic() - started, output)


def find_documents(source: Source) -> tuple[dict[str, str], list[str]]:
    """Files to copy along (tokenizer, template, licence; name -> path), and the names of files to leave behind."""
    directory = source.shards[0].directory
    documents, ignored = {}, []
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if name in (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE) or name.endswith(".safetensors") or name.startswith("."):
            continue
        wanted = name.isprintable() and (name.endswith(DOCUMENTS) or name.startswith(("LICENSE", "NOTICE")))
        if wanted and os.path.isfile(path) and contained(directory, path) and os.path.getsize(path) <= LARGEST_DOCUMENT:
            documents[name] = path
        else:
            ignored.append(name if name.isprintable() else ascii(name))
    return documents, ignored


def _targets(output: str, plans: list[Plan]) -> list[str]:
    """Where each plan goes: the output itself, or a rank directory in it.

    Raises:
        CheckpointError: the output holds something else than ranks of the same conversion.
    """
    if plans[0].ranks.count == 1:
        if rank_directories(output):
            raise CheckpointError(f"{output}: holds ranks of a sliced checkpoint; choose another output directory")
        return [output]
    for name in sorted(os.listdir(output)) if os.path.isdir(output) else []:
        if not re.fullmatch(r"rank_\d+(\.partial)?", name):
            raise CheckpointError(f"{output}: holds {name!r}, which no conversion wrote; choose another directory")
        manifest = read_manifest(os.path.join(output, name))
        if manifest and manifest["plan"] != plans[0].digest:
            raise CheckpointError(f"{os.path.join(output, name)}: comes from another conversion; remove it")
    os.makedirs(output, exist_ok=True)
    return [rank_directory(output, plan.ranks.rank) for plan in plans]


def _check(source: Source, plan: Plan, wanted: bool):
    def check(directory: str) -> None:
        if wanted:
            with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
                verify(source, plan, directory, bar.update)
            print("verified: every tensor read back equals its source")
    return check


def _report(writers: list[Writer], pending: list[Writer], seconds: float, output: str) -> None:
    overflows = {name: count for writer in writers for name, count in writer.overflows.items()}
    for name, count in overflows.items():
        print(f"overflow: {count} values of {name} are infinite now")
    resumed = sum(writer.resumed for writer in writers)
    if resumed:
        print(f"resumed: {resumed} shards were finished and unharmed")
    if not pending:
        print(f"{output}: was complete already")
        return
    nbytes = sum(writer.plan.nbytes for writer in pending)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{output}: {nbytes:,} bytes in {seconds:.2f} s, {nbytes / 1e9 / seconds:.2f} GB/s, "
          f"peak memory {peak / 1e6:.0f} MB")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]I?B)?", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a size such as 4GB, 500MB or 2GiB")
    return size


def _layers(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a range of layers such as 0-5, or one layer")
    return int(match[1]), int(match[2] or match[1])


def _positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= LARGEST_DIMENSION:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a number of ranks, 1 to {LARGEST_DIMENSION}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
