"""Bytes: weights and states against a network and its optimizer, the rest by hand."""
import dataclasses
import json
import math

import pytest

from pangu_ms.architectures import read_config
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.tensors import parameters
from pangu_ms.estimate.memory import layer_activations, memory, train_logits_bytes, weight_bytes
from pangu_ms.estimate.optimizer import state_bytes, work_bytes
from pangu_ms.estimate.work import Case, Work, calls_of
from pangu_ms.parallel.ranks import Ranks

FLASH = PanguConfig.flash_92b()
GOLDEN = ("tiny", "tiny_full", "odd", "eps")


def flash(phase, length, batch, ranks=Ranks(), **options):
    return Case(FLASH, ranks, Work(phase, length, batch, **options))


def training(*sizes):
    return Ranks(*sizes, batch_sharded=True)


@pytest.fixture(params=GOLDEN)
def golden_config(request, data):
    return PanguConfig.from_pretrained(data / request.param)


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_the_tensors_of_the_file(data, name):
    """The files hold float32 and, as the release does, the MTP copies, which the network shares."""
    with open(data / name / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    stored = sum(math.prod(entry["shape"]) for tensor, entry in header.items() if tensor != "__metadata__"
                 and not tensor.endswith((".embed_tokens.weight", "shared_head.head.weight"))
                 or tensor == "model.embed_tokens.weight")
    config = PanguConfig.from_pretrained(data / name)
    assert sum(weight_bytes(Case(config, Ranks(), Work("infer", 1, 1, "float32"))).values()) == 4 * stored


@pytest.mark.parametrize("name, tied", [("embedded", False), ("embedded_tied", True), ("pro_moe", False),
                                        ("pro_moe_v2", False)])
def test_weights_and_cache_of_grouped_queries(model, data, name, tied):
    """A head that is the embedding counts once; a token leaves G keys and G values in each layer, MTP's included."""
    from pangu_ms.generation.engine import Engine
    network = model(name)
    found = memory(Case(read_config(data / name), Ranks(), Work("infer", 256, 2, "float32")))
    assert network.plan.tied_head == tied
    assert sum(found["weights"].values()) == sum(parameter.nbytes for parameter in network.get_parameters())
    cache = Engine(network, batch=2, num_draft_tokens=len(network.plan.mtp_layers)).cache
    assert found["cache"]["cache"] == sum(each.nbytes for tensors in cache.layers for each in tensors.values())


def test_two_tensor_ranks_of_a_7b():
    """Both have all norms and the outputs' biases, and half of everything else, keys and values too."""
    case = Case(PanguEmbeddedConfig.embedded_7b(), Ranks(2), Work("infer", 4096, 1, fused=True))
    found, both = memory(case), (2 * 34 + 1 + 34) * 4096
    assert sum(found["weights"].values()) == (8_030_887_936 - both) + 2 * both
    assert found["cache"]["cache"] == 4096 * 34 * 2 * (8 * 128) * 2 / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_networks(small, dtype):
    """Of which some are float32 in any case."""
    from pangu_ms import PanguForCausalLM
    config = small(compute_dtype=dtype)
    network = PanguForCausalLM(config)
    assert sum(weight_bytes(Case(config, Ranks(), Work("infer", 1, 1, dtype))).values()) == \
        sum(parameter.nbytes for parameter in network.get_parameters())


def test_optimizer_states_by_hand(golden_config):
    """Masters for all but float32 parameters; 4 bytes a value for Muon, 8 for AdamW; none for the selection bias."""
    values = {p.name: p.count for p in parameters(golden_config).values() if not p.name.endswith("correction_bias")}
    exact = sum(n for name, n in values.items() if ".mlp.gate." in name or "mhc" in name)
    muon = sum(n for name, n in values.items() if name.endswith("proj.weight") or "_b_proj" in name
               or name.endswith(("kv_a_proj_with_mqa.weight", "wq_b.weight", "wk.weight")))
    found = state_bytes(Case(golden_config, training(), Work("train", 8, 1, "bfloat16")))
    assert found == {"masters": 4 * (sum(values.values()) - exact), "muon_moments": 4 * muon,
                     "adamw_moments": 8 * (sum(values.values()) - muon)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_states_are_those_of_the_optimizer(golden_config, monkeypatch, ranks):
    """All that it keeps besides parameters and counters, on any of the ranks; shares are filled up to be equal."""
    from mindspore import nn

    from pangu_ms import PanguForCausalLM
    from pangu_ms.parallel import collectives
    from pangu_ms.training.optimizer.pangu_muon import PanguMuon
    monkeypatch.setattr(collectives, "all_gather", lambda ranks, dimension: nn.Identity())      # there is one process
    case = Case(golden_config, training(1, 1, ranks), Work("train", 8, 6, "float32", shard_optimizer=True))
    params = [p for p in PanguForCausalLM(golden_config).trainable_params() if not p.name.endswith("correction_bias")]
    for rank in range(ranks):
        optimizer = PanguMuon(params, golden_config, ranks=dataclasses.replace(case.ranks, rank=rank),
                              shard_states=True)
        found = sum(p.nbytes for p in optimizer.get_parameters() if p.name in optimizer.own_names)
        assert found == pytest.approx(sum(state_bytes(case).values()))


@pytest.mark.parametrize("ranks, shared, values", [
    (training(1, 8), False, 12 * 3),            # float32, three times, of three parameters
    (training(1, 8, 2), True, 12 + 2 * 2),      # of one, and bfloat16 gradients of two
])
def test_muon_stacks_equal_parameters_up_to_a_size(ranks, shared, values):
    """Gate and up of all 47 MoE layers are equal, and three of them have less than 2^28 values on each rank."""
    case = flash("train", 8, ranks.batch, ranks, shard_optimizer=shared)
    case.shapes = {name: shape for name, shape in case.shapes.items() if ".experts." in name}
    assert work_bytes(case) == values * 256 * 1024 * 2560 // 8


def test_tensor_ranks_share_no_latent_rows():
    one, four = (memory(flash("infer", 32768, 1, Ranks(tensor)))["cache"]["cache"] for tensor in (1, 4))
    assert one - four == 49 * 2 * 6144 * 3 // 4 * 2


def test_expert_ranks_have_sequences_of_their_own_in_training_alone():
    train, infer = flash("train", 1000, 16, training(1, 8)), flash("infer", 1000, 9, Ranks(1, 8))
    assert (train.sequences, train.group_sequences) == (2, 16)
    assert infer.sequences == infer.group_sequences == 9
    assert memory(infer)["cache"]["cache"] == 9 * memory(flash("infer", 1000, 1))["cache"]["cache"]


@pytest.mark.parametrize("fused, wanted", [(False, 48 * 4096 * (4096 + 128) * 6), (True, 48 * 4096 * 4)])
def test_scores_are_the_plain_forms_largest_part(fused, wanted):
    """48 heads, 4096 queries by 4096 keys and 128 sinks, float32 and bfloat16; fused keeps a number for each query."""
    case = flash("train", 4096, 1, fused=fused)
    assert layer_activations(case.plan.layers[1], case, calls_of(case)["step"])["scores"] == wanted


def test_copies_of_the_ascend_forms():
    """32 experts of 3 matrices 2560 x 512; 4096 rows of a cache of 512 + 64."""
    case = flash("train", 4096, 8, training(2, 8), fused=True)
    copies = layer_activations(case.plan.layers[2], case, calls_of(case)["step"])["expert_copies"]
    assert copies == 32 * 3 * 2560 * 512 * 2
    case = flash("infer", 4096, 1, Ranks(2, 8), fused=True)
    dsa = next(layer for layer in case.plan.layers if layer.attention.indexer)
    assert layer_activations(dsa, case, calls_of(case)["prefill"])["split_cache"][-1] == 4096 * 576 * 2


@pytest.mark.parametrize("tensor, fused, wanted", [
    (1, False, 4096 * 151552 * (16 + 2 + 8)),
    (2, False, 1024 * 75776 * (4 + 4 + 4 + 2 + 2) + 75776 * 2560 * 4),      # of 4 pieces one is there
    (2, True, 1024 * 75776 * (4 + 4 + 4 + 2 + 2) + 75776 * 2560 * 4),
])
def test_logits(tensor, fused, wanted):
    assert train_logits_bytes(flash("train", 4096, 1, training(tensor), fused=fused)) == wanted
