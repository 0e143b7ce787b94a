"""One training step: gradients, their accumulation and clipping, the optimizer, the experts' selection bias."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.training.parallel import BatchMean, SharedSum


class Gradients(nn.Cell):
    """A batch -> what `TrainingForward` gives, then the gradients of `weights`; of all ranks' sequences together."""

    def __init__(self, forward, weights):
        super().__init__(auto_prefix=False)
        self.forward = forward
        self.value_and_grad = ms.value_and_grad(forward, None, weights, has_aux=True)
        config, parallel = forward.causal_lm.config, forward.causal_lm.parallel
        self.mean = BatchMean(config, parallel, [p.name for p in weights]) if parallel.batch > 1 else None

    def construct(self, input_ids, labels, loss_mask, position_ids):
        (total, parts, load), gradients = self.value_and_grad(input_ids, labels, loss_mask, position_ids)
        if self.mean is not None:
            total, parts, load, gradients = self.mean(total, parts, load, gradients)
        return total, parts, load, gradients


class Update(nn.Cell):
    """Gradients and load [M, E] of a step -> the parameters are changed; the gradients' norm before clipping."""

    def __init__(self, forward, optimizer, max_grad_norm, bias_update_rate):
        super().__init__(auto_prefix=False)
        self.optimizer, self.max_norm = optimizer, max_grad_norm
        self.each = ops.Map()  # a graph's own loop nests one level deeper at every turn
        causal_lm, self.sum = forward.causal_lm, ops.ReduceSum()
        if causal_lm.parallel.tensor * causal_lm.parallel.expert > 1:
            self.sum = SharedSum(causal_lm.config, causal_lm.parallel, [p.name for p in optimizer.parameters])
        layers = causal_lm.model.layers
        moe = [i for i, plan in enumerate(causal_lm.config.layers) if plan.moe]
        self.bias_rate = bias_update_rate if forward.moe_count else 0.0
        self.biases = ms.ParameterTuple([layers[i].mlp.e_score_correction_bias for i in moe[:forward.moe_count]])

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
    """`step(input_ids, labels, loss_mask, position_ids)` -> total, parts [P], gradient norm, load [M, E].

    With accumulation > 1 the parameters change at every accumulation-th call, by the mean of the gradients since the
    last change; the other calls give a norm of 0. Everything else is of the call's own batch.

    Args:
        forward: a `TrainingForward`.
        optimizer: an nn.Optimizer over the parameters to train.
        max_grad_norm: clip the norm of all gradients together to this; None: do not.
        bias_update_rate: what the selection bias of an expert moves by, up for those with less than the mean load.
    """

    def __init__(self, forward, optimizer, accumulation=1, max_grad_norm=None, bias_update_rate=0.0):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradients = Gradients(forward, optimizer.parameters)
        self.update = Update(forward, optimizer, max_grad_norm, bias_update_rate)
        self.accumulation, self.calls = accumulation, 0
        if accumulation > 1:
            self.sums = optimizer.parameters.clone("accumulated", "zeros")
            self.load_sum = None
            self.add, self.flush = Accumulate(self.gradients, self.sums), Flush(self.update, self.sums, accumulation)
        self.set_train(True)

    def construct(self, input_ids, labels, loss_mask, position_ids):
        total, parts, load, gradients = self.gradients(input_ids, labels, loss_mask, position_ids)
        return total, parts, self.update(gradients, load), load

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

    def construct(self, input_ids, labels, loss_mask, position_ids):
        total, parts, load, gradients = self.gradients(input_ids, labels, loss_mask, position_ids)
        return ops.depend(total, self.each(ops.assign_add, self.sums, gradients)), parts, load


class Flush(nn.Cell):
    """Updates the parameters by the mean of the accumulated gradients, and sets `sums` back to zero."""

    def __init__(self, update, sums, count):
        super().__init__(auto_prefix=False)
        self.update, self.sums, self.share, self.each = update, sums, 1 / count, ops.Map()

    def construct(self, load):
        norm = self.update(self.each(ops.partial(_scale, ms.Tensor(self.share, ms.float32)), self.sums), load)
        return ops.depend(norm, self.each(_clear, ops.depend(self.sums, norm)))


def _sum_of_squares(gradient):
    return ops.sum(ops.square(ops.cast(gradient, ms.float32)))


def _scale(factor, gradient):
    return gradient * ops.cast(factor, gradient.dtype)


def _clear(total):
    return ops.assign(total, ops.zeros_like(total))
