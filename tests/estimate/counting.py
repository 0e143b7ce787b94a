"""Count the operations of the products that a network really makes."""
import contextlib
import math

import mindspore as ms
from mindspore import ops


@contextlib.contextmanager
def counted(monkeypatch):
    """Within it, `found["flops"]` grows by 2 for each multiply-add of ops.dense, ops.matmul and ops.BatchMatMul.

    In PyNative mode, where operators are called one by one. A product of [.., M, K] and [.., K, N] takes
    2 * M * N * K, for each matrix of the broadcast leading axes.
    """
    found = {"flops": 0}
    dense, matmul, batch_matmul = ops.dense, ops.matmul, ops.BatchMatMul

    def add(out, inner):
        found["flops"] += 2 * math.prod(out.shape) * inner
        return out

    def counting_batch_matmul(**options):
        product = batch_matmul(**options)
        return lambda a, b: add(product(a, b), a.shape[-1])

    with monkeypatch.context() as patch:
        patch.setattr(ops, "dense", lambda x, weight: add(dense(x, weight), x.shape[-1]))
        patch.setattr(ops, "matmul", lambda a, b: add(matmul(a, b), a.shape[-1]))
        patch.setattr(ops, "BatchMatMul", counting_batch_matmul)
        before = ms.get_context("mode")
        ms.set_context(mode=ms.PYNATIVE_MODE)
        try:
            yield found
        finally:
            ms.set_context(mode=before)
