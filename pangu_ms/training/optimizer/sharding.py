"""Matrices that tensor parallel ranks hold parts of, brought together for Muon."""
from mindspore import nn, ops

from pangu_ms.parallel import collectives
from pangu_ms.parallel.sharded_states import filled


class WholeMatrices(nn.Cell):
    """Of matrices that tensor parallel ranks hold parts of, each rank gets some whole ones, as many as the others.

    `construct`: x float32 [G, rows, columns], parts along `axis` -> [ceil(G / ranks), rows, columns]; the matrices that
    fill up the last ranks' are zeros. `back` takes what was made of them, and x.

    Args:
        axis: "rows" or "columns".
    """

    def __init__(self, ranks, axis):
        super().__init__()
        axis = {"rows": 1, "columns": 2}[axis]
        self.ranks = ranks.tensor
        self.whole = collectives.all_to_all(ranks, 0, axis)
        self.parts = collectives.all_to_all(ranks, axis, 0)

    def construct(self, x):
        return self.whole(filled(x, -(-x.shape[0] // self.ranks) * self.ranks))

    def back(self, made, x):
        return ops.slice(self.parts(made), (0, 0, 0), x.shape)
