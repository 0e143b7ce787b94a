"""Muon for the matrices, AdamW for everything else.

Public training code names Muon but not its settings, so the choices are ours. Which rows of a projection make one
matrix follows MindFormers' Muon (core/optim/muon.py): each expert by itself with gate and up apart, the nope rows of
all heads and the rope rows of all heads of q_b_proj, the latent rows and the rope rows of kv_a_proj_with_mqa, the key
rows and the value rows of all heads of kv_b_proj. MindFormers' own cannot be used: it updates the router and the
hyper-connections as matrices too, and wants Megatron's parameter names. Attention logits are not clipped (QK-clip):
they never leave the attention operator, whose fused forms do not give them out.
"""
import math

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.parallel import Parallel
from pangu_ms.training.parallel import Matrices, divided_axes

ADAMW = ("embed_tokens", "lm_head", "gate", "phi")  # two-dimensional, yet no map between hidden vectors of one layer
NS_COEFFICIENTS = ((3.4445, -4.775, 2.0315),) * 5


def matrix_rows(name, shape, config):
    """How Muon sees a parameter: (periods, (rows, ...)), or None for AdamW.

    The rows of a two-dimensional parameter are `periods` times the pattern of sizes; what stands at one place of the
    pattern, over all periods, is one matrix. Three-dimensional ones hold one matrix for each expert.
    """
    kind = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    if "sink" in kind or "conv" in kind or kind in ADAMW or len(shape) < 2:
        return None
    if kind == "q_b_proj":
        return config.num_attention_heads, (config.qk_nope_head_dim, config.qk_rope_head_dim)
    if kind == "kv_a_proj_with_mqa":
        return 1, (config.kv_lora_rank, config.qk_rope_head_dim)
    if kind == "kv_b_proj":
        return config.num_attention_heads, (config.qk_nope_head_dim, config.v_head_dim)
    return 1, (shape[-2],)


class PanguMuon(nn.Optimizer):
    """`optimizer(gradients)` changes its `parameters` in place; gradients come in the order of `parameters`.

    Muon: m = momentum * m + g; the update is g + momentum * m (Nesterov), orthogonalised by Newton-Schulz steps and
    scaled by 0.2 * sqrt(larger side), so that its size is what AdamW's usually is and one learning rate serves both.
    Decay is decoupled, and left out for vectors, convolutions and sinks. Moments are float32, as are the master copies
    of parameters of another dtype.

    Args:
        params: the parameters to train, under their names in the model. `parameters` holds them in another order.
        config: the `PanguConfig` of the model.
        learning_rate: a number, or a LearningRateSchedule over steps.
        weight_decay: of Muon and AdamW.
        momentum: of Muon.
        ns_coefficients: (a, b, c) of each Newton-Schulz step X <- aX + (bA + cA^2)X with A = XX^T.
        adamw_betas, adamw_eps: of AdamW.
        muon: False: AdamW for all of them.
        parallel (Parallel): of the model. Each matrix that tensor parallel ranks divide is orthogonalised whole.
    """

    def __init__(self, params, config, learning_rate=1e-3, weight_decay=0.1, momentum=0.95,
                 ns_coefficients=NS_COEFFICIENTS, adamw_betas=(0.9, 0.95), adamw_eps=1e-8, muon=True,
                 parallel=Parallel()):
        axes = divided_axes(config) if parallel.tensor > 1 else {}
        groups = {}                                                             # of equal matrices; None: the others
        for parameter in params:
            rows = matrix_rows(parameter.name, parameter.shape, config) if muon else None
            groups.setdefault(rows and (parameter.shape, rows, axes.get(parameter.name)), []).append(parameter)
        others = groups.pop(None, [])
        super().__init__(learning_rate, sum(groups.values(), []) + others, 0.0)
        coefficients = tuple(tuple(step) for step in ns_coefficients)
        self.groups = nn.CellList([Muon(members, rows, weight_decay, momentum, coefficients,
                                        Matrices(parallel, axis) if axis else None)
                                   for (_, rows, axis), members in groups.items()], auto_prefix=False)
        sizes = [len(members) for members in groups.values()]
        self.ranges = [(sum(sizes[:i]), sum(sizes[:i + 1])) for i in range(len(sizes))]
        self.matrices = sum(sizes)
        self.adamw = AdamW(others, weight_decay, tuple(adamw_betas), adamw_eps) if others else None

    def construct(self, gradients):
        rate = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        done = rate
        for group, (first, end) in zip(self.groups, self.ranges):
            done = ops.depend(done, group(gradients[first:end], rate))
        if self.adamw is not None:
            done = ops.depend(done, self.adamw(gradients[self.matrices:], rate))
        return done


class Muon(nn.Cell):
    """One step of Muon for parameters of one shape and one `matrix_rows`."""

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

    def construct(self, gradients, rate):
        updates = ops.stack(self.each(ops.partial(_momentum, self.momentum), self.moments, gradients))
        updates = ops.reshape(updates, (-1,) + self.shape[-2:])
        if self.matrices is None:
            updates = self._orthogonal(updates) * rate
        else:
            updates = self.matrices.part(self._orthogonal(self.matrices(updates))) * rate
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
    """One step of AdamW for any parameters."""

    def __init__(self, params, decay, betas, eps):
        super().__init__(auto_prefix=False)
        self.params, self.masters = ms.ParameterTuple(params), _masters(params)
        self.first = ms.ParameterTuple([_state("adam_m", p) for p in params])
        self.second = ms.ParameterTuple([_state("adam_v", p) for p in params])
        self.powers = ms.ParameterTuple([ms.Parameter(ms.Tensor(1.0, ms.float32), f"adam_beta{i}_power", False)
                                         for i in (1, 2)])
        self.decays = tuple(decay if _decayed(p) else 0.0 for p in params)
        self.betas, self.eps, self.adam, self.each = betas, eps, ops.Adam(), ops.Map()

    def construct(self, gradients, rate):
        power1 = ops.assign(self.powers[0], self.powers[0] * self.betas[0])
        power2 = ops.assign(self.powers[1], self.powers[1] * self.betas[1])
        step = ops.partial(_adamw_step, self.adam, rate, power1, power2, self.betas[0], self.betas[1], self.eps)
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


def _decayed(parameter):
    return len(parameter.shape) > 1 and "sink" not in parameter.name and "conv" not in parameter.name


def _masters(params):
    return ms.ParameterTuple([p if p.dtype == ms.float32 else _state("master", p, p.astype(ms.float32))
                              for p in params])


def _state(kind, parameter, values=None):
    values = ops.zeros(parameter.shape, ms.float32) if values is None else values
    return ms.Parameter(values, f"{kind}.{parameter.name}", requires_grad=False)
