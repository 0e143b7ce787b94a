"""How much the cache holds, in numbers. Needs no MindSpore."""
from pangu_ms.model.plan import Layer, Plan

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FIRST_CAPACITY = 256  # rows that growing tensors have at first, for one sequence


def grown(capacity: int, length: int) -> int:
    """Rows of a growing tensor that must hold `length`: doubled as often as it takes."""
    while capacity < length:
        capacity *= 2
    return capacity


def tensor_shapes(layer: Layer, capacity: int, slack: int = 0, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """Name -> (rows, width) of one layer's tensors for one sequence, on one of `tensor` ranks that share the heads.

    Args:
        capacity: rows of growing tensors.
        slack: rows that rings have beyond what they must keep.
    """
    return {name: (capacity if each.rows is None else each.rows + slack, each.width // (tensor if each.by_head else 1))
            for name, each in layer.attention.cache_tensors.items()}


def hidden_rows(slack: int) -> int:
    """Rows of the ring of hidden rows: those the MTP layers read again, and those of a step that may be rolled back."""
    return 2 * slack


def cache_bytes(plan: Plan, length: int, batch: int = 1, slack: int = 0, tensor: int = 1) -> dict[str, int]:
    """Bytes that `length` tokens of each of `batch` sequences take in all layers, MTP included, on one rank.

    -> {"per_token": growing rows of one token of one sequence, "fixed": rings of one sequence, "total"}.
    """
    def size(capacity):
        return DTYPE_BYTES[plan.dtype] * sum(rows * width for layer in plan.layers
                                             for rows, width in tensor_shapes(layer, capacity, slack, tensor).values())
    fixed, per_token = size(0), size(1) - size(0)
    return {"per_token": per_token, "fixed": fixed, "total": batch * (fixed + length * per_token)}
