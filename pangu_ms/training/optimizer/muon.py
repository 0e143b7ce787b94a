"""One step of Muon: momentum, orthogonalised by Newton-Schulz steps."""
import math

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.training.optimizer.states import master_copies, new_state, write_back


class Muon(nn.Cell):
    """One step of Muon for parameters of one shape and one `row_pattern` -> their new values.

    Args:
        row_pattern: of the whole parameters, or of what ranks hold together: `tensors.Parameter.joined_pattern`.
        decay: decoupled weight decay.
        matrices: where tensor parallel ranks share the parameters, the `WholeMatrices` that brings them together.
    """

    def __init__(self, params, row_pattern, decay, momentum, coefficients, matrices):
        super().__init__(auto_prefix=False)
        self.params, self.masters = ms.ParameterTuple(params), master_copies(params)
        self.moments = ms.ParameterTuple([new_state("muon", p) for p in params])
        self.periods, self.sizes = row_pattern
        self.decay, self.momentum, self.coefficients = decay, momentum, coefficients
        self.shape, self.split = params[0].shape, ops.Split(0, len(params))
        self.matrices = matrices
        self.each = ops.Map()  # a graph's own loop nests one level deeper at every turn

    def construct(self, gradients, rate, powers):
        updates = ops.stack(self.each(ops.partial(_momentum, self.momentum), self.moments, gradients))
        updates = ops.reshape(updates, (-1,) + self.shape[-2:])
        if self.matrices is None:
            updates = self._orthogonal(updates) * rate
        else:
            updates = self.matrices.back(self._orthogonal(self.matrices(updates)), updates) * rate
        masters = self.each(ops.partial(_subtract, 1 - rate * self.decay), self.masters, self.split(updates))
        return self.each(write_back, self.params, masters)

    def _orthogonal(self, x):
        """x [G, rows, columns] -> the same, each matrix of its rows orthogonalised."""
        if len(self.sizes) == 1:
            return orthogonalise(x, self.coefficients)
        groups, rows, columns = x.shape
        x = ops.reshape(x, (groups, self.periods, -1, columns))
        parts, first = (), 0
        for size in self.sizes:                                                 # ops.split is slow to compile
            part = ops.slice(x, (0, 0, first, 0), (groups, self.periods, size, columns))
            part = orthogonalise(ops.reshape(part, (groups, -1, columns)), self.coefficients)
            parts, first = parts + (ops.reshape(part, (groups, self.periods, -1, columns)),), first + size
        return ops.reshape(ops.cat(parts, 2), (groups, rows, columns))


def orthogonalise(x, coefficients):
    """x float32 [G, M, N] -> matrices with the same singular vectors, all singular values near one size.

    That size, 0.2 * sqrt(larger side), gives them entries as large as those of AdamW's steps usually are.
    """
    tall = x.shape[1] > x.shape[2]
    x = ops.transpose(x, (0, 2, 1)) if tall else x
    x = x / (ops.sqrt(ops.sum(ops.square(x), (1, 2), keepdim=True)) + 1e-20)
    product, by_transposed = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
    for a, b, c in coefficients:
        gram = by_transposed(x, x)
        x = x * a + product(gram * b + product(gram, gram) * c, x)
    x = x * (0.2 * math.sqrt(x.shape[2]))
    return ops.transpose(x, (0, 2, 1)) if tall else x


def _momentum(momentum, moment, gradient):
    gradient = ops.cast(gradient, ms.float32)
    return gradient + ops.assign(moment, moment * momentum + gradient) * momentum


def _subtract(keep, master, update):
    return ops.assign(master, master * keep - ops.reshape(update, master.shape))
