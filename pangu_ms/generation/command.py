"""The command pangu-generate: a prompt in, text out as it comes or as one JSON object; or a conversation."""
import argparse
import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

import pangu_ms
from pangu_ms.architectures import read_config
from pangu_ms.architectures.fields import COMPUTE_DTYPES
from pangu_ms.architectures.tensors import check_ranks
from pangu_ms.checkpoint.adapter import AdapterFiles
from pangu_ms.checkpoint.directory import document_directory
from pangu_ms.errors import ConfigError, PanguError, one_line
from pangu_ms.generation.config_file import PredictFile, find_predict_file
from pangu_ms.generation.interactive import converse, show_reply
from pangu_ms.generation.prefix import Continuation
from pangu_ms.generation.request import GENERATION_CONFIG, check_request, find_defaults, find_eos_token_ids
from pangu_ms.generation.sampling import Sampling
from pangu_ms.interrupts import ctrl_c
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.reply import ReplyParser
from pangu_ms.text.stop_strings import StopStrings
from pangu_ms.text.tokenizer import TOKENIZER_FILES, Tokenizer, tokenizer_file

EXAMPLE = """examples:
  pangu-generate --model openPangu-2.0-Flash --prompt "The capital of Peru is" --max-new-tokens 32
  pangu-generate --model openPangu-2.0-Flash --chat --max-new-tokens 2048 --num-draft-tokens 3 --stats
  pangu-generate --model openPangu-2.0-Flash --chat --thinking off --prompt-file question.txt --max-new-tokens 512
  pangu-generate --model openPangu-Embedded-7B --chat --thinking auto --max-new-tokens 2048
  pangu-generate --model openPangu-Embedded-7B --adapter output/lora --chat --max-new-tokens 2048
  pangu-generate --model tests/data/tiny --token-ids 5,6,7,8 --max-new-tokens 32 --json
  msrun --worker_num=8 --local_worker_num=8 --join=True --log_dir=logs tools/generate.py \\
      --config configs/openpangu_v2/predict_flash_92b.yaml --prompt "The capital of Peru is"

Where DIR has a generation_config.json, its sampling and max_new_tokens are the defaults; a line on stderr says so.
Without --json the new text (or, without a tokenizer, the new ids) goes to stdout as it comes, and a line of
statistics to stderr. With --json stdout gets one object: token_ids (the new ones), text (null without a tokenizer),
finish_reason (stop or length), with --chat also reasoning, answer and tool_calls, and stats (prefill_seconds,
prefill_tokens, decode_seconds, decode_tokens, tokens_per_second, cache_bytes, drafted and accepted by depth,
peak_memory_bytes of the process).
--chat without a prompt is a conversation: /clear forgets it, /thinking on|off|auto, /exit; Ctrl-C ends a reply. In a
chat reasoning goes to stderr, the answer to stdout. Of several processes the first prints, into its msrun log. Exit
code 0 on success, 2 when the input is wrong, 130 after Ctrl-C.
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
    parser, argv = build_parser(), sys.argv[1:] if argv is None else argv
    try:
        file = find_predict_file(argv)
        arguments = parser.parse_args([*file.options, *argv])  # what stands behind counts
        directory = document_directory(arguments.model)
        said = use_defaults(arguments, directory)
        check_options(parser, arguments)
        run(arguments, file, directory, said)
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
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of that model, PEFT's layout or a training "
                        "run: merged while loading")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; needs a tokenizer in DIR")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file")
    prompt.add_argument("--token-ids", metavar="1,2,3", help="ids to continue, taken as they are")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help=f"of each reply in a chat; required unless {GENERATION_CONFIG} in DIR says")
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
    chat.add_argument("--thinking", choices=("on", "off", "auto"), help="whether a reply begins with reasoning, as far "
                      "as the model leaves the choice; auto: it decides (default: what it does unasked)")

    sampling = parser.add_argument_group("sampling", f"the defaults are those of {GENERATION_CONFIG} in DIR, if any")
    for name, meaning in SAMPLING.items():
        default = getattr(Sampling, name)
        sampling.add_argument("--" + name.replace("_", "-"), type=type(default),
                              metavar="N" if type(default) is int else "X", help=f"{meaning} (default: {default})")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="end the text before this; may be given several times")
    return parser


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together, which argparse cannot say by itself."""
    prompted = arguments.prompt is not None or arguments.prompt_file is not None
    if arguments.max_new_tokens is None:
        parser.error("the following arguments are required: --max-new-tokens")
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


def use_defaults(arguments: argparse.Namespace, directory: str) -> str | None:
    """Gives options that the user has not given the values of generation_config.json, else those of `Sampling`.

    Returns:
        What the file gives and what it does not get, in a line; None where it says nothing.
    """
    found, left_aside = find_defaults(directory)
    used = {name: value for name, value in found.items() if getattr(arguments, name) is None}
    for name in SAMPLING:
        if getattr(arguments, name) is None:
            setattr(arguments, name, used.get(name, getattr(Sampling, name)))
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = used.get("max_new_tokens")
    parts = [", ".join(f"{name} {value}" for name, value in used.items())] if used else []
    parts += [f"left aside: {', '.join(left_aside)}"] if left_aside else []
    return f"{os.path.join(directory, GENERATION_CONFIG)}: {'; '.join(parts)}" if parts else None


