"""What an optimizer step does to parameters: Muon to matrices, AdamW to anything.

Gradients come in the order of the parameters; `powers` are AdamW's betas to the power of the step.
"""
import math

import mindspore as ms
from mindspore import nn, ops


class Muon(nn.Cell):
    """One step of Muon for parameters of one shape and one `matrix_rows` -> their new values."""

    def __init__(self, params, rows, decay, momentum, coefficients, matrices):
        super().__init__(auto_prefix=False)
        self.params, self.masters = ms.ParameterTuple(params), _masters(params)
        self.moments = ms.ParameterTuple([_state("muon", p) for p in params])
        self.periods, self.sizes = rows
        self.decay, self.momentum, self.coefficients = decay, momentum, coefficients
        count = params[0].shape[0] if params[0].ndim == 3 else 1                # matrices of one parameter
        self.first = tuple(range(0, len(params) * count, count))
        self.count, self.shape = count, params[0].shape
        self.matrices = matrices
        self.each = ops.Map()  # a graph's own loop nests one level deeper at every turn

    def construct(self, gradients, rate, powers):
        updates = ops.stack(self.each(ops.partial(_momentum, self.momentum), self.moments, gradients))
        updates = ops.reshape(updates, (-1,) + self.shape[-2:])
        if self.matrices is None:
            updates = self._orthogonal(updates) * rate
        else:
            updates = self.matrices.back(self._orthogonal(self.matrices(updates)), updates) * rate
        masters = self.each(ops.partial(_subtract, updates, self.count, 1 - rate * self.decay), self.masters,
                            self.first)
        return self.each(_write_back, self.params, masters)

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


class AdamW(nn.Cell):
    """One step of AdamW for any parameters, each with a decay of its own -> their new values."""

    def __init__(self, params, decays, betas, eps):
        super().__init__(auto_prefix=False)
        self.params, self.masters = ms.ParameterTuple(params), _masters(params)
        self.first = ms.ParameterTuple([_state("adam_m", p) for p in params])
        self.second = ms.ParameterTuple([_state("adam_v", p) for p in params])
        self.decays, self.betas, self.eps, self.adam, self.each = decays, betas, eps, ops.Adam(), ops.Map()

    def construct(self, gradients, rate, powers):
        step = ops.partial(_adamw_step, self.adam, rate, powers[0], powers[1], self.betas[0], self.betas[1], self.eps)
        masters = self.each(step, self.masters, self.first, self.second, self.decays, gradients)
        return self.each(_write_back, self.params, masters)


def orthogonalise(x, coefficients):
    """x float32 [G, M, N] -> matrices with the same singular vectors, all singular values near one size.

    That size, 0.2 * sqrt(larger side), gives them entries as large as those of AdamW's steps usually are.
    """
    tall = x.shape[1] > x.shape[2]
    x = ops.swapaxes(x, 1, 2) if tall else x
    x = x / (ops.sqrt(ops.sum(ops.square(x), (1, 2), keepdim=True)) + 1e-20)
    by_transposed = ops.BatchMatMul(transpose_b=True)
    for a, b, c in coefficients:
        gram = by_transposed(x, x)
        x = x * a + ops.matmul(gram * b + ops.matmul(gram, gram) * c, x)
    x = x * (0.2 * math.sqrt(x.shape[2]))
    return ops.swapaxes(x, 1, 2) if tall else x


def _momentum(momentum, moment, gradient):
    gradient = ops.cast(gradient, ms.float32)
    return gradient + ops.assign(moment, moment * momentum + gradient) * momentum


def _subtract(updates, count, keep, master, first):
    update = ops.slice(updates, (first, 0, 0), (count,) + updates.shape[1:])
    return ops.assign(master, master * keep - ops.reshape(update, master.shape))


def _adamw_step(adam, rate, power1, power2, beta1, beta2, eps, master, first, second, decay, gradient):
    if decay > 0:
        master = ops.depend(master, ops.assign(master, master * (1 - rate * decay)))
    done = adam(master, first, second, power1, power2, rate, beta1, beta2, eps, ops.cast(gradient, ms.float32))
    return ops.depend(master, done)


def _write_back(parameter, master):
    """Nothing to do where the parameter is its own master."""
    return master if parameter.dtype == ms.float32 else ops.assign(parameter, ops.cast(master, parameter.dtype))


def _masters(params):
    return ms.ParameterTuple([p if p.dtype == ms.float32 else _state("master", p, p.astype(ms.float32))
                              for p in params])


def _state(kind, parameter, values=None):
    values = ops.zeros(parameter.shape, ms.float32) if values is None else values
    return ms.Parameter(values, f"{kind}.{parameter.name}", requires_grad=False)
