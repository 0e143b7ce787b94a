"""Train openPangu-2.0 as a YAML file of MindFormers' 1.x dialect says."""
import argparse
import contextlib
import os
import sys

import yaml

from pangu_ms.checkpoint.directory import CHECKPOINTS, checkpoints
from pangu_ms.errors import ConfigError, PanguError, one_line
from pangu_ms.text.tokenizer import TOKENIZER_FILES, tokenizer_file
from pangu_ms.training.data import LOADERS
from pangu_ms.training.data.blending import read_data_path
from pangu_ms.training.run.fields import prepare
from pangu_ms.training.run.key_page import page
from pangu_ms.training.run.state import LOG_FILE, read_state
from pangu_ms.yaml_file import read_yaml

EXAMPLE = """examples:
  pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml
  pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml --resume
  pangu-train --config configs/openpangu_v2/pretrain_toy_cpu.yaml --run_mode eval \\
      --options load_checkpoint=output/pretrain
  pangu-train --config pretrain.yaml --options runner_config.epochs=2 callbacks.1.save_checkpoint_steps=50
  msrun --worker_num=2 --local_worker_num=2 --join=True tools/train.py --config pretrain.yaml \\
      --options use_parallel=True parallel_config.model_parallel=2

output_dir gets log.jsonl (a line for each step), checkpoints/step_* (each a model that pangu-generate and pangu-convert
read), and mindformers/ with what MindFormers writes and prints. --resume goes on from the newest complete checkpoint.
--run_mode eval trains nothing: it prints the losses of load_checkpoint on eval_dataset, and writes eval.json.
Exit code 0 on success, 2 when something is wrong (one line says what and how to mend it), 130 after Ctrl-C.
"""


RUN_MODES = ("train", "finetune", "eval")


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
    parser.add_argument("--options", nargs="+", default=[], metavar="a.b=c",
                        help="values in place of the file's; a number names an item of a list, from 0")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    parser.add_argument("--list-keys", action="version", version=page(),
                        help="print every key of a file, with what it does or why it is refused, and leave")
    parser.add_argument("--run_mode", choices=RUN_MODES, help="in place of the file's")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """All that needs no MindFormers is done before it is imported, which takes seconds."""
    fields = read_yaml(arguments.config)
    for option in arguments.options:
        set_option(fields, option)
    if arguments.run_mode:
        fields["run_mode"] = arguments.run_mode
    if fields.get("run_mode", "train") not in RUN_MODES:
        raise ConfigError(f"{arguments.config}: run_mode is {fields['run_mode']!r}, wanted train, finetune or eval; "
                          "pangu-generate --config reads a file for predict")
    output_dir = os.path.realpath(fields.get("output_dir") or "./output")
    if fields.get("run_mode") == "eval":
        evaluate(fields, output_dir, arguments)
        return
    resume = find_checkpoint(output_dir, arguments.resume)
    state = read_state(resume) if resume else None
    check_paths(fields, () if resume else ("load_checkpoint", "pretrained_model_dir"),
                 ("train_dataset", "eval_dataset") if fields.get("do_eval") else ("train_dataset",))
    prepare(fields, resume, state)

    with surroundings(os.path.join(output_dir, "mindformers"), arguments.register_path):
        from pangu_ms.training.run import mindformers
        mindformers.train(fields, output_dir, resume, state)