def run(arguments: argparse.Namespace, file: PredictFile, directory: str, said: str | None) -> None:
    """Answers the prompt, or talks. What small files show to be wrong is refused before MindSpore is imported.

    Args:
        directory: the checkpoint.
        said: is printed when nothing has been refused.
    """
    config = read_config(directory)
    file.check(config, directory)
    tokenizer = find_tokenizer(arguments, directory)
    template = ChatTemplate(tokenizer) if arguments.chat else None
    thinking = template.chat.mode(arguments.thinking) if template else None
    ids = read_prompt(arguments, tokenizer, template, thinking)
    # A conversation has no prompt yet: one of a single token shows whether any could be answered.
    check_request(config.plan, [0] if ids is None else ids, arguments.max_new_tokens, arguments.num_draft_tokens)
    sampling = Sampling(**{name: getattr(arguments, name) for name in SAMPLING},
                        vocab_size=tokenizer.vocab_size if tokenizer else None)
    StopStrings(arguments.stop)
    eos_token_ids = find_eos_token_ids(config, directory) + (template.stop_token_ids if template else ())

    if arguments.adapter is not None:
        AdapterFiles(arguments.adapter, config).close()  # refused here, if at all
    if said is not None:
        print(said, file=sys.stderr)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    device = import_module("pangu_ms.device")                                   # from here on MindSpore is there
    if not device.available(file.context.get("device_target")):
        raise ConfigError(f"{file.path}: context.device_target: {device.NO_ASCEND}")
    device.start(**file.context)
    ranks = find_ranks(arguments, config)
    model = pangu_ms.PanguForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype,
                                                      progress=sys.stderr.isatty(), ranks=ranks,
                                                      adapter=arguments.adapter)

    continuation = Continuation() if ids is None else None

    def stream(ids):
        """The responses that follow ids."""
        with (ctrl_c(),
              tqdm(total=len(ids), desc="prefill", unit="token", mininterval=0, leave=False, disable=None) as bar):
            for response in pangu_ms.stream_generate(
                    model, ids, arguments.max_new_tokens, tokenizer=tokenizer, stop=arguments.stop, sampling=sampling,
                    num_draft_tokens=arguments.num_draft_tokens, eos_token_ids=eos_token_ids,
                    on_prefill=lambda length: bar.update(length - bar.n), continuation=continuation):
                bar.close()  # before the first output, so that the two do not mix on a terminal
                yield response

    if ids is None:
        converse(template, stream, arguments.system, thinking, show_stats if arguments.stats else None)
        return
    if ranks.rank > 0:                              # computes what the first one shows
        for _ in stream(ids):
            pass
        return
    parser = template.reply_parser(thinking) if template else None
    if arguments.json:
        print_json(stream(ids), parser)
        return
    if parser:
        _, last = show_reply(stream(ids), parser)
    else:
        last = print_responses(stream(ids))
    if last is not None:
        show_stats(last, arguments.stats)


def find_tokenizer(arguments: argparse.Namespace, directory: str) -> Tokenizer | None:
    """The directory's tokenizer. A text needs one; ids do without, and then there is None."""
    if tokenizer_file(directory):
        return Tokenizer(directory)
    if arguments.token_ids is None:
        raise PanguError(f"{directory}: holds no tokenizer ({' or '.join(TOKENIZER_FILES)}): add it" +
                         ("" if arguments.chat else ", or give the prompt as --token-ids"))
    if arguments.stop:
        raise PanguError(f"{directory}: --stop needs a tokenizer, and there is none: add it or leave --stop out")
    return None


def find_ranks(arguments: argparse.Namespace, config):
    """This process's place among those that share the model."""
    ranks = Ranks(arguments.tensor_parallel, arguments.expert_parallel)
    check_ranks(config, ranks)
    return import_module("pangu_ms.parallel.collectives").start(ranks)


def read_prompt(arguments: argparse.Namespace, tokenizer, template, thinking: str | None) -> list[int] | None:
    """The ids of the prompt, in a chat through the template; None where a conversation will bring them."""
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


def print_responses(responses):
    """Prints text as it comes, or ids with commas between where there is no tokenizer; returns the last response."""
    last = None
    for response in responses:
        number = str(response.token_id) if last is None else f",{response.token_id}"
        print(number if response.text is None else response.text, end="", flush=True)
        last = response
    print()
    return last


def print_json(responses, parser: ReplyParser | None) -> None:
    """Prints one object when all has come; with a parser it holds the parts of the reply, too."""
    responses = list(responses)
    text = None if responses[0].text is None else "".join(response.text for response in responses)
    result = {"token_ids": [response.token_id for response in responses], "text": text,
              "finish_reason": responses[-1].finish_reason}
    if parser:
        parser.push(text)
        parser.flush()
        result |= vars(parser.reply)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = {name: getattr(responses[-1], name) for name in STATS} | {"peak_memory_bytes": peak}
    print(json.dumps(result | {"stats": stats}))


def show_stats(response, more: bool = True) -> None:
    """Prints to stderr what had been spent when this response came: one line, or two with `more`."""
    print(f"prefill {response.prefill_tokens} tokens in {response.prefill_seconds:.2f} s, "
          f"decode {response.decode_tokens} in {response.decode_seconds:.2f} s, cache {response.cache_bytes:,} bytes",
          file=sys.stderr)
    if more:
        depths = [f"depth {depth} {accepted} of {drafted} ({accepted / max(drafted, 1):.0%})"
                  for depth, (drafted, accepted) in enumerate(zip(response.drafted, response.accepted), 1)]
        print(f"{response.tokens_per_second:.1f} tokens a second, drafts accepted: {', '.join(depths) or 'no drafts'}",
              file=sys.stderr)
