"""The command pangu-generate: a prompt in, text out as it comes or as one JSON object; or a conversation."""
import argparse
import json
import os
import resource
import sys
from pathlib import Path

from tqdm import tqdm

import pangu_ms
from pangu_ms.checkpoint.load import document_directory
from pangu_ms.config import COMPUTE_DTYPES, PanguConfig
from pangu_ms.errors import PanguError, one_line
from pangu_ms.generation.chat import ChatTemplate, ReplyParser
from pangu_ms.generation.config_file import with_config
from pangu_ms.generation.continuation import Continuation
from pangu_ms.generation.interactive import converse, ctrl_c, show_reply
from pangu_ms.generation.request import check_request, find_eos_token_ids
from pangu_ms.generation.sampling import Sampling
from pangu_ms.generation.stopping import StopStrings
from pangu_ms.generation.text import load_tokenizer, tokenizer_file

EXAMPLE = """examples:
  pangu-generate --model openPangu-2.0-Flash --prompt "The capital of Peru is" --max-new-tokens 32
  pangu-generate --model openPangu-2.0-Flash --chat --max-new-tokens 2048 --num-draft-tokens 3 --stats
  pangu-generate --model openPangu-2.0-Flash --chat --thinking off --prompt-file question.txt --max-new-tokens 512
  pangu-generate --model tests/data/tiny --token-ids 5,6,7,8 --max-new-tokens 32 --json
  msrun --worker_num=8 --local_worker_num=8 --join=True --log_dir=logs tools/generate.py \\
      --config configs/openpangu_v2/predict_flash_92b.yaml --prompt "The capital of Peru is"

Without --json the new text (or, without a tokenizer, the new ids) goes to stdout as it comes, and a line of
statistics to stderr. With --json stdout gets one object: token_ids (the new ones), text (null without a tokenizer),
with --chat also reasoning, answer and tool_calls, and stats (prefill_seconds, prefill_tokens, decode_seconds,
decode_tokens, tokens_per_second, cache_bytes, drafted and accepted by depth, peak_memory_bytes of the process).
--chat without a prompt is a conversation: /clear forgets it, /thinking on|off, /exit; Ctrl-C ends a reply. In a chat
reasoning goes to stderr, the answer to stdout. Of several processes the first prints, into its msrun log. Exit code 0
on success, 2 when the input is wrong, 130 after Ctrl-C.
"""
SAMPLING = {  # fields of Sampling that are options, and what they mean
    "temperature": "0 is greedy",
    "top_k": "keep the N likeliest; 0: all",
    "top_p": "keep the likeliest that reach this probability together",
    "min_p": "drop what is less probable than this share of the likeliest",
    "repetition_penalty": "above 1: against what the text holds already",
    "seed": "the same seed, the same text",
}
STATS = ("prefill_seconds", "prefill_tokens", "decode_seconds", "decode_tokens", "tokens_per_second", "cache_bytes",
         "drafted", "accepted")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; wrong options leave through argparse's SystemExit, code 2."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(with_config(sys.argv[1:] if argv is None else argv))
        check_options(parser, arguments)
        run(arguments)
    except PanguError as error:
        print(f"pangu-generate: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npangu-generate: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pangu-generate", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="a YAML file for predict that gives options, see "
                        "configs/openpangu_v2; those given beside it come first")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory: config.json, weights")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; needs a tokenizer in DIR")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file")
    prompt.add_argument("--token-ids", metavar="1,2,3", help="ids to continue, taken as they are")
    parser.add_argument("--max-new-tokens", required=True, type=int, metavar="N", help="of each reply in a chat")
    parser.add_argument("--dtype", default="float32", choices=COMPUTE_DTYPES, help="compute in this (default: float32)")
    parser.add_argument("--num-draft-tokens", default=0, type=int, metavar="N",
                        help="drafts of the MTP layers to verify in each step (default: 0)")
    for dimension, shared in (("tensor", "heads, widths and vocabulary"), ("expert", "routed experts")):
        parser.add_argument(f"--{dimension}-parallel", default=1, type=int, metavar="N",
                            help=f"processes, started by msrun, that share the model's {shared} (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--stats", action="store_true", help="more statistics; in a conversation after each reply")

    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="through the chat template in DIR; no prompt: a conversation")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--thinking", choices=("on", "off"), help="whether a reply begins with reasoning (default: on)")

    sampling = parser.add_argument_group("sampling")
    for name, meaning in SAMPLING.items():
        default = getattr(Sampling, name)
        sampling.add_argument("--" + name.replace("_", "-"), default=default, type=type(default),
                              metavar="N" if type(default) is int else "X", help=f"{meaning} (default: %(default)s)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="end the text before this; may be given several times")
    return parser


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What argparse cannot say by itself about options that belong together."""
    prompted = arguments.prompt is not None or arguments.prompt_file is not None
    if not arguments.chat:
        if not prompted and arguments.token_ids is None:
            parser.error("one of --prompt, --prompt-file, --token-ids, --chat is required")
        if arguments.system is not None or arguments.thinking is not None:
            parser.error("--system and --thinking need --chat")
    elif arguments.token_ids is not None:
        parser.error("--token-ids does not go with --chat: a template wants text")
    elif arguments.json and not prompted:
        parser.error("--json needs a prompt: it prints one object at the end")
    elif not prompted and (arguments.tensor_parallel, arguments.expert_parallel) != (1, 1):
        parser.error("a conversation runs in one process: give a prompt")


def run(arguments: argparse.Namespace) -> None:
    """Everything that a look at small files can refuse is refused before MindSpore is imported."""
    directory = document_directory(arguments.model)
    config = PanguConfig.from_pretrained(directory)
    tokenizer = find_tokenizer(arguments, directory)
    template = ChatTemplate(directory) if arguments.chat else None
    thinking = arguments.thinking != "off"
    ids = read_prompt(arguments, tokenizer, template, thinking)
    # A conversation has no prompt yet: one of a single token shows whether any could be answered.
    check_request(config, [0] if ids is None else ids, arguments.max_new_tokens, arguments.num_draft_tokens)
    sampling = Sampling(**{name: getattr(arguments, name) for name in SAMPLING},
                        vocab_size=tokenizer.vocab_size if tokenizer else None)
    StopStrings(arguments.stop)
    eos_token_ids = find_eos_token_ids(config, directory) + (template.stop_token_ids if template else ())

    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    parallel = find_parallel(arguments, config)
    model = pangu_ms.PanguForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype,
                                                      progress=sys.stderr.isatty(), parallel=parallel)

    continuation = Continuation() if ids is None else None

    def stream(ids):
        """The pieces that follow ids."""
        with (ctrl_c(),
              tqdm(total=len(ids), desc="prefill", unit="token", mininterval=0, leave=False, disable=None) as bar):
            for piece in pangu_ms.stream_generate(
                    model, ids, arguments.max_new_tokens, tokenizer=tokenizer, stop=arguments.stop, sampling=sampling,
                    num_draft_tokens=arguments.num_draft_tokens, eos_token_ids=eos_token_ids,
                    on_prefill=lambda length: bar.update(length - bar.n), continuation=continuation):
                bar.close()  # before the first output, so that the two do not mix on a terminal
                yield piece

    if ids is None:
        converse(template, stream, arguments.system, thinking, show_stats if arguments.stats else None)
        return
    if parallel is not None and parallel.rank > 0:                              # computes what the first one shows
        for _ in stream(ids):
            pass
        return
    parser = ReplyParser(thinking) if template else None
    if arguments.json:
        print_json(stream(ids), parser)
        return
    if parser:
        _, last = show_reply(stream(ids), parser)
    else:
        last = print_pieces(stream(ids))
    if last is not None:
        show_stats(last, arguments.stats)


def find_tokenizer(arguments: argparse.Namespace, directory: str):
    """The directory's tokenizer: needed for a text, welcome with ids."""
    if arguments.token_ids is None or tokenizer_file(directory):
        return load_tokenizer(directory)
    if arguments.stop:
        raise PanguError(f"{directory}: --stop needs a tokenizer, and there is none: add it or leave --stop out")
    return None


def find_parallel(arguments: argparse.Namespace, config: PanguConfig):
    """This process's place among those that share the model; None where there is one."""
    sizes = arguments.tensor_parallel, arguments.expert_parallel
    if sizes == (1, 1):
        return None
    from pangu_ms.model.parallel import Parallel
    parallel = Parallel(*sizes)
    parallel.check(config)
    return parallel.start()


def read_prompt(arguments: argparse.Namespace, tokenizer, template, thinking: bool) -> list[int] | None:
    """The ids of the prompt, through the template in a chat; None where a conversation will bring them."""
    if arguments.token_ids is not None:
        return parse_token_ids(arguments.token_ids)
    if arguments.prompt is None and arguments.prompt_file is None:
        return None
    text = arguments.prompt if arguments.prompt_file is None else read_file(arguments.prompt_file)
    if text == "":
        raise PanguError(f"{arguments.prompt_file or '--prompt'} is empty: give at least one character")
    if template is None:
        return tokenizer.encode(text)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return template.render([*system, {"role": "user", "content": text}], thinking)


def read_file(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PanguError(f"{path}: not UTF-8 at byte {error.start}: convert it") from None
    except OSError as error:
        raise PanguError(f"{path}: {error.strerror}: give a text file that can be read") from None


def parse_token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text.strip() else []
    except ValueError:
        raise PanguError(f"--token-ids is {text!r}: wanted integers with commas between, such as 5,6,7") from None


def print_pieces(pieces):
    """Text to stdout as it comes, without a tokenizer the ids with commas between -> the last piece."""
    last = None
    for piece in pieces:
        number = str(piece.token_id) if last is None else f",{piece.token_id}"
        print(number if piece.text is None else piece.text, end="", flush=True)
        last = piece
    print()
    return last


def print_json(pieces, parser: ReplyParser | None) -> None:
    """One object with all of it; with a parser also what the reply is made of."""
    pieces = list(pieces)
    text = None if pieces[0].text is None else "".join(piece.text for piece in pieces)
    result = {"token_ids": [piece.token_id for piece in pieces], "text": text}
    if parser:
        parser.push(text)
        parser.flush()
        result |= vars(parser.reply)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = {name: getattr(pieces[-1], name) for name in STATS} | {"peak_memory_bytes": peak}
    print(json.dumps(result | {"stats": stats}))


def show_stats(piece, more: bool = True) -> None:
    """What had been spent at this piece, to stderr: a line, and with `more` a second."""
    print(f"prefill {piece.prefill_tokens} tokens in {piece.prefill_seconds:.2f} s, decode {piece.decode_tokens} in "
          f"{piece.decode_seconds:.2f} s, cache {piece.cache_bytes:,} bytes", file=sys.stderr)
    if more:
        depths = [f"depth {depth} {accepted} of {drafted} ({accepted / max(drafted, 1):.0%})"
                  for depth, (drafted, accepted) in enumerate(zip(piece.drafted, piece.accepted), 1)]
        print(f"{piece.tokens_per_second:.1f} tokens a second, drafts accepted: {', '.join(depths) or 'no drafts'}",
              file=sys.stderr)
