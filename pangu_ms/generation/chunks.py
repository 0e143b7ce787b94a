"""Into which pieces a prompt is cut where lengths are open. The estimates cut as the engine does.

Needs no MindSpore.
"""
from pangu_ms.cache.sizes import DTYPE_BYTES
from pangu_ms.model.plan import Plan

PREFILL_CHUNK = 512  # rows of a prompt that are computed at once, if nothing else is asked for

# Sparse attention gathers topk latent rows for each query of a prefill chunk, and the indexer scores every earlier row
# for each of its heads: chunks are cut so that neither takes more than this, at a few copies of each.
CHUNK_BYTES = 2 ** 26


def selecting_rows(plan: Plan, batch: int, capacity: int) -> int:
    """The most rows of a chunk in which DSA layers select, for `batch` sequences whose tensors hold `capacity` rows."""
    row = max(layer.attention.row_width for layer in plan.layers if layer.attention.indexer)
    gathered = plan.indexer.topk * row * DTYPE_BYTES[plan.dtype]
    scored = capacity * plan.indexer.num_heads * DTYPE_BYTES["float32"]
    return max(1, CHUNK_BYTES // (batch * max(gathered, scored)))


def chunk_rows(plan: Plan, batch: int, length: int, capacity: int, most: int) -> int:
    """Rows of the next chunk behind `length` tokens, at most `most`: DSA selects for all of them or for none."""
    if plan.indexer is None:
        return most
    if length < plan.indexer.topk:
        return min(most, plan.indexer.topk - length)
    return min(most, selecting_rows(plan, batch, capacity))
