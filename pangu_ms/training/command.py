"""Train openPangu-2.0 as a YAML file of MindFormers' 1.x dialect says."""
import argparse
import contextlib
import os
import sys

import yaml

from pangu_ms.errors import ConfigError, PanguError, one_line
from pangu_ms.training.state import CHECKPOINTS, LOG_FILE, checkpoints, read_state
from pangu_ms.yaml_file import read_yaml

EXAMPLE = """examples:
  pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml
  pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml --resume
  pangu-train --config pretrain.yaml --options runner_config.epochs=2 output_dir=runs/second
  msrun --worker_num=2 --local_worker_num=2 --join=True tools/train.py --config pretrain.yaml \\
      --options use_parallel=True parallel_config.model_parallel=2

output_dir gets log.jsonl (a line for each step), checkpoints/step_* (each a model that pangu-generate and pangu-convert
read), and mindformers/ with what MindFormers writes and prints. --resume goes on from the newest complete checkpoint.
Exit code 0 on success, 2 when something is wrong (one line says what and how to mend it), 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; wrong options leave through argparse's SystemExit, code 2."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except PanguError as error:
        print(f"pangu-train: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npangu-train: interrupted; the same command with --resume goes on from the last checkpoint",
              file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pangu-train", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file, see configs/openpangu_v2")
    parser.add_argument("--register_path", metavar="DIR",
                        help="a directory of Python files that the YAML's auto_register keys name")
    parser.add_argument("--options", nargs="+", default=[], metavar="a.b=c", help="values in place of the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    parser.add_argument("--run_mode", choices=("train", "finetune"), help="in place of the file's")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """All that needs no MindFormers is done before it is imported, which takes seconds."""
    fields = read_yaml(arguments.config)
    for option in arguments.options:
        set_option(fields, option)
    if arguments.run_mode:
        fields["run_mode"] = arguments.run_mode
    if fields.get("run_mode", "train") not in ("train", "finetune"):
        raise ConfigError(f"{arguments.config}: run_mode is {fields['run_mode']!r}, wanted train or finetune; "
                          "pangu-generate --config reads a file for predict")
    output_dir = os.path.realpath(fields.get("output_dir") or "./output")
    resume = find_checkpoint(output_dir, arguments.resume)
    state = read_state(resume) if resume else None

    if arguments.register_path:
        os.environ["REGISTER_PATH"] = path = os.path.realpath(arguments.register_path)
        sys.path.append(path)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    theirs = os.path.join(output_dir, "mindformers")
    os.makedirs(theirs, exist_ok=True)
    os.environ["LOCAL_DEFAULT_PATH"] = theirs  # read when MindFormers is imported, which otherwise makes ./output
    # Its log goes to stdout and to a file, and it prints the whole configuration. Left open: its loggers keep it.
    with contextlib.redirect_stdout(open(os.path.join(theirs, "stdout.log"), "a", encoding="utf-8")):
        from pangu_ms.training import mindformers
        mindformers.train(fields, output_dir, resume, state)


def set_option(fields: dict, option: str) -> None:
    """"a.b=c" sets fields["a"]["b"] to c as YAML would read it."""
    key, equals, value = option.partition("=")
    if not equals:
        raise ConfigError(f"--options {option}: wanted key=value, such as runner_config.epochs=2")
    *sections, name = key.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"--options {option}: {section} is no section in the file")
    try:
        fields[name] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--options {option}: {value!r} is no YAML value; put it in quotes") from None


def find_checkpoint(output_dir: str, resume: bool) -> str | None:
    """The checkpoint to go on from; `ConfigError` when a new run would write over another."""
    found = checkpoints(output_dir)
    if resume:
        where = os.path.join(output_dir, CHECKPOINTS)
        print(f"resuming from {found[-1]}" if found else
              f"--resume: no complete checkpoint in {where}; starting from the beginning", file=sys.stderr)
        return found[-1] if found else None
    if found or os.path.exists(os.path.join(output_dir, LOG_FILE)):
        raise ConfigError(f"{output_dir}: holds another run; go on with it by --resume, or choose another output_dir")
    return None
