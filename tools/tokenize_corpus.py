"""Tokenize texts or chats into an indexed corpus: Megatron's .bin and .idx, which training reads where they lie."""
import argparse
import os
import sys
import time

from pangu_ms.errors import PanguError
from pangu_ms.training.data.corpus import Settings, tokenize_corpus

EXAMPLE = """examples:
  python tools/tokenize_corpus.py data/pretrain.jsonl --tokenizer data/tokenizer --output data/pretrain
  python tools/tokenize_corpus.py web/*.parquet books.jsonl --tokenizer model --output corpora/all --skip-broken
  python tools/tokenize_corpus.py data/chats.jsonl --tokenizer data/tokenizer --documents chats --output data/chats

A file has one JSON object a line, {"text": "..."} or {"messages": [...], "thinking": true}, or is parquet with columns
of these names, for which pyarrow is needed: pip install pangu_ms[data]. Texts get the beginning and the end token. Chats
keep their loss mask in a third file, PREFIX.mask. What was killed goes on by the same command: finished parts are in
PREFIX.shards until the corpus is there. That takes twice its space for a while.
In a YAML file for training: data_loader: {type: PanguIndexedLoader, data_path: PREFIX, ...}
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL, or parquet if it ends in .parquet")
    parser.add_argument("--tokenizer", required=True, metavar="DIR",
                        help="holds tokenizer.json or tokenizer.model, and for chats a chat template")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the corpus without .bin and .idx")
    parser.add_argument("--documents", choices=["texts", "chats"], default="texts", help="what the files hold (texts)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                        help="processes (default: one for each core)")
    parser.add_argument("--skip-broken", action="store_true",
                        help="leave out and count lines that hold no text or chat, instead of refusing their file")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error("--workers: wanted at least 1")
    started = time.monotonic()
    try:
        found = tokenize_corpus(arguments.files,
                                Settings(arguments.tokenizer, arguments.documents, arguments.skip_broken),
                                arguments.output, arguments.workers)
    except PanguError as error:
        print(f"tokenize_corpus: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tokenize_corpus: error: {error.filename or arguments.output}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenize_corpus: interrupted; the same command goes on from the finished shards", file=sys.stderr)
        return 130
    report(arguments.output, found, time.monotonic() - started)
    return 0


def report(prefix, found, seconds):
    if found["reused"]:
        print(f"resumed: {found['reused']} of {found['shards']} shards were finished")
    if found["empty"]:
        print(f"left out: {found['empty']:,} empty texts")
    if found["broken"]:
        print(f"left out: {found['broken']:,} broken lines, the first of them {found['broken_line']}")
    print(f"{prefix}: {found['documents']:,} documents, {found['tokens']:,} tokens of {found['nbytes']:,} bytes in "
          f"{seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
