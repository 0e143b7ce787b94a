"""The command pangu-generate: a prompt in, greedy text out, as it comes or as one JSON object."""
import argparse
import json
import os
import resource
import sys

from tqdm import tqdm

import pangu_ms
from pangu_ms.config import COMPUTE_DTYPES, PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.generation.request import check_request, find_eos_token_ids
from pangu_ms.generation.text import StreamDecoder, load_tokenizer, tokenizer_file

EXAMPLE = """examples:
  pangu-generate --model openPangu-2.0-Flash --prompt "The capital of Peru is" --max-new-tokens 32
  pangu-generate --model tests/data/tiny --token-ids 5,6,7,8 --max-new-tokens 32 --json

Without --json the new text (or, without a tokenizer, the new ids) goes to stdout as it comes, and a line of
statistics to stderr. With --json stdout gets one object: token_ids (the new ones), text (null without a tokenizer),
stats (prefill_seconds, prefill_tokens, decode_seconds, decode_tokens, cache_bytes, peak_memory_bytes of the process).
Exit code 0 on success, 2 when the input is wrong.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; wrong options leave through argparse's SystemExit, code 2."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except PanguError as error:
        print(f"pangu-generate: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pangu-generate", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory: config.json, weights")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; needs a tokenizer in DIR")
    prompt.add_argument("--token-ids", metavar="1,2,3", help="ids to continue, taken as they are")
    parser.add_argument("--max-new-tokens", required=True, type=int, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=COMPUTE_DTYPES, help="compute in this (default: float32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Everything that a look at small files can refuse is refused before MindSpore is imported."""
    config = PanguConfig.from_pretrained(arguments.model)
    ids, tokenizer = read_prompt(arguments)
    check_request(config, ids, arguments.max_new_tokens)
    eos_token_ids = find_eos_token_ids(config, arguments.model)

    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    model = pangu_ms.PanguForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype,
                                                      progress=sys.stderr.isatty())

    decoder = StreamDecoder(tokenizer) if tokenizer else None
    new_ids, texts = [], []
    with tqdm(total=len(ids), desc="prefill", unit="token", mininterval=0, leave=False, disable=None) as bar:
        for piece in pangu_ms.stream_generate(model, ids, arguments.max_new_tokens, eos_token_ids=eos_token_ids,
                                              on_prefill=lambda done, total: bar.update(done - bar.n)):
            bar.close()  # before the first output, so that the two do not mix on a terminal
            shown = decoder.push(piece.token_id) if decoder else ("," if new_ids else "") + str(piece.token_id)
            new_ids.append(piece.token_id)
            texts.append(shown)
            if not arguments.json:
                print(shown, end="", flush=True)
    if decoder:
        texts.append(decoder.flush())

    stats = {name: getattr(piece, name) for name in
             ("prefill_seconds", "prefill_tokens", "decode_seconds", "decode_tokens", "cache_bytes")}
    stats["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.json:
        print(json.dumps({"token_ids": new_ids, "text": "".join(texts) if decoder else None, "stats": stats}))
    else:
        print(texts[-1] if decoder else "")
        print("prefill {prefill_tokens} tokens in {prefill_seconds:.2f} s, decode {decode_tokens} in "
              "{decode_seconds:.2f} s, cache {cache_bytes:,} bytes".format(**stats), file=sys.stderr)


def read_prompt(arguments: argparse.Namespace):
    """The ids of the prompt, and the directory's tokenizer: needed for a text, welcome with ids."""
    if arguments.prompt == "":
        raise PanguError("--prompt is empty: give at least one character")
    if arguments.prompt is not None:
        tokenizer = load_tokenizer(arguments.model)
        return tokenizer.encode(arguments.prompt), tokenizer
    tokenizer = load_tokenizer(arguments.model) if tokenizer_file(arguments.model) else None
    return parse_token_ids(arguments.token_ids), tokenizer


def parse_token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text.strip() else []
    except ValueError:
        raise PanguError(f"--token-ids is {text!r}: wanted integers with commas between, such as 5,6,7") from None


def one_line(error: PanguError) -> str:
    """An error that lists several findings, one a line, on a single line."""
    return "; ".join(line.strip() for line in str(error).splitlines()).replace(":; ", ": ")
