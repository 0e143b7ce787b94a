"""Prefill and decoding with a cache against the full forward, past every window and past index_topk."""
import numpy as np
import pytest

from pangu_ms.generation.engine import Engine

LENGTH = 64  # tiny: windows of 7, index_topk 8


@pytest.mark.parametrize("name", ["tiny", "tiny_full", "odd", "eps"])
@pytest.mark.parametrize("prompt", [1, 2, 3, 5, 24])
def test_prefill_and_decode(model, golden, name, prompt):
    wanted = golden(name, "T64")
    check(Engine(model(name), capacity=4), wanted, prompt, chunk=512)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16])
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_chunked_prefill(model, golden, name, chunk):
    """Every chunk's last row is checked, on the way to 61 tokens; three more are decoded."""
    check(Engine(model(name), capacity=16), golden(name, "T64"), 61, chunk)


@pytest.mark.parametrize("name", ["embedded", "pro_moe_v2"])
@pytest.mark.parametrize("prompt", [1, 2, 24])
def test_growing_tensors(model, golden, name, prompt):
    check(Engine(model(name), capacity=4), golden(name, "T24"), prompt, chunk=512)


@pytest.mark.parametrize("name, chunk", [
    *[(name, chunk) for name in ("embedded_tied", "pro_moe_v2", "ultra_moe") for chunk in (1, 7, 16)], ("pro_moe", 16)])
def test_growing_tensors_of_a_batch_in_chunks(model, golden, name, chunk):
    check(Engine(model(name), batch=2, capacity=16), golden(name, "T40_B2"), 37, chunk)


@pytest.mark.slow
def test_batch(model, golden):
    wanted = golden("tiny", "T40_B2")
    assert wanted["ids"].shape == (2, 40)
    check(Engine(model("tiny"), batch=2, capacity=8), wanted, 13, chunk=5)


def check(engine, wanted, prompt, chunk):
    """Feed the golden ids, `prompt` of them in chunks and the rest one by one; compare each result's logits."""
    ids, logits = wanted["ids"], wanted["logits"]
    largest, length, compared = np.abs(logits).max(), ids.shape[1], 0
    for start in range(0, prompt, chunk):
        rows = ids[:, start:min(start + chunk, prompt)]
        found = engine.prefill(rows)
        compared += compare(found, logits[:, int(engine.cache.length[0]) - 1], largest)
    for position in range(prompt, length):
        compared += compare(engine.decode(ids[:, position:position + 1]), logits[:, position], largest)
    assert (engine.cache.length == length).all()
    assert compared == -(-prompt // chunk) + length - prompt


def compare(found, wanted, largest):
    assert np.abs(found - wanted).max() <= 2e-5 * largest
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    return 1


@pytest.mark.slow
def test_float16(small, golden):
    """Prefill and decoding against the full forward in 16 bits as well, in a DSA layer with experts: rounding alone
    moves experts and rows."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.training.initial_values import initialize
    config = small(compute_dtype="float16", initializer_range=0.1, num_hidden_layers=1, num_nextn_predict_layers=0,
                   first_k_dense_replace=0, swa_layers=[], sliding_window_list=[], block_post_layernorm_idx=[])
    ids, half = golden("tiny", "T24")["ids"], PanguForCausalLM(config)
    initialize(half, 0)
    logits, engine = half(ids).asnumpy(), Engine(half, capacity=32)
    found = [engine.prefill(ids[:, :20]), engine.decode(ids[:, 20:21])]
    for position, row in zip((19, 20), found):
        assert np.abs(row - logits[:, position]).max() <= 0.02 * np.abs(logits).max()
