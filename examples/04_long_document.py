"""A long prompt, past every sliding window and past index_topk: what it costs, and what still reaches the end.

python examples/04_long_document.py [--model DIR] [--length 448]

One token near the beginning, the needle, is exchanged. The sliding-window layers alone could carry the difference only
as far as their windows together reach; whatever arrives at the last position beyond that came through the DSA layers,
whose indexer picks index_topk rows of the whole document. The default checkpoint has random weights: it shows the path,
not an answer.
"""
import argparse
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

import numpy as np
from tqdm import tqdm

from pangu_ms import PanguForCausalLM
from pangu_ms.generation.engine import Engine

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny"
NEEDLE = 20  # its position


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help="checkpoint directory (default: %(default)s)")
    parser.add_argument("--length", type=int, default=448, help="tokens of the document (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=64, help="prefill this many at once (default: %(default)s)")
    arguments = parser.parse_args()

    model = PanguForCausalLM.from_pretrained(arguments.model)
    config = model.config
    reach = sum(layer.attention.window - 1 for layer in config.plan.trunk if layer.attention.window)
    print(f"{arguments.length} tokens, needle at {NEEDLE}; the windows reach {reach} tokens back, all layers together; "
          f"index_topk {config.index_topk}")

    document = np.random.default_rng(0).integers(5, config.vocab_size, (1, arguments.length)).astype(np.int32)
    engine = Engine(model)
    engine.prefill(document[:, :NEEDLE], arguments.chunk)
    before = engine.cache.copy()  # what stands before the needle is computed once
    logits = []
    for needle in (document[0, NEEDLE], (document[0, NEEDLE] + 1) % config.vocab_size):
        document[0, NEEDLE] = needle
        engine.cache = before.copy()
        with tqdm(total=arguments.length, desc=f"needle {needle}", unit="token", initial=NEEDLE) as bar:
            logits.append(engine.prefill(document[:, NEEDLE:], arguments.chunk,
                                         lambda length: bar.update(length - bar.n))[0])
    print(f"cache: {engine.cache.bytes:,} bytes, of which the windows and taps take the same at any length")
    difference = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    print(f"exchanging the needle changes the logits at the end by {difference:.2%} of the largest")


if __name__ == "__main__":
    main()