def evaluate(fields: dict, output_dir: str, arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint's losses on held-out data are."""
    if arguments.resume:
        raise ConfigError("--resume: nothing is trained with run_mode eval; load_checkpoint says what is evaluated")
    check_paths(fields, ("load_checkpoint", "pretrained_model_dir"), ("eval_dataset",))
    prepare(fields)
    with surroundings(os.path.join(output_dir, "mindformers"), arguments.register_path):
        from pangu_ms.training.run import mindformers
        line = mindformers.evaluate(fields, output_dir)
    if line:
        print(line)


@contextlib.contextmanager
def surroundings(directory: str, register_path: str | None):
    """What MindFormers reads of the process, for as long as it runs; environment, sys.path and stdout are put back.

    Modules stay imported, and keep what they read when they were: MindSpore its log level, MindFormers its directory
    and its loggers. Those write to the stdout of that moment, so its file stays open for as long as the process lives.

    Args:
        directory: gets what MindFormers writes and prints.
        register_path: directory of modules that the YAML file names.
    """
    os.makedirs(directory, exist_ok=True)
    wanted = {
        "LOCAL_DEFAULT_PATH": directory,  # read when MindFormers is imported, which otherwise makes ./output
        "HF_HUB_OFFLINE": "1",  # read when it imports transformers: whatever it is given, it asks no model hub
        "GLOG_v": os.environ.get("GLOG_v", "3"),  # MindSpore's own log: errors only, unless the user wants more
    }
    if register_path:
        wanted["REGISTER_PATH"] = os.path.realpath(register_path)
        sys.path.append(wanted["REGISTER_PATH"])
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # MindFormers logs to stdout and prints the whole configuration.
    stdout = open(os.path.join(directory, "stdout.log"), "a", encoding="utf-8")
    try:
        with contextlib.redirect_stdout(stdout):
            yield
    finally:
        stdout.flush()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if register_path:
            with contextlib.suppress(ValueError):  # a module of the user may have taken it out
                sys.path.remove(wanted["REGISTER_PATH"])


def set_option(fields: dict, option: str) -> None:
    """"a.b=c" sets fields["a"]["b"] to c as YAML would read it; a number stands for an item of a list that is there.

    Raises:
        ConfigError: the option has no value, leads through something that is no section, or names no item of a list.
    """
    way, equals, value = option.partition("=")
    names = way.split(".")
    if not equals or "" in names:
        raise ConfigError(f"--options {option}: wanted key=value, such as runner_config.epochs=2")
    try:
        value = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        raise ConfigError(f"--options {option}: {value!r} is no YAML value; put it in quotes") from None
    place = fields
    for depth, name in enumerate(names, 1):
        where = f"--options {option}: {'.'.join(names[:depth])}"
        if isinstance(place, list) and not (name.isdecimal() and int(name) < len(place)):
            raise ConfigError(f"{where}: no such item; {'.'.join(names[:depth - 1])} has {len(place)}, counted from 0")
        key = int(name) if isinstance(place, list) else name
        if depth == len(names):
            place[key] = value
            return
        if isinstance(place, dict) and place.get(key) is None:
            if names[depth].isdecimal():
                raise ConfigError(f"{where}: no such list in the file")
            place[key] = {}
        place = place[key]
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"{where} is no section in the file")


def check_paths(fields: dict, checkpoints: tuple[str, ...], datasets: tuple[str, ...]) -> None:
    """`ConfigError` for what the run would read and what is not there: the keys of `checkpoints`, and our loaders' of
    the sections `datasets`.

    Said here, it is said at once, and before anything could take the name for one of a model hub.
    """
    for key in checkpoints:
        if fields.get(key) and not os.path.isdir(str(fields[key])):
            raise ConfigError(f"{key}: {fields[key]}: no such directory; give one that holds a checkpoint or a run")
    for section in datasets:
        check_loader(section, fields.get(section))


def check_loader(section: str, dataset: object) -> None:
    loader = dataset.get("data_loader") if isinstance(dataset, dict) else None
    if not isinstance(loader, dict) or loader.get("type") not in LOADERS:
        return
    wanted = [("tokenizer", loader.get("tokenizer"), f"a directory with {' or '.join(TOKENIZER_FILES)}")]
    if loader["type"] == "PanguJsonlLoader":
        wanted.insert(0, ("path", loader.get("path"), "a JSONL file"))
    else:
        wanted += [("data_path", f"{prefix}.{ending}", "the path of .bin and .idx without these endings")
                   for _, prefix in read_data_path(loader.get("data_path")) for ending in ("bin", "idx")]
    for key, path, wanted in wanted:
        name = f"{section}.data_loader.{key}"
        if not path:
            raise ConfigError(f"{name}: missing; give {wanted}")
        if not (tokenizer_file(str(path)) if key == "tokenizer" else os.path.isfile(str(path))):
            raise ConfigError(f"{name}: {path}: {'holds none' if os.path.isdir(str(path)) else 'is not there'}; "
                              f"give {wanted}")


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
