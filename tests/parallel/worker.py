"""What one rank computes of a small model, started by msrun: worker.py DIRECTORY TENSOR EXPERT DATA OUTPUT WHAT...

Each rank writes OUTPUT/R.npz. The tests call the functions of WHAT for the whole model, and compare.
"""
import os
import sys
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from pangu_ms import PanguForCausalLM, generate
from pangu_ms.generation.engine import Engine
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.step import TrainStep

BATCH, LENGTH = 4, 24  # three times index_topk, so that DSA selects
PROMPT, NEW_TOKENS, DRAFTS, STEPS = 8, 12, 2, 10
CLIP = 7.0  # of logits, of which about half are above


def drafting(directory, ranks):
    """-> arrays by name: logits of a prompt and of its drafts, and what greedy decoding with drafts makes of it."""
    model = PanguForCausalLM.from_pretrained(directory, ranks=ranks)
    prompt = token_ids(model.config)[0, :PROMPT].tolist()
    engine = Engine(model, num_draft_tokens=DRAFTS)
    logits = engine.prefill(np.array([prompt], np.int32))
    _, drafted = engine.draft([prompt + [int(logits.argmax())]])
    return {"prompt_logits": logits, "draft_logits": drafted.asnumpy(),
            "tokens": np.array(generate(model, prompt, NEW_TOKENS, num_draft_tokens=DRAFTS))}


def grouped(directory, ranks):
    """-> arrays by name: logits of a prompt and of a token behind it in a model of grouped queries, and the gradients
    by parameter of one step, of which ranks share the batch."""
    model = PanguForCausalLM.from_pretrained(directory, ranks=ranks)
    ids, engine = token_ids(model.config), Engine(model, batch=BATCH)
    found = {"prompt_logits": engine.prefill(ids[:, :PROMPT])}
    found["decode_logits"] = engine.decode(ids[:, PROMPT:PROMPT + 1])
    ranks = replace(ranks or Ranks(), batch_sharded=True)
    model = PanguForCausalLM.from_pretrained(directory, ranks=ranks)
    objective = Pretraining(model, TrainingSettings())
    step = TrainStep(objective, PanguMuon(objective.trained_parameters(), model.config, 0.003, ranks=ranks))
    batch = [ids, np.roll(ids, -1, 1), np.ones(ids.shape, np.float32), np.tile(np.arange(LENGTH, dtype=np.int32),
                                                                               (BATCH, 1))]
    _, _, _, gradients = step.gradients(*(ms.Tensor(column[own_sequences(ranks)]) for column in batch))
    return found | {f"gradient {parameter.name}": gradient.asnumpy()
                    for parameter, gradient in zip(step.optimizer.parameters, gradients)}


def train(directory, ranks):
    """-> arrays by name: the parts of the loss, gradients by parameter and their sums of squares, losses, gradient
    norms and largest logits of STEPS steps, and the optimizer's moments at their end. A step that is not finite on one
    rank changes nothing on any.

    The ranks share a batch as they share everything else.
    """
    ranks = replace(ranks or Ranks(), batch_sharded=True)
    model = PanguForCausalLM.from_pretrained(directory, ranks=ranks)
    biased = any(layer.moe and layer.feed_forward.selection_bias for layer in model.plan.layers)
    settings = TrainingSettings(indexer_loss="sparse" if model.plan.indexer else "off", balance_loss_coeff=0.01,
                                z_loss_coeff=0.01, router_bias_update_rate=0.01 if biased else 0.0,
                                qk_clip_threshold=CLIP)
    ids = token_ids(model.config)
    position = np.tile(np.r_[:15, :LENGTH - 15].astype(np.int32), (BATCH, 1))   # two documents in each row
    mask = np.ones(ids.shape, np.float32)
    mask[:, [14, -1]] = 0
    mask[1, :9] = 0                                                             # ranks have different counts
    batch = [ms.Tensor(column[own_sequences(ranks)]) for column in (ids, np.roll(ids, -1, 1), mask, position)]
    objective = Pretraining(model, settings)
    optimizer = PanguMuon(objective.trained_parameters(), model.config, 0.003, ranks=ranks,
                          shard_states=ranks.data > 1)
    skips = ranks.expert == 1                                                   # a branch takes long to compile
    step = TrainStep(objective, optimizer, max_grad_norm=1.0,
                     bias_update_rate=settings.router_bias_update_rate, skips=skips)
    losses, norms, logits = [], [], []
    for number in range(STEPS):
        total, parts, load, gradients, largest = step.gradients(*batch)
        if number == 0:
            found = {f"gradient {parameter.name}": gradient.asnumpy()
                     for parameter, gradient in zip(optimizer.parameters, gradients)} | {"parts": parts.asnumpy()}
        if number == 1 and skips:                                               # what the first rank has is broken
            broken = gradients if ranks.model.rank else tuple(gradient * np.nan for gradient in gradients)
            assert not np.isfinite(step.update(ms.mutable(broken), load, total, largest)[0].asnumpy())
        norm, squares = step.update(ms.mutable(gradients), load, total, largest)
        if number == 0:
            order = np.argsort([parameter.name for parameter in optimizer.parameters])       # ranks group otherwise
            found |= {"squares": squares.asnumpy()[order]}
        norms.append(norm.asnumpy())
        logits.append(largest.asnumpy())
        losses.append(total.asnumpy())
    assert np.isfinite(losses).all()
    states = {parameter.name: parameter.asnumpy() for parameter in optimizer.get_parameters()
              if parameter.name not in optimizer.own_names} | optimizer.gathered_states()
    found |= {f"state {name}": values for name, values in states.items() if name.startswith(("muon.", "adam_m."))}
    return found | {"losses": np.array(losses), "norms": np.array(norms), "largest": np.array(logits)}


def memory(directory, ranks):
    """-> by how many bytes the process grows when it loads its part of a large model."""
    before = resident()
    model = PanguForCausalLM.from_pretrained(Path(directory) / "large", ranks=ranks)
    grown = resident() - before
    del model
    return {"memory": np.array(grown)}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_sequences(ranks):
    return slice(ranks.rank // ranks.tensor, None, ranks.batch)


def token_ids(config):
    return np.random.default_rng(7).integers(0, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)


if __name__ == "__main__":
    directory, *sizes, output = sys.argv[1:6]
    place = collectives.start(Ranks(*map(int, sizes)))
    results = {}
    for what in sys.argv[6:]:
        results |= {"drafting": drafting, "grouped": grouped, "train": train, "memory": memory}[what](directory, place)
    np.savez(Path(output) / f"{place.rank}.npz", **results)
