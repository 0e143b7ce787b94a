"""Number formats of stored tensors, by their safetensors codes, and casts between them.

numpy has no bfloat16: arrays carry its values as uint16 bit patterns.
"""

import numpy as np
from ml_dtypes import bfloat16

CARRIERS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "I8": np.dtype("i1")}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()} | {"I8": "int8"}
INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}  # bits of positive infinity


def cast(values: np.ndarray, source: str, target: str) -> tuple[np.ndarray, int]:
    """`values` in the carrier of `source` -> (in the carrier of `target`, how many finite values became infinite).

    The cast rounds to nearest, ties to even. Equal codes give `values` back, uncopied.
    """
    if source == target:
        return values, 0
    return from_float32(to_float32(values, source), target)


def to_float32(values: np.ndarray, source: str) -> np.ndarray:
    """`values` in the carrier of `source` as float32; this is exact."""
    return (values.view(bfloat16) if source == "BF16" else values).astype(np.float32, copy=False)


def from_float32(values: np.ndarray, target: str) -> tuple[np.ndarray, int]:
    """float32 `values` rounded as `cast` does. NaN stays NaN but may lose its payload."""
    if target == "F32":
        return values, 0
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(bfloat16 if target == "BF16" else np.float16).view(np.uint16)
    magnitudes, infinity = rounded & 0x7FFF, INFINITY[target]
    overflows = 0
    if magnitudes.max(initial=0) >= infinity:  # telling overflows from NaN takes longer than rounding and is rare
        overflows = int((np.isfinite(values) & (magnitudes == infinity)).sum())
    return rounded.view(CARRIERS[target]), overflows
