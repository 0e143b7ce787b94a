"""One training step: gradients, their accumulation and clipping, the optimizer, the experts' selection bias."""
import math

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.architectures.tensors import parameters
from pangu_ms.model.adapters import dropping
from pangu_ms.parallel import collectives


class Gradients(nn.Cell):
    """A batch -> what the objective gives, then the gradients of `weights`; of all ranks' sequences together."""

    def __init__(self, objective, weights):
        super().__init__(auto_prefix=False)
        self.objective = objective
        self.value_and_grad = ms.value_and_grad(objective, None, weights, has_aux=True)
        ranks = objective.causal_lm.ranks
        self.mean = BatchMean(ranks, _tensors(objective, weights)) if ranks.batch > 1 else None

    def construct(self, *batch):
        (total, parts, load), gradients = self.value_and_grad(*batch)
        if self.mean is not None:
            total, parts, load, gradients = self.mean(total, parts, load, gradients)
        return total, parts, load, gradients


class BatchMean(nn.Cell):
    """What ranks with sequences of their own make of them, together: means, but of the experts' load the sum.

    Gradients come in the order of `tensors`. Those of experts hold all sequences of their expert parallel group
    already.
    """

    def __init__(self, ranks, tensors):
        super().__init__()
        self.share, self.each = 1 / ranks.batch, ops.Map()
        self.experts = tuple(tensor.split_over("expert") is not None for tensor in tensors)
        self.copies, self.sum = collectives.reduce(ranks, "data"), collectives.reduce(ranks, "batch")

    def construct(self, total, parts, load, gradients):
        total = self.sum(ops.expand_dims(total, 0))[0] * self.share             # a scalar is no message
        gradients = self.each(ops.partial(_mean, self.copies, self.sum, self.share), self.experts, gradients)
        return total, self.sum(parts) * self.share, self.sum(load), gradients


def _mean(copies, everyone, share, expert, gradient):
    return (copies(gradient) if expert else everyone(gradient)) * share


class ModelSum(nn.Cell):
    """The sum of a number for each parameter, [P], over all ranks of a model; what several ranks hold counts once."""

    def __init__(self, ranks, tensors):
        super().__init__()
        copies = [math.prod(ranks.size(dimension) for dimension in ("tensor", "expert")
                            if tensor.split_over(dimension) is None) for tensor in tensors]
        self.share = ms.Tensor([1 / count for count in copies], ms.float32)
        self.over_tensor, self.over_expert = collectives.reduce(ranks, "tensor"), collectives.reduce(ranks, "expert")

    def construct(self, values):
        total = ops.sum(values * self.share, -1, keepdim=True)                  # [1]: a scalar is no message
        return self.over_expert(self.over_tensor(total))[0]


class Update(nn.Cell):
    """Gradients and load [M, E] of a step -> the parameters are changed; the gradients' norm before clipping."""

    def __init__(self, objective, optimizer, max_grad_norm, bias_update_rate):
        super().__init__(auto_prefix=False)
        self.optimizer, self.max_norm = optimizer, max_grad_norm
        self.each = ops.Map()  # a graph's own loop nests one level deeper at every turn
        causal_lm = objective.causal_lm
        self.sum = ops.ReduceSum()
        if causal_lm.ranks.model.count > 1:
            self.sum = ModelSum(causal_lm.ranks, _tensors(objective, optimizer.parameters))
        self.bias_rate = bias_update_rate if objective.biased else 0.0
        self.biases = ms.ParameterTuple([causal_lm.model.layers[i].mlp.e_score_correction_bias
                                         for i in objective.moe_layers if objective.biased])

    def construct(self, gradients, load):
        norm = ops.sqrt(self.sum(ops.stack(self.each(_sum_of_squares, gradients))))
        if self.max_norm is not None:
            gradients = self.each(ops.partial(_scale, self.max_norm / ops.maximum(norm, self.max_norm)), gradients)
        norm = ops.depend(norm, self.optimizer(gradients))
        if self.bias_rate > 0:
            step = self.bias_rate * ops.sign(ops.mean(load, -1, keep_dims=True) - load)
            for i, bias in enumerate(self.biases):
                norm = ops.depend(norm, ops.assign_add(bias, step[i]))
        return norm


class TrainStep(nn.Cell):
    """`step(*batch)` -> total, parts [P], gradient norm, load [M, E].

    With accumulation > 1 the parameters change at every accumulation-th call, by the mean of the gradients since the
    last change; the other calls give a norm of 0. Everything else is of the call's own batch.

    Args:
        objective: a cell such as `Pretraining`.
        optimizer: an nn.Optimizer over the parameters to train.
        max_grad_norm: clip the norm of all gradients together to this; None: do not.
        bias_update_rate: what the selection bias of an expert moves by, up for those with less than the mean load.
    """

    def __init__(self, objective, optimizer, accumulation=1, max_grad_norm=None, bias_update_rate=0.0):
        super().__init__(auto_prefix=False)
        self.gradients = Gradients(objective, optimizer.parameters)
        self.update = Update(objective, optimizer, max_grad_norm, bias_update_rate)
        self.accumulation, self.calls = accumulation, 0
        if accumulation > 1:
            self.sums = optimizer.parameters.clone("accumulated", "zeros")
            self.load_sum = None
            self.add, self.flush = Accumulate(self.gradients, self.sums), Flush(self.update, self.sums, accumulation)
        self.set_train(True)

    @property
    def objective(self):
        return self.gradients.objective

    @property
    def causal_lm(self):
        return self.objective.causal_lm

    @property
    def optimizer(self):
        return self.update.optimizer

    def construct(self, *batch):
        total, parts, load, gradients = self.gradients(*batch)
        return total, parts, self.update(gradients, load), load

    @dropping
    def __call__(self, *batch):
        if self.accumulation == 1:
            return super().__call__(*batch)
        total, parts, load = self.add(*batch)
        self.load_sum = load if self.load_sum is None else self.load_sum + load
        self.calls += 1
        if self.calls % self.accumulation:
            return total, parts, ms.Tensor(0.0, ms.float32), load
        norm, self.load_sum = self.flush(self.load_sum), None
        return total, parts, norm, load


class Accumulate(nn.Cell):
    """Adds the gradients of a batch to `sums`."""

    def __init__(self, gradients, sums):
        super().__init__(auto_prefix=False)
        self.gradients, self.sums, self.each = gradients, sums, ops.Map()

    def construct(self, *batch):
        total, parts, load, gradients = self.gradients(*batch)
        return ops.depend(total, self.each(ops.assign_add, self.sums, gradients)), parts, load


class Flush(nn.Cell):
    """Updates the parameters by the mean of the accumulated gradients, and sets `sums` back to zero."""

    def __init__(self, update, sums, count):
        super().__init__(auto_prefix=False)
        self.update, self.sums, self.share, self.each = update, sums, 1 / count, ops.Map()

    def construct(self, load):
        norm = self.update(self.each(ops.partial(_scale, ms.Tensor(self.share, ms.float32)), self.sums), load)
        return ops.depend(norm, self.each(_clear, ops.depend(self.sums, norm)))


def _tensors(objective, weights):
    """What the table of the model says of each weight."""
    known = parameters(objective.causal_lm.config)
    return [known[weight.name] for weight in weights]


def _sum_of_squares(gradient):
    return ops.sum(ops.square(ops.cast(gradient, ms.float32)))


def _scale(factor, gradient):
    return gradient * ops.cast(factor, gradient.dtype)


def _clear(total):
    return ops.assign(total, ops.zeros_like(total))
