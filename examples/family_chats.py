"""Chats about small sums and capitals for a toy of openPangu Embedded, and a tokenizer.model with the family's marks.

python examples/family_chats.py --output data/family

writes tokenizer/ and chats.jsonl ({"messages", "thinking"}), half of them with thinking.
"""
import argparse
from pathlib import Path

from family_tokenizer import train_family_tokenizer
from toy_corpus import Questions, write_jsonl

CHATS, VOCABULARY = 4000, 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go")
    directory = Path(parser.parse_args().output)
    questions = Questions(files=())
    chats = [questions.chat() for _ in range(CHATS)]
    texts = [message[key] for chat in chats for message in chat["messages"]
             for key in ("content", "reasoning_content") if key in message]
    # What the chat template writes, too.
    ids = train_family_tokenizer([*texts, "系统：用户：助手：工具：方法： /no_think /auto_think"], VOCABULARY,
                                 directory / "tokenizer")
    write_jsonl(directory / "chats.jsonl", chats)
    print(f"{directory}: {len(chats):,} chats, a tokenizer of {ids} ids")


if __name__ == "__main__":
    main()
