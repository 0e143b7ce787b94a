"""One training step: gradients, their accumulation and clipping, the optimizer, the experts' selection bias."""
import math

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.architectures.tensors import parameters
from pangu_ms.model.adapters import dropping
from pangu_ms.parallel import collectives
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.optimizer.qk_clip import LargestOfRanks, QKClip


class Gradients(nn.Cell):
    """A batch -> total, parts, load, the gradients of `weights`, and the largest logits where the objective gives them;
    of all ranks' sequences together."""

    def __init__(self, objective, weights):
        super().__init__(auto_prefix=False)
        self.objective = objective
        self.value_and_grad = ms.value_and_grad(objective, None, weights, has_aux=True)
        ranks = objective.causal_lm.ranks
        self.mean = BatchMean(ranks, _tensors(objective, weights)) if ranks.batch > 1 else None
        self.largest = LargestOfRanks(ranks) if objective.largest_logits else None

    def construct(self, *batch):
        outputs, gradients = self.value_and_grad(*batch)
        total, parts, load = outputs[0], outputs[1], outputs[2]
        if self.mean is not None:
            total, parts, load, gradients = self.mean(total, parts, load, gradients)
        if self.largest is not None:
            return total, parts, load, gradients, self.largest(outputs[3])
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
    """Of a number for each parameter, [P], the sums over all ranks of a model; what several ranks hold counts once."""

    def __init__(self, ranks, tensors):
        super().__init__()
        copies = [math.prod(ranks.size(dimension) for dimension in ("tensor", "expert")
                            if tensor.split_over(dimension) is None) for tensor in tensors]
        self.share = ms.Tensor([1 / count for count in copies], ms.float32)
        self.over_tensor, self.over_expert = collectives.reduce(ranks, "tensor"), collectives.reduce(ranks, "expert")

    def construct(self, values):
        return self.over_expert(self.over_tensor(values * self.share))


class Update(nn.Cell):
    """Gradients, load [M, E] and loss of a step, and the largest logits [L, heads] if its objective gives them -> the
    parameters are changed; the gradients' norm before clipping, and the sum of squares of each of them, [P].

    With `skips`, a loss or norm that is not finite changes nothing but the optimizer's count of steps, which schedules
    follow. All ranks have the same loss and norm, so all do the same.
    """

    def __init__(self, objective, optimizer, max_grad_norm, bias_update_rate, skips=False):
        super().__init__(auto_prefix=False)
        self.optimizer, self.max_norm, self.skips = optimizer, max_grad_norm, skips
        self.each = ops.Map()  # a graph's own loop nests one level deeper at every turn
        causal_lm = objective.causal_lm
        self.sum, self.of_ranks = ops.ReduceSum(), None
        if causal_lm.ranks.model.count > 1:
            self.of_ranks = ModelSum(causal_lm.ranks, _tensors(objective, optimizer.parameters))
        rates = ByStep.of(bias_update_rate)
        self.biased, self.constant = objective.biased and rates.largest > 0, len(rates.values) == 1
        self.rates, self.starts = ms.Tensor(rates.values, ms.float32), ms.Tensor(rates.starts, ms.float32)
        self.biases = ms.ParameterTuple([causal_lm.model.layers[i].mlp.e_score_correction_bias
                                         for i in objective.moe_layers if objective.biased])
        self.qk_clip = None
        if objective.largest_logits:
            self.qk_clip = QKClip(objective.qk_clip_threshold, objective.layers, optimizer, causal_lm.ranks)

    def construct(self, gradients, load, loss=0.0, largest=None):
        squares = ops.stack(self.each(_sum_of_squares, gradients))              # [P]
        if self.of_ranks is not None:
            squares = self.of_ranks(squares)
        norm = ops.sqrt(self.sum(squares))
        if not self.skips:
            return self._change(gradients, load, norm, largest), squares
        if ops.logical_and(ops.isfinite(norm), ops.isfinite(loss)):
            norm = self._change(gradients, load, norm, largest)
        else:
            norm = ops.depend(norm, ops.assign_add(self.optimizer.global_step, 1))
        return norm, squares

    def _change(self, gradients, load, norm, largest):
        if self.max_norm is not None:
            gradients = self.each(ops.partial(_scale, self.max_norm / ops.maximum(norm, self.max_norm)), gradients)
        norm = ops.depend(norm, self.optimizer(gradients))
        if self.qk_clip is not None:
            norm = ops.depend(norm, self.qk_clip(ops.depend(largest, norm)))
        if self.biased:
            step = self._bias_rate(norm) * ops.sign(ops.mean(load, -1, keep_dims=True) - load)
            for i, bias in enumerate(self.biases):
                norm = ops.depend(norm, ops.assign_add(bias, step[i]))
        return norm

    def _bias_rate(self, norm):
        """Of the step that the optimizer has counted as its last, behind which `norm` is."""
        if self.constant:
            return self.rates
        count = ops.cast(ops.depend(self.optimizer.global_step, norm), ms.float32)              # [1]
        begun = ops.sum(ops.cast(count > self.starts, ms.float32), keepdim=True)
        return ops.gather(self.rates, ops.cast(begun - 1, ms.int32), 0)


