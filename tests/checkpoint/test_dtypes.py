import numpy as np
import pytest

from pangu_ms.checkpoint.dtypes import cast


def bits(*values):
    return np.array(values, np.uint32).view(np.float32)


@pytest.mark.parametrize("value, rounded", [
    (0x3F800000, 0x3F80), (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0xBF808001, 0xBF81),
    (0x7F800000, 0x7F80), (0xFF800000, 0xFF80), (0x00000001, 0x0000), (0x00018000, 0x0002), (0x7F7F0000, 0x7F7F),
])
def test_bfloat16_rounds_to_nearest_even(value, rounded):
    assert cast(bits(value), "F32", "BF16")[0].tolist() == [rounded]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_what_is_no_number_stays_none(target):
    """Quiet, signalling, and one whose last bits would carry past the sign if they were rounded as a number's."""
    values, lost = cast(bits(0x7F800001, 0xFFFFFFFF, 0x7FC00000), "F32", target)
    assert lost == 0 and np.isnan(cast(values, target, "F32")[0]).all()


def test_overflow_counts_finite_values_only():
    values = np.array([1.0, 65504, 65520, -1e6, np.inf, np.nan], np.float32)
    assert cast(values, "F32", "F16")[1] == 2
    assert cast(bits(0x7F7FFFFF, 0x7F800000), "F32", "BF16")[1] == 1


def test_every_bfloat16_survives_float32():
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[(every & 0x7F80) != 0x7F80]  # all finite ones
    wide = cast(every, "BF16", "F32")[0]
    assert np.array_equal(cast(wide, "F32", "BF16")[0], every)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    assert np.array_equal(cast(cast(half, "F16", "F32")[0], "F32", "F16")[0].view(np.uint16), half.view(np.uint16))
