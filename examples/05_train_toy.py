"""Trains the toy from nothing: corpus, tokenizer, pretraining, chats, and the checkpoint in Hugging Face's layout.

python examples/05_train_toy.py [--directory .] [--output toy] [--steps N]

Takes about an hour on two cores; --steps N ends both runs after N steps, to see that all of it works. Interrupted, the
same command goes on where it was. In --directory it makes data/ and output/; --output gets the checkpoint, in bfloat16,
with the tokenizer and the curves of both runs, loss.png. The toy in examples/toy was made by this file.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from toy_corpus import train_toy_tokenizer, write_corpus

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "openpangu_v2"


def run(directory, *command):
    """A command of this repository, in `directory`; ends the program when it fails."""
    code = subprocess.run([sys.executable, *map(str, command)], cwd=directory).returncode
    if code:
        sys.exit(code)


def train(directory, config, output, steps):
    """A run of a YAML file, from its last checkpoint if there is one; a run that has ended is left as it is."""
    finished = directory / output / "finished"
    if finished.exists():
        if finished.read_text() != str(steps):
            sys.exit(f"{directory / output}: ended with --steps {finished.read_text()}; choose another --directory")
        return
    few = [] if steps is None else ["--options", "callbacks=[{type: PanguMonitor}, {type: PanguCheckpoint, "
                                    f"save_checkpoint_steps: {steps}}}, {{type: TrainCallBack, stop_step: {steps}}}]"]
    begun = ["--resume"] * (directory / output).exists()  # without a checkpoint it starts from the beginning
    run(directory, ROOT / "tools" / "train.py", "--config", CONFIGS / config, *begun, *few)
    finished.write_text(str(steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("."), help="where data/ and output/ are made")
    parser.add_argument("--output", type=Path, default=Path("toy"), help="the checkpoint; must not exist")
    parser.add_argument("--steps", type=int, metavar="N", help="of each of the two runs (default: all of its data)")
    arguments = parser.parse_args()
    directory, output = arguments.directory.resolve(), arguments.output.resolve()
    if output.exists():
        sys.exit(f"{output}: exists already; choose another --output")

    if not (directory / "data" / "tokenizer").exists():
        write_corpus(directory / "data")
        train_toy_tokenizer(directory / "data")
    train(directory, "pretrain_toy_cpu.yaml", "output/pretrain", arguments.steps)
    train(directory, "finetune_toy_sft_cpu.yaml", "output/sft", arguments.steps)
    last = max((directory / "output/sft/checkpoints").glob("step_*"))
    run(directory, ROOT / "tools" / "convert_ms_to_hf.py", "--input_path", last, "--output_path", output,
        "--dtype", "bfloat16", "--mtp-copies", "drop")
    for document in (directory / "data" / "tokenizer").iterdir():
        shutil.copy(document, output)
    logs = [directory / "output" / name / "log.jsonl" for name in ("pretrain", "sft")]
    run(directory, ROOT / "tools" / "plot_loss.py", *logs, "--out", output / "loss.png")
    print(f"the toy: {output}; try pangu-generate --model {output} --chat")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the command that was running has said so
        sys.exit(130)
