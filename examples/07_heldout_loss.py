"""The losses of a checkpoint on texts it has not seen, and how often each MTP layer's best guess is right.

python examples/toy_corpus.py --output data
python examples/07_heldout_loss.py [--model DIR] [--texts data/heldout.jsonl]

Unlike the acceptance that 03_speculative_report.py counts, every depth is asked at every position here, with the text
itself before it.
"""
import argparse
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

import mindspore as ms
import numpy as np
from tqdm import trange

from pangu_ms import PanguForCausalLM
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.documents import read_texts
from pangu_ms.training.data.packing import PackedDataset
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings

TOY = Path(__file__).parent / "toy"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TOY, help="checkpoint directory (default: %(default)s)")
    parser.add_argument("--texts", default="data/heldout.jsonl", help='{"text": ...} a line (default: %(default)s)')
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()

    model = PanguForCausalLM.from_pretrained(arguments.model)
    forward = Pretraining(model, TrainingSettings(indexer_loss="sparse"))
    documents = read_texts(arguments.texts, Tokenizer(arguments.model))
    data = PackedDataset(documents, arguments.sequence_length, seed=0)
    losses, counts, hits = [], [], []
    for first in trange(0, len(data) // arguments.batch * arguments.batch, arguments.batch, leave=False):
        columns = [np.stack(column) for column in zip(*(data[first + i] for i in range(arguments.batch)))]
        losses.append(forward(*map(ms.Tensor, columns))[1].asnumpy())
        ids, _, mask, position = columns
        counts.append(mask.sum())
        hits.append([right(ids, position, logits.asnumpy(), depth)
                     for depth, logits in enumerate(model.mtp_logits(ids), 1)])
    for name, value in zip(forward.part_names, np.average(losses, 0, counts)):
        print(f"{name:12} {value:8.4f}")
    for depth, share in enumerate(np.mean(hits, 0), 1):
        print(f"depth {depth}: the best guess is the next token of the text at {share:.1%} of the positions")


def right(ids, position, logits, depth):
    """The share of rows of an MTP depth whose best guess is right. They see the row, not only the document."""
    guess, token = logits[:, :-1].argmax(-1), ids[:, depth + 1:]
    inside = position[:, depth + 1:] == position[:, :-depth - 1] + depth + 1
    return (guess == token)[inside].mean()


if __name__ == "__main__":
    main()
