"""The toy in examples/toy: writes code with and without drafts, answers, trains 30 more steps, converts both ways.

python examples/06_toy_demo.py [--directory output/demo]

The toy is the whole architecture at 5.7 million parameters, trained by 05_train_toy.py on the standard library's source
and on small chats. About two minutes on two cores, most of them compiling.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

from toy_corpus import library_files, write_jsonl

from pangu_ms import PanguForCausalLM, stream_generate
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TOY = ROOT / "examples" / "toy"
PROMPTS = ('class Queue:\n    """A queue of items.\n\n    """\n\n    def __init__(self, maxsize=0):\n',
           'def main():\n    import argparse\n    parser = argparse.ArgumentParser()\n')
QUESTIONS = (("What is the capital of Peru?", True), ("In which module is `heappush` defined?", False))
STEPS, BATCH, LENGTH = 30, 4, 512


def write_code(model, tokenizer, new_tokens=160, drafts=3):
    """The prompts continued, greedily, without drafts and with them."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for k in (0, drafts):  # compiles, past index_topk too, so that nothing of it is measured
        list(stream_generate(model, prompts[0], new_tokens, num_draft_tokens=k, eos_token_ids=()))
    speeds, texts = {}, {}
    for k in (0, drafts):
        seconds, tokens, drafted, accepted = 0.0, 0, [0] * k, [0] * k
        texts[k] = []
        for prompt in prompts:
            *responses, last = stream_generate(model, prompt, new_tokens, num_draft_tokens=k, eos_token_ids=())
            texts[k].append([response.token_id for response in responses] + [last.token_id])
            seconds, tokens = seconds + last.decode_seconds, tokens + last.decode_tokens
            drafted = [a + b for a, b in zip(drafted, last.drafted)]
            accepted = [a + b for a, b in zip(accepted, last.accepted)]
        speeds[k] = tokens / seconds
    for prompt, text in zip(PROMPTS, texts[0]):
        print(prompt + tokenizer.decode(text) + "\n" + "-" * 80)
    for depth, (a, d) in enumerate(zip(accepted, drafted), 1):
        print(f"depth {depth}: {a} of {d} drafts accepted, {a / d:.0%}")
    print(f"{speeds[0]:.0f} tokens a second without drafts, {speeds[drafts]:.0f} with {drafts}: "
          f"{speeds[drafts] / speeds[0]:.2f} times; the same text: {texts[0] == texts[drafts]}\n")


def answer(model, tokenizer):
    template = ChatTemplate(tokenizer)
    for question, thinking in QUESTIONS:
        ids = template.render([{"role": "user", "content": question}], thinking=thinking)
        responses = stream_generate(model, ids, 60, num_draft_tokens=3, eos_token_ids=template.stop_token_ids)
        reply = tokenizer.decode([response.token_id for response in responses])
        print(f"{question}\n  {'<think>' if thinking else ''}{reply}")
    print()


def write_texts(tokenizer, path):
    """As many files of the standard library as make STEPS batches, the last of them cut."""
    wanted, records = (STEPS * BATCH + 1) * LENGTH, []
    for name, text in library_files():
        if (count := len(tokenizer.encode(text))) > wanted:
            text = text[:len(text) * wanted // count]
        records.append({"id": name, "text": text})
        wanted -= min(count, wanted)
        if not wanted:
            break
    write_jsonl(path, records)


def run(directory, *command):
    command = [str(part) for part in command]
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, *command], cwd=directory).returncode
    if code:
        sys.exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("output/demo"),
                        help="made anew each time (default: %(default)s)")
    directory = parser.parse_args().directory.resolve()
    if directory.exists() and not (directory / "texts.jsonl").exists():
        sys.exit(f"{directory}: exists and is none of this demo's; choose another --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    began = time.monotonic()

    model, tokenizer = PanguForCausalLM.from_pretrained(TOY), Tokenizer(TOY)
    write_code(model, tokenizer)
    answer(model, tokenizer)

    write_texts(tokenizer, directory / "texts.jsonl")
    run(directory, ROOT / "tools/train.py", "--config", ROOT / "configs/openpangu_v2/pretrain_toy_cpu.yaml",
        "--options", f"load_checkpoint={TOY}", "output_dir=run", "train_dataset.data_loader.path=texts.jsonl",
        f"train_dataset.data_loader.tokenizer={TOY}", "runner_config.epochs=1", "lr_schedule.learning_rate=5.e-4")
    losses = [json.loads(line)["lm"] for line in open(directory / "run/log.jsonl")]
    print(f"{len(losses)} steps: language model loss {losses[0]:.2f} to {losses[-1]:.2f}")

    trained = max((directory / "run/checkpoints").iterdir())
    for command, source, target in (("ms2hf", trained, "hf"), ("hf2ms", "hf", "ms")):
        run(directory, "-m", "pangu_ms.conversion.command", command, source, target, "--verify")
    run(directory, ROOT / "tools/inspect_checkpoint.py", trained, "--diff", directory / "ms")
    run(directory, ROOT / "tools/plot_loss.py", "run/log.jsonl", "--out", "loss.png")
    print(f"plot: {directory / 'loss.png'}; all of it in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
