"""One step of AdamW."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.training.optimizer.states import master_copies, new_state, write_back


class AdamW(nn.Cell):
    """One step of AdamW for any parameters, each with a decay of its own -> their new values.

    `powers` are the betas to the power of the step.
    """

    def __init__(self, params, decays, betas, eps):
        super().__init__(auto_prefix=False)
        self.params, self.masters = ms.ParameterTuple(params), master_copies(params)
        self.first = ms.ParameterTuple([new_state("adam_m", p) for p in params])
        self.second = ms.ParameterTuple([new_state("adam_v", p) for p in params])
        self.decays, self.betas, self.eps, self.adam, self.each = decays, betas, eps, ops.Adam(), ops.Map()

    def construct(self, gradients, rate, powers):
        step = ops.partial(_adamw_step, self.adam, rate, powers[0], powers[1], self.betas[0], self.betas[1], self.eps)
        masters = self.each(step, self.masters, self.first, self.second, self.decays, gradients)
        return self.each(write_back, self.params, masters)


def _adamw_step(adam, rate, power1, power2, beta1, beta2, eps, master, first, second, decay, gradient):
    if decay > 0:
        master = ops.depend(master, ops.assign(master, master * (1 - rate * decay)))
    done = adam(master, first, second, power1, power2, rate, beta1, beta2, eps, ops.cast(gradient, ms.float32))
    return ops.depend(master, done)
