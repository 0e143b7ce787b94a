"""Operations: against the products that the network makes, and against counts by hand."""
import numpy as np
import pytest

from pangu_ms.config import PanguConfig
from pangu_ms.estimate import flops
from pangu_ms.estimate.flops import extent, forward_flops, optimizer_flops, train_flops, visible_pairs
from pangu_ms.estimate.work import (Parallel, Work, chunk_rows, decode_calls, held, make_calls, prefill_calls,
                                    train_calls)

FLASH = PanguConfig.flash_92b()
NOT_PRODUCTS = ("convolution", "mtp")  # the first are elementwise; an inference step runs no MTP layer


def products(config, work, calls):
    found = forward_flops(config, Parallel(), work, calls)
    return sum(value for name, value in found.items() if name not in NOT_PRODUCTS)


@pytest.mark.slow
def test_the_network_makes_these_products(data, monkeypatch):
    """Without a cache, a first prefill chunk, one that selects, and decoding: to the last multiplication."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.engine import Engine
    from tests.estimate.counting import counted
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    model = PanguForCausalLM.from_pretrained(data / "tiny")
    ids = (np.arange(48).reshape(2, 24) % model.config.vocab_size).astype(np.int32)
    engine = Engine(model, batch=2, capacity=32)
    made = []
    with counted(monkeypatch) as found:
        for run in (lambda: model(ids), lambda: engine.prefill(ids[:, :4]), lambda: engine.prefill(ids[:, 4:]),
                    lambda: engine.decode(ids[:, :1])):
            found["flops"] = 0
            run()
            made.append(found["flops"])
    work = Work("infer", 32, 2, "float32")
    first = model.config.index_topk - 4
    steps = [make_calls([24], 0, 24, 24, cached=False),
             make_calls([4], 0, 1, 32, cached=True),
             make_calls([first, 20 - first], [4, 4 + first], 1, 32, cached=True),
             make_calls([1], 24, 1, 32, cached=True, decode=True)]
    assert made == [products(model.config, work, calls) for calls in steps]


@pytest.mark.parametrize("past,rows,reach", [(0, 9, None), (0, 9, 4), (3, 9, 4), (7, 1, 4), (2, 1, 4), (5, 3, 100)])
def test_visible_pairs_are_those_of_the_mask(past, rows, reach):
    query, key = np.arange(past, past + rows)[:, None], np.arange(past + rows)
    mask = (key <= query) & (key > query - (reach or 10 ** 6))
    assert visible_pairs(np.array([past]), np.array([rows]), reach).tolist() == [mask.sum()]


def test_fused_attention_sees_only_what_it_must():
    calls = train_calls(Work("train", 4096, 1))
    pairs = {plan.kind: float(extent(FLASH, plan, calls, True).pairs[0]) for plan in FLASH.layers[:2]}
    assert pairs == {"dsa": 2048 * 2049 / 2 + 2048 * 2048 + 4096 * 128,
                     "swa": 512 * 513 / 2 + 3584 * 512 + 4096 * 128}


def test_a_decoded_token_takes_two_operations_for_each_active_parameter():
    """At a context of one token, fused: active parameters but norms, gates, sinks and kv_b, which reads every sink."""
    work = Work("infer", 1, 1, fused=True)
    found = forward_flops(FLASH, Parallel(), work, decode_calls(work))
    assert found["head"] == 2 * 151552 * 2560
    assert found["expert"] == 2 * 44 * 8 * 3 * 1024 * 2560
    assert found["shared_expert"] == 2 * 44 * 3 * 1024 * 2560
    assert found["dense_mlp"] == 2 * 2 * 3 * 9216 * 2560
    assert found["attention"] == 2 * 46 * (35_554_816 - 1024 - 512)  # without the two norms
    assert found["scores_swa"] == 30 * 48 * 129 * 2 * (576 + 512)
    active = FLASH.parameter_count()["active"]["with_head"]
    assert products(FLASH, work, decode_calls(work)) == pytest.approx(2 * active, rel=0.05)


def test_ranks_share_the_products():
    """Tensor ranks repeat the latents, the indexer, the router and the streams, and share all else evenly."""
    work = Work("train", 512, 8, fused=True)
    calls = train_calls(work)
    one, four = (forward_flops(FLASH, Parallel(1, tensor, 1), work, calls) for tensor in (1, 4))
    for name in ("expert", "shared_expert", "dense_mlp", "head", "scores_swa"):
        assert four[name] == one[name] / 4
    assert all(four[name] == one[name] for name in ("indexer", "router", "mhc"))
    eight = forward_flops(FLASH, Parallel(1, 1, 8), work, calls)
    assert all(eight[name] == pytest.approx(one[name] / 8) for name in one)  # its own sequence, a share of the experts


def test_backward_and_recompute():
    for recompute, factor in ((False, 3), (True, 4)):
        work = Work("train", 512, 1, recompute=recompute, fused=True)
        forward = forward_flops(FLASH, Parallel(), work, train_calls(work))
        step = train_flops(FLASH, Parallel(), work, train_calls(work))
        assert step["expert"] == factor * forward["expert"] and step["head"] == 3 * forward["head"]


def test_newton_schulz_by_hand(monkeypatch):
    """Two experts of 1024 x 2560 for each of gate, up, down: five steps of 4 m^2 n + 2 m^3."""
    monkeypatch.setattr(flops, "held", lambda config: [p for p in held(config) if "layers.2.mlp.experts" in p.name])
    step = 4 * 1024 ** 2 * 2560 + 2 * 1024 ** 3
    assert optimizer_flops(FLASH, Parallel(1, 1, 128), Work("train", 1, 128)) == 2 * 3 * 5 * step
    assert optimizer_flops(FLASH, Parallel(2, 1, 128), Work("train", 1, 256, shard_optimizer=True)) == 3 * 5 * step
    # Of three ranks one has two of the four matrices of gate and up, and one of down's.
    assert optimizer_flops(FLASH, Parallel(3, 1, 128), Work("train", 1, 384, shard_optimizer=True)) == 3 * 5 * step
    assert optimizer_flops(FLASH, Parallel(1, 4, 128), Work("train", 1, 128)) == 2 * 3 * 5 * step / 4


@pytest.mark.slow
def test_chunks_are_the_engines():
    from pangu_ms.generation import engine

    class Mock:
        config, selects, fixed = PanguConfig.flash_92b(compute_dtype="bfloat16"), True, False
        cache = type("Cache", (), {"batch": 2, "capacity": 32768, "length": np.zeros(2, np.int32)})

    work = Work("infer", 32768, 2)
    for done in (0, 1900, 2047, 2048, 20000, 32760):
        Mock.cache.length[:] = done
        assert chunk_rows(FLASH, work, 2, done, 32768) == engine.Engine._rows(Mock, 512, 32768 - done)
    assert engine.CHUNK_BYTES == 2 ** 26


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 524288])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_cover_the_prompt(length, fused):
    calls = prefill_calls(FLASH, Parallel(), Work("infer", length, 1, fused=fused))
    assert calls.tokens == length and (calls.rows > 0).all()
    done = np.cumsum(calls.rows * calls.times)
    assert (calls.capacity >= calls.past + calls.rows).all() and calls.capacity[-1] < 2 * max(length, 256)
    assert (calls.past == done - calls.rows * calls.times).all()
