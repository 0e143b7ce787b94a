"""What the MTP layers save: drafts accepted by depth, tokens for each step, speed with and without. Table and PNG.

python examples/03_speculative_report.py [--model DIR] [--texts FILE] [--num-draft-tokens 3] [--plot speculative.png]

Without --texts the prompts are from the standard library's source, which the default model, the toy, has seen. After
`python examples/toy_corpus.py --output data`, --texts data/heldout.jsonl has files that it has not.
"""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

from toy_corpus import library_files

from pangu_ms import PanguForCausalLM, stream_generate
from pangu_ms.text.tokenizer import Tokenizer

TOY = Path(__file__).parent / "toy"


def measure(model, prompts, new_tokens, drafts):
    """Greedy generation of every prompt -> ids, seconds of decoding, steps, drafted and accepted by depth."""
    texts, seconds, tokens, drafted, accepted = [], 0.0, 0, [0] * drafts, [0] * drafts
    for prompt in prompts:
        *responses, last = stream_generate(model, prompt, new_tokens, num_draft_tokens=drafts, eos_token_ids=())
        texts.append([response.token_id for response in responses] + [last.token_id])
        seconds, tokens = seconds + last.decode_seconds, tokens + last.decode_tokens
        drafted = [a + b for a, b in zip(drafted, last.drafted)]
        accepted = [a + b for a, b in zip(accepted, last.accepted)]
    return texts, tokens, seconds, drafted, accepted


def read_prompts(path, tokenizer, count, length):
    """The beginnings of the first texts of a JSONL file, or of the standard library's longest files."""
    if path is None:
        texts = sorted((text for _, text in library_files()), key=len)[-count:]
    else:
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file][:count]
    return [tokenizer.encode(text)[:length] for text in texts]


def plot(path, shares, speeds):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    left.bar([str(depth) for depth in range(1, len(shares) + 1)], shares)
    left.set(title="drafts accepted", xlabel="depth", ylabel="share of those drafted", ylim=(0, 1))
    right.bar(list(speeds), list(speeds.values()))
    right.set(title="decoding", ylabel="tokens a second")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TOY, help="checkpoint directory (default: %(default)s)")
    parser.add_argument("--texts", help='JSONL file of {"text": ...}: the prompts are their beginnings')
    parser.add_argument("--prompts", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--num-draft-tokens", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--plot", default="speculative.png", help="PNG to write (default: %(default)s)")
    arguments = parser.parse_args()

    model = PanguForCausalLM.from_pretrained(arguments.model)
    prompts = read_prompts(arguments.texts, Tokenizer(arguments.model), arguments.prompts, arguments.prompt_tokens)
    for drafts in (0, arguments.num_draft_tokens):  # compiles, so that nothing of it is measured
        measure(model, prompts[:1], 4, drafts)
    plain, tokens, plain_seconds, _, _ = measure(model, prompts, arguments.new_tokens, 0)
    drafting, _, seconds, drafted, accepted = measure(model, prompts, arguments.new_tokens, arguments.num_draft_tokens)

    shares = [a / d for a, d in zip(accepted, drafted)]
    for depth, (a, d, share) in enumerate(zip(accepted, drafted, shares), 1):
        print(f"depth {depth}: {a:5} of {d:5} drafts accepted, {share:6.1%}")
    print(f"tokens a step: {1 + sum(accepted) / drafted[0]:.2f}")
    speeds = {"no drafts": tokens / plain_seconds, f"{arguments.num_draft_tokens} drafts": tokens / seconds}
    for name, speed in speeds.items():
        print(f"{name}: {speed:8.1f} tokens a second")
    print(f"speed-up: {plain_seconds / seconds:.2f}; the same text: {plain == drafting}")
    plot(arguments.plot, shares, speeds)
    print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
