"""What the cache holds, byte for byte."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from pangu_ms import PanguConfig
from pangu_ms.cache.sizes import cache_bytes
from pangu_ms.cache.state import Cache


def test_flash():
    """22,528 bytes a token in bfloat16; rings of 30 SWA and 3 MTP layers, taps of 49."""
    size = cache_bytes(PanguConfig.flash_92b(compute_dtype="bfloat16").plan, 524288)
    assert size["per_token"] == 22_528
    assert size["fixed"] == 30 * 512 * 1152 + 3 * 2048 * 1152 + 49 * 30_720
    assert size["total"] == 524288 * 22_528 + size["fixed"]


@pytest.mark.parametrize("name", ["tiny", "tiny_full", "odd", "eps"])
def test_tensors_take_what_the_formula_says(data, name):
    plan = PanguConfig.from_pretrained(data / name).plan
    for batch, capacity in ((1, 16), (3, 40)):
        cache = Cache(plan, plan.layers, batch, capacity)
        assert cache.bytes == cache_bytes(plan, capacity, batch)["total"]


def test_bytes_of_tiny_by_hand(data):
    """2 DSA layers of 32 + 20 values a token; 2 SWA and 3 MTP layers with a ring of 7; taps of 7 layers."""
    size = cache_bytes(PanguConfig.from_pretrained(data / "tiny").plan, 1)
    assert size["per_token"] == 4 * 2 * (32 + 20)
    assert size["fixed"] == 4 * (5 * 7 * 32 + 7 * 2 * (32 + 24 + 36))


@pytest.fixture
def filled(data):
    """A cache of two sequences of tiny that holds numbers, and a copy of them."""
    plan = PanguConfig.from_pretrained(data / "tiny").plan
    cache, rng = Cache(plan, plan.layers, batch=2, capacity=4, slack=3), np.random.default_rng(0)
    for layer in cache.layers:
        for tensor in layer.values():
            write(tensor, rng.normal(size=tensor.shape))
    return plan, cache, numbers(cache)


def write(tensor, values):
    """As a step does: on the device."""
    rows = ms.Tensor(np.arange(tensor.shape[0]), ms.int32)
    ops.scatter_update(tensor, rows, ms.Tensor(values, ms.float32))


def numbers(cache):
    return [{name: tensor.asnumpy().copy() for name, tensor in layer.items()} for layer in cache.layers]


def test_growing_keeps_the_rows(filled):
    plan, cache, before = filled
    cache.reserve(4)
    assert cache.capacity == 4
    cache.reserve(9)
    assert cache.capacity == 16
    for layer, found, wanted in zip(plan.layers, numbers(cache), before):
        growing = {"latent", "index_keys"} if layer.attention.kind == "dsa" else set()
        for name, values in found.items():
            if name in growing:
                assert values.shape[0] == 32
                values = values.reshape(2, 16, -1)
                assert not values[:, 4:].any()
                values = values[:, :4].reshape(8, -1)
            np.testing.assert_array_equal(values, wanted[name])


def test_copies_and_stacks_have_memory_of_their_own(filled):
    """On the device: nothing of them goes through the host."""
    plan, cache, before = filled
    cache.length[:] = 3, 1
    copied, stacked = cache.copy(), Cache.stack([cache, cache.copy()])
    assert stacked.batch == 4 and stacked.length.tolist() == [3, 1, 3, 1]
    for layer in cache.layers:
        for tensor in layer.values():
            write(tensor, np.full(tensor.shape, -1))
    for found, twice, wanted in zip(numbers(copied), numbers(stacked), before):
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
            np.testing.assert_array_equal(twice[name], np.concatenate((values, values)))
