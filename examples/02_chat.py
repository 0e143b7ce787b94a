"""A chat from Python: reasoning, answer and tool calls of each reply, as they come.

python examples/02_chat.py [--model DIR] [--num-draft-tokens 3]

The default model, the toy, has learned to answer small questions such as the first; the second is beyond it.
"""
import argparse
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

from pangu_ms import PanguForCausalLM, Sampling, stream_generate
from pangu_ms.generation.prefix import Continuation
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer

TOY = Path(__file__).parent / "toy"
QUESTIONS = ["What is the capital of Peru?", "And how many people live there?"]


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TOY, metavar="DIR",
                        help="checkpoint with a tokenizer and a chat template (default: %(default)s)")
    parser.add_argument("--num-draft-tokens", type=int, default=0, metavar="N", help="drafts a step (default: 0)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of a reply (default: 256)")
    return parser.parse_args()


def main():
    arguments = read_arguments()
    tokenizer = Tokenizer(arguments.model)
    template = ChatTemplate(tokenizer)
    model = PanguForCausalLM.from_pretrained(arguments.model)
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=1, vocab_size=tokenizer.vocab_size)

    messages = [{"role": "system", "content": "Answer in one sentence."}]
    continuation = Continuation()  # so that a turn computes what is new of its prompt, not the whole conversation
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        responses = stream_generate(model, template.render(messages), arguments.max_new_tokens, tokenizer=tokenizer,
                                    sampling=sampling, num_draft_tokens=arguments.num_draft_tokens,
                                    eos_token_ids=template.stop_token_ids, continuation=continuation)
        parser, part = template.reply_parser(), "user"
        print(f"[{part}] {question}", end="")
        for response in responses:
            part = show(parser.push(response.text), part)
        show(parser.flush(), part)
        print()
        messages.append(parser.reply.message())


def show(found, part):
    """Prints what a reply brings, the name of each part before it -> the part that stands last."""
    for following, text in found:
        print(text if following == part else f"\n[{following}] {text}", end="", flush=True)
        part = following
    return part


if __name__ == "__main__":
    main()
