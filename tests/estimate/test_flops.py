"""Operations: against the products that the network makes, and against counts by hand."""
import numpy as np
import pytest

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe import PanguProMoEConfig
from pangu_ms.architectures.tensors import parameters
from pangu_ms.estimate.attention import attention_cost, visible_pairs
from pangu_ms.estimate.flops import forward_flops
from pangu_ms.estimate.optimizer import update_flops
from pangu_ms.estimate.work import Calls, Case, Work, calls_of
from pangu_ms.parallel.ranks import Ranks
from tests.estimate.counting import counted

FLASH = PanguConfig.flash_92b()
NOT_PRODUCTS = ("convolution", "mtp")  # the first are elementwise; an inference step runs no MTP layer


def flash(phase, length, batch, ranks=Ranks(), **options):
    return Case(FLASH, ranks, Work(phase, length, batch, **options))


def training(*sizes):
    return Ranks(*sizes, batch_sharded=True)


def products(case, calls):
    return sum(value for name, value in forward_flops(case, calls).items() if name not in NOT_PRODUCTS)


@pytest.mark.slow
def test_the_network_makes_these_products(small, monkeypatch):
    """Without a cache, a first prefill chunk, one that selects, and decoding: to the last multiplication."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.engine import Engine
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    tiny = PanguForCausalLM(small())
    ids = (np.arange(48).reshape(2, 24) % tiny.plan.vocab_size).astype(np.int32)
    engine = Engine(tiny, batch=2, capacity=32)
    made = []
    with counted(monkeypatch) as found:
        for run in (lambda: tiny(ids), lambda: engine.prefill(ids[:, :4]), lambda: engine.prefill(ids[:, 4:]),
                    lambda: engine.decode(ids[:, :1])):
            found["flops"] = 0
            run()
            made.append(found["flops"])
    case, first = Case(tiny.config, Ranks(), Work("infer", 32, 2, "float32")), tiny.plan.indexer.topk - 4
    steps = [Calls([24], 0), Calls([4], 0, 32), Calls([first, 20 - first], [4, 4 + first], 32),
             Calls([1], 24, 32, decode=True)]
    assert made == [products(case, calls) for calls in steps]


@pytest.mark.parametrize("name", ["embedded", "embedded_tied", "pro_moe", "pro_moe_v2", "ultra_moe"])
def test_networks_of_growing_tensors_make_these_products(model, monkeypatch, name):
    """Without a cache, a prefill, a chunk behind it, and decoding: of grouped queries, and of latent rows alone."""
    from pangu_ms.generation.engine import Engine
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    network, ids, made = model(name), np.arange(48).reshape(2, 24).astype(np.int32), []
    engine = Engine(network, batch=2, capacity=32)
    with counted(monkeypatch) as found:
        for run in (lambda: network(ids), lambda: engine.prefill(ids[:, :4]), lambda: engine.prefill(ids[:, 4:]),
                    lambda: engine.decode(ids[:, :1])):
            found["flops"] = 0
            run()
            made.append(found["flops"])
    case = Case(network.config, Ranks(), Work("infer", 32, 2, "float32"))
    steps = [Calls([24], 0), Calls([4], 0, 32), Calls([20], 4, 32), Calls([1], 24, 32, decode=True)]
    assert made == pytest.approx([products(case, calls) for calls in steps], rel=1e-12)


@pytest.mark.parametrize("past,rows,reach", [(0, 9, None), (0, 9, 4), (3, 9, 4), (7, 1, 4), (2, 1, 4), (5, 3, 100)])
def test_visible_pairs_are_those_of_the_mask(past, rows, reach):
    query, key = np.arange(past, past + rows)[:, None], np.arange(past + rows)
    mask = (key <= query) & (key > query - (reach or 10 ** 6))
    assert visible_pairs(np.array([past]), np.array([rows]), reach).tolist() == [mask.sum()]


def test_fused_attention_sees_only_what_it_must():
    case = flash("train", 4096, 1, fused=True)
    calls = calls_of(case)["step"]
    pairs = {layer.attention.kind: attention_cost(layer.attention, case, calls).pairs.item()
             for layer in case.plan.layers[:2]}
    assert pairs == {"dsa": 2048 * 2049 / 2 + 2048 * 2048 + 4096 * 128,
                     "swa": 512 * 513 / 2 + 3584 * 512 + 4096 * 128}


def test_a_decoded_token_takes_two_operations_for_each_active_parameter():
    """At a context of one token, fused: active parameters but norms, gates, sinks and kv_b, which reads every sink."""
    case = flash("infer", 1, 1, fused=True)
    decode = calls_of(case)["decode"]
    found = forward_flops(case, decode)
    assert found["head"] == 2 * 151552 * 2560
    assert found["expert"] == 2 * 44 * 8 * 3 * 1024 * 2560
    assert found["shared_expert"] == 2 * 44 * 3 * 1024 * 2560
    assert found["dense_mlp"] == 2 * 2 * 3 * 9216 * 2560
    assert found["attention"] == 2 * 46 * (35_554_816 - 1024 - 512)  # without the two norms
    assert found["scores_swa"] == 30 * 48 * 129 * 2 * (576 + 512)
    active = FLASH.parameter_count()["active"]["with_head"]
    assert products(case, decode) == pytest.approx(2 * active, rel=0.05)


@pytest.mark.parametrize("config", [PanguEmbeddedConfig.embedded_7b(), PanguEmbeddedConfig.embedded_1b(),
                                    PanguProMoEConfig.pro_moe_72b()])
def test_a_decoded_token_of_grouped_queries_takes_two_operations_for_each_active_parameter(config):
    """At a context of one token: active parameters but norms, biases and factors of experts, and the scores."""
    case = Case(config, Ranks(), Work("infer", 1, 1, fused=True))
    vectors = sum(p.count for p in parameters(config).values() if p.rows == p.count or p.columns == p.count)
    found = forward_flops(case, calls_of(case)["decode"])
    assert found.pop("scores_full") == config.num_hidden_layers * 4 * config.hidden_size
    assert sum(found.values()) == 2 * (config.parameter_count()["active"]["with_head"] - vectors)


def test_ranks_share_the_products():
    """Tensor ranks repeat the latents, the indexer, the router and the streams, and share all else evenly."""
    one, four, eight = (forward_flops(case, calls_of(case)["step"]) for case in
                        (flash("train", 512, 8, training(*sizes), fused=True) for sizes in ((1, 1), (4, 1), (1, 8))))
    for name in ("expert", "shared_expert", "dense_mlp", "head", "scores_swa"):
        assert four[name] == one[name] / 4
    assert all(four[name] == one[name] for name in ("indexer", "router", "mhc"))
    assert all(eight[name] == pytest.approx(one[name] / 8) for name in one)  # its own sequence, a share of the experts


@pytest.mark.parametrize("ranks, shared, steps", [
    (training(1, 128), False, 6), (training(1, 128, 2), True, 3),
    (training(1, 128, 3), True, 3),     # of three ranks one has two of the four matrices of gate and up, one of down's
    (training(4, 128), False, 2),       # of four, one of each
])
def test_newton_schulz_by_hand(ranks, shared, steps):
    """Two experts of 1024 x 2560 for each of gate, up, down: five steps of 4 m^2 n + 2 m^3."""
    case = flash("train", 1, ranks.batch, ranks, shard_optimizer=shared)
    case.shapes = {name: shape for name, shape in case.shapes.items() if "layers.2.mlp.experts" in name}
    assert update_flops(case) == steps * 5 * (4 * 1024 ** 2 * 2560 + 2 * 1024 ** 3)


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 524288])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_cover_the_prompt(length, fused):
    calls = calls_of(flash("infer", length, 1, fused=fused))["prefill"]
    assert calls.tokens == length and (calls.rows > 0).all()
    done = np.cumsum(calls.rows * calls.times)
    assert (calls.capacity >= calls.past + calls.rows).all() and calls.capacity[-1] < 2 * max(length, 256)
    assert (calls.past == done - calls.rows * calls.times).all()
