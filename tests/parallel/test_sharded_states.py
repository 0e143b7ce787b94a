"""Optimizer states sharded over ranks: each rank is computed here by itself, and the shards of the others are zeros, so
that the sum over the ranks is what they would gather. That they do gather it is tested in test_parallel.py."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.optimizer.pangu_muon import PanguMuon

RANKS, STEPS = 3, 2
SHAPES = {  # of the tiny model: 5 matrices, 16 experts, numbers, all uneven for three
    **{f"model.layers.{i}.self_attn.o_proj.weight": (48, 36) for i in range(5)},
    **{f"model.layers.{i}.mlp.experts.down_proj.weight": (8, 48, 20) for i in (1, 2)},
    "model.embed_tokens.weight": (199, 48), "model.layers.1.mlp.gate.weight": (8, 48), "model.norm.weight": (48,),
    "model.layers.0.input_layernorm.weight": (47,),
}


class OwnPart(nn.Cell):
    """x -> [ranks * B, ...], zeros but for its own place."""

    def __init__(self, index, ranks):
        super().__init__()
        self.own = tuple(i == index for i in range(ranks))

    def construct(self, x):
        parts = ()
        for own in self.own:
            parts = parts + (x if own else ops.zeros_like(x),)
        return ops.cat(parts)


@pytest.fixture
def optimizer(data, monkeypatch):
    """optimizer(rank, dtype): of one of three ranks; of rank None, whole."""
    config = PanguConfig.from_pretrained(data / "tiny")
    monkeypatch.setattr(collectives, "all_gather", lambda ranks, name: OwnPart(ranks.index(name), ranks.size(name)))
    monkeypatch.setattr(collectives, "all_gather_array", lambda ranks, name, array: np.concatenate(
        [array * (i == ranks.index(name)) for i in range(RANKS)]))

    def make(rank, dtype):
        draw = np.random.default_rng(0)
        params = [ms.Parameter(ms.Tensor(draw.normal(size=shape), ms.float32).astype(dtype), name)
                  for name, shape in SHAPES.items()]
        ranks = Ranks() if rank is None else Ranks(data=RANKS, rank=rank)
        return PanguMuon(params, config, 0.02, ranks=ranks, shard_states=rank is not None)
    return make


def stepped(optimizer, dtype):
    """-> parameters after some steps, and states, by name."""
    draw = np.random.default_rng(1)
    for _ in range(STEPS):
        given = {name: ms.Tensor(draw.normal(size=shape), ms.float32).astype(dtype) for name, shape in SHAPES.items()}
        optimizer(ms.mutable(tuple(given[parameter.name] for parameter in optimizer.parameters)))
    states = {p.name: p.asnumpy() for p in optimizer.get_parameters() if p.name.startswith(("muon", "adam_m", "adam_v",
                                                                                           "master"))}
    return ({p.name: p.asnumpy() for p in optimizer.parameters},
            {name: state for name, state in states.items() if name not in optimizer.own_names}
            | optimizer.gathered_states())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(ms.float32, 1e-6), (ms.float16, 1e-3)])
def test_parts_make_the_whole(optimizer, dtype, tolerance):
    wanted = stepped(optimizer(None, dtype), dtype)
    ranks = [optimizer(rank, dtype) for rank in range(RANKS)]
    found = [stepped(rank, dtype) for rank in ranks]
    assert ("master.model.embed_tokens.weight" in wanted[1]) == (dtype == ms.float16)
    for kind, whole in enumerate(wanted):
        for parts in found:
            assert parts[kind].keys() == whole.keys()
        for name, values in whole.items():
            together = sum(parts[kind][name] for parts in found)
            np.testing.assert_allclose(together, values, atol=tolerance * np.abs(values).max(), err_msg=name)
            assert sum(parts[kind][name].any() for parts in found) > 1 or len(values.shape) == 2, name


@pytest.mark.slow
def test_parts_of_whole_states(optimizer):
    """As a checkpoint has them."""
    draw, parts = np.random.default_rng(2), [optimizer(rank, ms.float16) for rank in range(RANKS)]
    whole = {name: draw.normal(size=SHAPES[name.partition(".")[2]]).astype(np.float32)
             for name in sorted(parts[0].sharded_names)}
    assert {name.partition(".")[0] for name in whole} == {"muon", "adam_m", "adam_v", "master"}
    for part in parts:
        part.set_gathered_states(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(sum(part.gathered_states()[name] for part in parts), values, err_msg=name)
