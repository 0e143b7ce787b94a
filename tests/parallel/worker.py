"""What one rank computes of a small model, started by msrun: worker.py infer DIRECTORY TENSOR EXPERT OUTPUT.

Each rank writes OUTPUT/R.npz. The tests call `infer` for the whole model, and compare.
"""
import sys
from pathlib import Path

import numpy as np

from pangu_ms import PanguForCausalLM, generate
from pangu_ms.model.parallel import Parallel

LENGTH = 24  # three times index_topk, so that DSA selects
NEW_TOKENS = 12


def infer(directory, parallel):
    """-> arrays by name: logits, those of the MTP layer, greedy tokens without and with drafts."""
    model = PanguForCausalLM.from_pretrained(directory, parallel=parallel)
    ids = token_ids(model)
    prompt = ids[0, :7].tolist()
    return {"logits": model(ids).asnumpy(), "mtp_logits": model.mtp_logits(ids)[0].asnumpy(),
            "greedy": np.array(generate(model, prompt, NEW_TOKENS)),
            "drafted": np.array(generate(model, prompt, NEW_TOKENS, num_draft_tokens=2))}


def token_ids(model):
    return np.random.default_rng(7).integers(0, model.config.vocab_size, (2, LENGTH)).astype(np.int32)


if __name__ == "__main__":
    what, directory, tensor, expert, output = sys.argv[1:]
    place = Parallel.start(int(tensor), int(expert))
    np.savez(Path(output) / f"{place.rank}.npz", **{"infer": infer}[what](directory, place))
