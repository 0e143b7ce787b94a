"""Number formats of stored tensors, by their safetensors codes, and casts between them.

numpy has no bfloat16: its values travel as uint16 bit patterns.
"""

import numpy as np

CARRIERS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "I8": np.dtype("i1")}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()} | {"I8": "int8"}


def cast(values: np.ndarray, source: str, target: str) -> tuple[np.ndarray, int]:
    """`values` in the carrier of `source` -> (the carrier of `target`, how many finite values became infinite).

    Rounds to nearest, ties to even. Same codes give `values` back, uncopied.
    """
    if source == target:
        return values, 0
    return from_float32(to_float32(values, source), target)


def to_float32(values: np.ndarray, source: str) -> np.ndarray:
    """Exact, from any format."""
    if source == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, target: str) -> tuple[np.ndarray, int]:
    """As `cast`, from float32."""
    if target == "F32":
        return values, 0
    if target == "F16":
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16)
        infinite = np.isinf(rounded)
    else:
        bits = np.ascontiguousarray(values).view(np.uint32)
        # Adding half of the last kept bit, and one less when that bit is even, makes dropping the rest round to even.
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        nan = np.isnan(values)
        if nan.any():  # the sum above may carry a NaN into an infinity or past the sign
            rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
        infinite = (rounded & 0x7FFF) == 0x7F80
    return rounded, int((infinite & np.isfinite(values)).sum()) if infinite.any() else 0
