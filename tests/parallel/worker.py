"""What one rank computes of a small model, started by msrun: worker.py infer|train DIRECTORY TENSOR EXPERT OUTPUT.

Each rank writes OUTPUT/R.npz. The tests call `infer` and `train` for the whole model, and compare.
"""
import sys
from pathlib import Path

import mindspore as ms
import numpy as np

from pangu_ms import PanguForCausalLM, generate
from pangu_ms.model.parallel import Parallel
from pangu_ms.training.forward import TrainingForward
from pangu_ms.training.optimizer import PanguMuon
from pangu_ms.training.settings import TrainingSettings
from pangu_ms.training.step import TrainStep

LENGTH = 24  # three times index_topk, so that DSA selects
NEW_TOKENS, STEPS = 12, 10


def infer(directory, parallel):
    """-> arrays by name: logits, those of the MTP layer, greedy tokens without and with drafts."""
    model = PanguForCausalLM.from_pretrained(directory, parallel=parallel)
    ids = token_ids(model)
    prompt = ids[0, :7].tolist()
    return {"logits": model(ids).asnumpy(), "mtp_logits": model.mtp_logits(ids)[0].asnumpy(),
            "greedy": np.array(generate(model, prompt, NEW_TOKENS)),
            "drafted": np.array(generate(model, prompt, NEW_TOKENS, num_draft_tokens=2))}


def train(directory, parallel):
    """-> arrays by name: the parts of the loss, gradients by parameter, losses and gradient norms of STEPS steps."""
    model = PanguForCausalLM.from_pretrained(directory, parallel=parallel)
    settings = TrainingSettings(indexer_loss="sparse", balance_loss_coeff=0.01, z_loss_coeff=0.01,
                                router_bias_update_rate=0.01)
    forward, ids = TrainingForward(model, settings), token_ids(model)
    position = np.tile(np.r_[:15, :LENGTH - 15].astype(np.int32), (2, 1))       # two documents in each row
    mask = np.ones(ids.shape, np.float32)
    mask[:, [14, -1]] = 0
    batch = [ms.Tensor(column) for column in (ids, np.roll(ids, -1, 1), mask, position)]
    optimizer = PanguMuon(model.trainable_params(), model.config, 0.003, parallel=model.parallel)
    step = TrainStep(forward, optimizer, max_grad_norm=1.0, bias_update_rate=settings.router_bias_update_rate)
    _, parts, _, gradients = step.gradients(*batch)
    found = {f"gradient {parameter.name}": gradient.asnumpy()
             for parameter, gradient in zip(optimizer.parameters, gradients)}
    losses, norms = zip(*[(total.asnumpy(), norm.asnumpy())
                          for total, _, norm, _ in (step(*batch) for _ in range(STEPS))])
    return found | {"parts": parts.asnumpy(), "losses": np.array(losses), "norms": np.array(norms)}


def token_ids(model):
    return np.random.default_rng(7).integers(0, model.config.vocab_size, (2, LENGTH)).astype(np.int32)


if __name__ == "__main__":
    what, directory, tensor, expert, output = sys.argv[1:]
    place = Parallel.start(int(tensor), int(expert))
    np.savez(Path(output) / f"{place.rank}.npz", **{"infer": infer, "train": train}[what](directory, place))
