"""Which rows of packed documents count: for the language model, for each MTP depth, for the routers."""
import mindspore as ms
from mindspore import ops

from pangu_ms.model.trace import tokens_ahead
from pangu_ms.shaping import arange


def mtp_mask(loss_mask, position, depth):
    """float32 [B, T]: whether row p of an MTP depth has a label. It must lie in the same document and count itself."""
    same = ops.cast(tokens_ahead(position, depth) == position + depth, ms.float32)  # positions begin anew in a document
    return same * tokens_ahead(loss_mask, depth)


def real_rows(loss_mask, position):
    """float32 [B, T]: one on the rows of documents of which some row counts, zero on padding."""
    start = arange(position.shape[1]) - position                                # of each row's document
    counted = ops.tensor_scatter_elements(ops.zeros_like(loss_mask), start, loss_mask, 1, "add")
    return ops.cast(ops.gather_elements(counted, 1, start) > 0, ms.float32)