class TrainStep(nn.Cell):
    """`step(*batch)` -> total, parts [P], gradient norm, load [M, E], squares [N]: the sum of squares of the gradient
    of each of `optimizer.parameters`, before clipping; and where the objective gives them the largest logits
    [L, heads].

    With accumulation > 1 the parameters change at every accumulation-th call, by the mean of the gradients since the
    last change; the other calls give a norm and squares of 0. Everything else is of the call's own batch.

    Args:
        objective: a cell such as `Pretraining`.
        optimizer: an nn.Optimizer over the parameters to train.
        max_grad_norm: clip the norm of all gradients together to this; None: do not.
        bias_update_rate: what the selection bias of an expert moves by, up for those with less than the mean load; a
            number or a `ByStep` by the optimizer's count of steps.
        skips: nothing changes where the loss or the norm is not finite.

    Attributes:
        accumulation: may be changed between one update and the next, but where it was 1 from the beginning.
    """

    def __init__(self, objective, optimizer, accumulation=1, max_grad_norm=None, bias_update_rate=0.0, skips=False):
        super().__init__(auto_prefix=False)
        self.gradients = Gradients(objective, optimizer.parameters)
        self.update = Update(objective, optimizer, max_grad_norm, bias_update_rate, skips)
        self.accumulation, self.accumulates, self.calls = accumulation, accumulation > 1, 0
        if self.accumulates:
            self.sums = optimizer.parameters.clone("accumulated", "zeros")
            self.load_sum = self.total_sum = None
            self.largest = ()
            self.add, self.flush = Accumulate(self.gradients, self.sums), Flush(self.update, self.sums)
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
        outputs = self.gradients(*batch)
        total, parts, load, gradients = outputs[0], outputs[1], outputs[2], outputs[3]
        if self.gradients.largest is not None:
            norm, squares = self.update(gradients, load, total, outputs[4])
            return total, parts, norm, load, squares, outputs[4]
        norm, squares = self.update(gradients, load, total)
        return total, parts, norm, load, squares

    @dropping
    def __call__(self, *batch):
        if not self.accumulates:
            return super().__call__(*batch)
        total, parts, load, *largest = self.add(*batch)
        first = self.calls == 0
        self.load_sum = load if first else self.load_sum + load
        self.total_sum = total if first else self.total_sum + total
        self.largest = largest if first else [ops.maximum(*both) for both in zip(self.largest, largest)]
        self.calls += 1
        if self.calls < self.accumulation:
            return total, parts, ms.Tensor(0.0, ms.float32), load, ops.zeros(len(self.sums), ms.float32), *largest
        self.calls = 0
        norm, squares = self.flush(self.load_sum, self.total_sum, ms.Tensor(1 / self.accumulation, ms.float32),
                                   *self.largest)
        return total, parts, norm, load, squares, *largest


class Accumulate(nn.Cell):
    """Adds the gradients of a batch to `sums`."""

    def __init__(self, gradients, sums):
        super().__init__(auto_prefix=False)
        self.gradients, self.sums, self.each = gradients, sums, ops.Map()

    def construct(self, *batch):
        outputs = self.gradients(*batch)
        parts, load = outputs[1], outputs[2]
        total = ops.depend(outputs[0], self.each(ops.assign_add, self.sums, outputs[3]))
        if self.gradients.largest is not None:
            return total, parts, load, outputs[4]
        return total, parts, load


class Flush(nn.Cell):
    """Updates the parameters by `share` of the accumulated gradients, and sets `sums` back to zero."""

    def __init__(self, update, sums):
        super().__init__(auto_prefix=False)
        self.update, self.sums, self.each = update, sums, ops.Map()

    def construct(self, load, total, share, largest=None):
        norm, squares = self.update(self.each(ops.partial(_scale, share), self.sums), load, total, largest)
        return ops.depend(norm, self.each(_clear, ops.depend(self.sums, norm))), squares


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
