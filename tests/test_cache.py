"""What the cache holds, byte for byte."""
import numpy as np
import pytest

from pangu_ms import PanguConfig
from pangu_ms.cache import Cache, cache_bytes


def test_flash():
    """22,528 bytes a token in bfloat16; rings of 30 SWA and 3 MTP layers, taps of 49."""
    size = cache_bytes(PanguConfig.flash_92b(), 524288, dtype="bfloat16")
    assert size["per_token"] == 22_528
    assert size["fixed"] == 30 * 512 * 1152 + 3 * 2048 * 1152 + 49 * 30_720
    assert size["total"] == 524288 * 22_528 + size["fixed"]


@pytest.mark.parametrize("name", ["tiny", "tiny_full", "odd", "eps"])
def test_tensors_take_what_the_formula_says(data, name):
    config = PanguConfig.from_pretrained(data / name)
    for batch, capacity in ((1, 16), (3, 40)):
        cache = Cache(config, config.layers, batch, capacity)
        assert cache.bytes == cache_bytes(config, capacity, batch)["total"]


def test_bytes_of_tiny_by_hand(data):
    """2 DSA layers of 32 + 20 values a token; 2 SWA and 3 MTP layers with a ring of 7; taps of 7 layers."""
    size = cache_bytes(PanguConfig.from_pretrained(data / "tiny"), 1)
    assert size["per_token"] == 4 * 2 * (32 + 20)
    assert size["fixed"] == 4 * (5 * 7 * 32 + 7 * 2 * (32 + 24 + 36))


def test_growing_keeps_the_rows(data):
    config = PanguConfig.from_pretrained(data / "tiny")
    cache = Cache(config, config.layers, batch=2, capacity=4)
    rng = np.random.default_rng(0)
    filled = [[rng.normal(size=tensor.shape).astype(np.float32) for tensor in layer] for layer in cache.tensors]
    for layer, values in zip(cache.tensors, filled):
        for tensor, value in zip(layer, values):
            tensor.asnumpy()
            tensor.assign_value(type(tensor)(value))
    cache.reserve(4)
    assert cache.capacity == 4
    cache.reserve(9)
    assert cache.capacity == 16
    for plan, layer, values in zip(config.layers, cache.tensors, filled):
        for site, (tensor, value) in enumerate(zip(layer, values)):
            found = tensor.asnumpy()
            if plan.kind == "dsa" and site in (0, 4):
                assert found.shape[0] == 32
                found = found.reshape(2, 16, -1)
                assert not found[:, 4:].any()
                found = found[:, :4].reshape(8, -1)
            np.testing.assert_array_equal(found, value)
