"""Bytes: weights against the slices that ranks store, states by hand, the cache against pangu_ms.cache."""
import json
import math

import numpy as np
import pytest

from pangu_ms.checkpoint.layout import Grid, stacked
from pangu_ms.checkpoint.names import count_parameters, parameters
from pangu_ms.config import PanguConfig
from pangu_ms.estimate.flops import local_count, muon_rows
from pangu_ms.estimate.memory import (cache_bytes, layer_activations, memory, optimizer_bytes, optimizer_work_bytes,
                                      total, train_logits_bytes, weight_bytes)
from pangu_ms.estimate.work import Parallel, Work, held, prefill_calls, train_calls

FLASH = PanguConfig.flash_92b()
GOLDEN = ("tiny", "tiny_full", "odd", "eps")


@pytest.fixture(params=GOLDEN)
def golden_config(request, data):
    return PanguConfig.from_pretrained(data / request.param)


def test_flash_counts_what_names_counts():
    assert sum(local_count(p, Parallel()) for p in held(FLASH)) == count_parameters(FLASH)["trunk_and_mtp"]
    assert sum(weight_bytes(FLASH, Parallel(), Work("infer", 1, 1, "float32")).values()) == \
        4 * count_parameters(FLASH)["trunk_and_mtp"]


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_the_tensors_of_the_file(data, name):
    """The files hold float32 and, as the release does, the MTP copies, which the network shares."""
    with open(data / name / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    stored = sum(math.prod(entry["shape"]) for tensor, entry in header.items() if tensor != "__metadata__"
                 and not tensor.endswith((".embed_tokens.weight", "shared_head.head.weight"))
                 or tensor == "model.embed_tokens.weight")
    config = PanguConfig.from_pretrained(data / name)
    assert sum(weight_bytes(config, Parallel(), Work("infer", 1, 1, "float32")).values()) == 4 * stored


@pytest.mark.parametrize("tensor,expert", [(1, 1), (2, 1), (1, 8), (4, 2), (16, 32)])
def test_weights_of_a_rank_are_its_slices(tensor, expert):
    grid, parallel = Grid(tensor, expert), Parallel(3, tensor, expert)
    for rank in {0, grid.ranks - 1}:
        slices = {stored.name: math.prod(stored.shape) for stored in stacked(FLASH, grid, rank)}
        assert {p.name: local_count(p, parallel) for p in held(FLASH)} == slices


def test_bfloat16_weights_keep_some_float32():
    work = Work("infer", 1, 1, "bfloat16")
    exact = sum(p.count for p in held(FLASH) if ".mlp.gate." in p.name or "mhc" in p.name or "e_score" in p.name)
    assert sum(weight_bytes(FLASH, Parallel(), work).values()) == \
        2 * count_parameters(FLASH)["trunk_and_mtp"] + 2 * exact


def test_optimizer_states_by_hand(golden_config):
    """Masters for all but float32 parameters; 4 bytes a value for Muon, 8 for AdamW; none for the selection bias."""
    values = {p.name: p.count for p in parameters(golden_config).values() if not p.name.endswith("correction_bias")}
    exact = sum(n for name, n in values.items() if ".mlp.gate." in name or "mhc" in name)
    muon = sum(n for name, n in values.items() if name.endswith("proj.weight") or "_b_proj" in name
               or name.endswith(("kv_a_proj_with_mqa.weight", "wq_b.weight", "wk.weight")))
    found = optimizer_bytes(golden_config, Parallel(), Work("train", 8, 1, "bfloat16"))
    assert found == {"masters": 4 * (sum(values.values()) - exact), "muon_moments": 4 * muon,
                     "adamw_moments": 8 * (sum(values.values()) - muon)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("muon", [True, False])
def test_divided_states_are_those_of_the_optimizer(golden_config, monkeypatch, ranks, muon):
    """All that it keeps besides parameters and counters, on any of the ranks."""
    from mindspore import nn

    from pangu_ms import PanguForCausalLM
    from pangu_ms.model.parallel import Parallel as Place
    from pangu_ms.training.optimizer import PanguMuon
    monkeypatch.setattr(Place, "all_rows", lambda self, dimension: nn.Identity())              # there is one process
    if not muon:
        monkeypatch.setattr("pangu_ms.estimate.flops.muon_rows", lambda p, config: None)
        monkeypatch.setattr("pangu_ms.estimate.memory.muon_rows", lambda p, config: None)
    wanted = optimizer_bytes(golden_config, Parallel(ranks, 1, 1), Work("train", 8, 6, "float32", shard_optimizer=True))
    params = [p for p in PanguForCausalLM(golden_config).trainable_params() if not p.name.endswith("correction_bias")]
    for rank in range(ranks):
        place = Place(data=ranks, rank=rank)
        optimizer = PanguMuon(params, golden_config, muon=muon, parallel=place, divide_states=True)
        found = sum(p.nbytes for p in optimizer.get_parameters() if p.name in optimizer.parts)
        assert found == pytest.approx(sum(wanted.values()), rel=1e-4)           # each kind is filled up to equal parts


def test_muon_sees_what_the_optimizer_sees(golden_config):
    """Rows of each matrix: the optimizer's (periods, sizes) multiplied out."""
    from pangu_ms.training.optimizer import matrix_rows
    for config in (golden_config, FLASH):
        for p in held(config):
            rows = matrix_rows(p.name, p.shape, config)
            assert muon_rows(p, config) == (rows and tuple(rows[0] * size for size in rows[1])), p.name


def test_muon_stacks_equal_parameters_up_to_a_size(monkeypatch):
    """Gate and up of all 47 MoE layers are equal, and three of them have less than 2^28 values on each rank; each is
    there three times in float32. Two ranks that divide them stack the bfloat16 gradients of two."""
    monkeypatch.setattr("pangu_ms.estimate.memory.held",
                        lambda config: [p for p in held(config) if p.component == "expert"])
    one = 256 * 1024 * 2560 // 8
    assert optimizer_work_bytes(FLASH, Parallel(1, 1, 8), Work("train", 8, 8)) == 12 * 3 * one
    shared = Work("train", 8, 16, shard_optimizer=True)
    assert optimizer_work_bytes(FLASH, Parallel(2, 1, 8), shared) == 12 * one + 2 * 2 * one
    from pangu_ms.estimate import memory as estimate
    from pangu_ms.training.optimizer import STACKED
    assert estimate.STACKED == STACKED


@pytest.mark.parametrize("length,batch,dtype", [(1, 1, "float32"), (77, 3, "float16"), (32768, 2, "bfloat16")])
def test_cache_is_the_cache(golden_config, length, batch, dtype):
    from pangu_ms import cache
    for config in (golden_config, FLASH):
        assert cache_bytes(config, Parallel(), Work("infer", length, batch, dtype)) == \
            cache.cache_bytes(config, length, batch, dtype)["total"]


def test_tensor_ranks_share_no_latent_rows():
    one, four = (cache_bytes(FLASH, Parallel(1, tensor, 1), Work("infer", 32768, 1)) for tensor in (1, 4))
    assert one - four == 49 * 2 * 6144 * 3 // 4 * 2


def test_expert_ranks_have_sequences_of_their_own_in_training_alone():
    train, infer, ranks = Work("train", 1000, 16), Work("infer", 1000, 9), Parallel(1, 1, 8)
    assert train.sequences(ranks) == 2 and train.group_sequences(ranks) == 16
    assert infer.sequences(ranks) == infer.group_sequences(ranks) == 9
    assert cache_bytes(FLASH, ranks, infer) == 9 * cache_bytes(FLASH, Parallel(), Work("infer", 1000, 1))


def test_scores_are_the_plain_forms_largest_part():
    """48 heads, 4096 queries by 4096 keys and 128 sinks, float32 and bfloat16; fused keeps a number for each query."""
    for fused, wanted in ((False, 48 * 4096 * (4096 + 128) * 6), (True, 48 * 4096 * 4)):
        work = Work("train", 4096, 1, fused=fused)
        assert layer_activations(FLASH, Parallel(), work, FLASH.layers[1], train_calls(work))["scores"] == wanted


def test_copies_of_the_ascend_forms():
    """32 experts of 3 matrices 2560 x 512; 4096 rows of a cache of 512 + 64."""
    parallel = Parallel(1, 2, 8)
    work = Work("train", 4096, 8, fused=True)
    copies = layer_activations(FLASH, parallel, work, FLASH.layers[2], train_calls(work))["expert_copies"]
    assert copies == 32 * 3 * 2560 * 512 * 2
    work = Work("infer", 4096, 1, fused=True)
    calls = prefill_calls(FLASH, parallel, work)
    dsa = layer_activations(FLASH, parallel, work, FLASH.layers[FLASH.dsa_layers[0]], calls)
    assert dsa["split_cache"][-1] == 4096 * 576 * 2


def test_logits():
    assert train_logits_bytes(FLASH, Parallel(), Work("train", 4096, 1)) == 4096 * 151552 * (16 + 2 + 8)
    from pangu_ms.ops.cross_entropy import ROWS
    piece = ROWS * 75776 * (4 + 4 + 4 + 2 + 2) + 75776 * 2560 * 4               # of 4 rows' time, 1 is there
    assert train_logits_bytes(FLASH, Parallel(1, 2, 1), Work("train", 4096, 1)) == piece
    assert train_logits_bytes(FLASH, Parallel(1, 2, 1), Work("train", 4096, 1, fused=True)) == piece


def test_what_helps_helps():
    def needed(parallel, **options):
        return total(memory(FLASH, parallel, Work("train", 4096, 64, **options)))
    base = needed(Parallel(1, 1, 64))
    assert needed(Parallel(1, 1, 64), recompute=True) < base / 4
    assert needed(Parallel(1, 1, 64), shard_optimizer=True) < base
    assert needed(Parallel(1, 1, 64), fused=True) < base / 2
    assert total(memory(FLASH, Parallel(1, 2, 32), Work("infer", 4096, 64))) > 0


def test_parts_are_finite_and_not_negative(golden_config):
    for phase in ("train", "infer"):
        for fused in (False, True):
            parts = memory(golden_config, Parallel(), Work(phase, 200, 2, "float32", fused=fused))
            assert all(np.isfinite(v) and v >= 0 for inner in parts.values() for v in inner.values())
