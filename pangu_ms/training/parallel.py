"""What training needs besides the collectives in the layers where several ranks share a model or a batch.

Gradients of ranks that have the same sequences need nothing more: behind every `Copy` they have the same gradient of
the same values, so what they all hold stays the same on all of them, and of what is divided each has the gradient of
its part. Ranks with other sequences take means.
"""
import math
from dataclasses import replace

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.checkpoint.names import parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import ConfigError
from pangu_ms.model.parallel import Parallel
from pangu_ms.ops import operator
from pangu_ms.ops.cross_entropy import LogShare


def find_parallel(fields):
    """How `parallel_config` shares model and batch, before this process knows its rank.

    data_parallel counts sets of sequences, as in MindFormers, where expert parallel ranks are data parallel ranks too.

    Raises:
        ConfigError: what cannot be shared so, or not by the processes that there are.
    """
    given, context = fields.get("parallel_config") or {}, fields.get("parallel") or {}
    if not fields.get("use_parallel"):
        return Parallel()
    for section, key, value, wanted in (
            ("parallel_config", "pipeline_stage", given.get("pipeline_stage", 1), 1),
            ("parallel_config", "context_parallel", given.get("context_parallel", 1), 1),
            ("parallel", "parallel_mode", context.get("parallel_mode", 0), 0)):
        if value != wanted:
            raise ConfigError(f"{section}.{key}: found {value!r}, wanted {wanted}: ranks share the network by "
                              "collectives of its own, for data_parallel, model_parallel and expert_parallel")
    data, tensor, expert = (given.get(f"{name}_parallel", 1) for name in ("data", "model", "expert"))
    parallel = Parallel(tensor, expert, data, own_sequences=True)
    wrapper, loader = fields["runner_wrapper"].get("type"), fields["train_dataset"]["data_loader"].get("type")
    if wrapper != "PanguTrainStep" and tensor * expert > 1:
        raise ConfigError(f"runner_wrapper.type: found {wrapper}, wanted PanguTrainStep, which knows what other "
                          "devices hold of a model")
    if context.get("enable_parallel_optimizer") and fields["optimizer"].get("type") != "PanguMuon":
        raise ConfigError(f"optimizer.type: found {fields['optimizer'].get('type')}, wanted PanguMuon, which divides "
                          "its states as parallel.enable_parallel_optimizer asks")
    if loader != "PanguJsonlLoader" and tensor > 1:
        raise ConfigError(f"train_dataset.data_loader.type: found {loader}, wanted PanguJsonlLoader, which gives the "
                          "same sequences to all ranks of model_parallel")
    if data % expert:
        raise ConfigError(f"parallel_config.expert_parallel: {expert} does not divide data_parallel {data}, whose "
                          "ranks share the experts")
    parallel = replace(parallel, data=data // expert)
    parallel.check(PanguConfig.from_dict(fields["model"]["model_config"]))
    parallel.check_processes()
    return parallel


class BatchMean(nn.Cell):
    """What ranks with sequences of their own make of them, together: means, but of the experts' load the sum.

    Gradients come in the order of `names`. Those of experts hold all sequences of their expert parallel group already.
    """

    def __init__(self, config, parallel, names):
        super().__init__()
        experts, self.share, self.each = expert_names(config), 1 / parallel.batch, ops.Map()
        self.experts = tuple(name in experts for name in names)
        self.copies, self.sum = parallel.reduce("data"), parallel.reduce("batch")

    def construct(self, total, parts, load, gradients):
        total = self.sum(ops.expand_dims(total, 0))[0] * self.share             # a scalar is no message
        gradients = self.each(ops.partial(_mean, self.copies, self.sum, self.share), self.experts, gradients)
        return total, self.sum(parts) * self.share, self.sum(load), gradients


def _mean(copies, everyone, share, expert, gradient):
    return (copies(gradient) if expert else everyone(gradient)) * share


class SharedCrossEntropy(nn.Cell):
    """The operator `cross_entropy` where each tensor parallel rank has the weights of its range of the vocabulary."""

    def __init__(self, config, parallel):
        super().__init__()
        first = parallel.tensor_rank * (config.vocab_size // parallel.tensor)
        self.copy = parallel.copy("tensor")
        self.log_share = LogShare(operator("linear", config.compute_dtype), first, parallel.reduce("tensor"),
                                  _Largest(parallel.gather()))

    def construct(self, hidden, weight, labels, mask):
        """hidden [B, T, H], normed, weight [V / ranks, H], labels int32 [B, T], mask float32 [B, T] -> [B, T]."""
        flat = ops.reshape(self.copy(hidden), (-1, hidden.shape[-1]))
        return ops.reshape(self.log_share(flat, weight, ops.reshape(labels, (-1,)))[0], labels.shape) * mask


class _Largest(nn.Cell):
    """x [N] -> the largest of each place over the ranks that `gather` asks."""

    def __init__(self, gather):
        super().__init__()
        self.gather = gather

    def construct(self, x):
        return ops.ReduceMax()(self.gather(ops.reshape(x, (1, -1, 1))), -1)[0]


class SharedSum(nn.Cell):
    """The sum of a number for each parameter, [P], over all ranks of a model; what several ranks hold counts once."""

    def __init__(self, config, parallel, names):
        super().__init__()
        known, sizes = parameters(config), {"tensor": parallel.tensor, "expert": parallel.expert}
        divided = [{split.over for split in known[name].splits} for name in names]
        copies = [math.prod(size for dimension, size in sizes.items() if dimension not in over) for over in divided]
        self.share = ms.Tensor([1 / count for count in copies], ms.float32)
        self.over_tensor, self.over_expert = parallel.reduce("tensor"), parallel.reduce("expert")

    def construct(self, values):
        total = ops.sum(values * self.share, -1, keepdim=True)                  # [1]: a scalar is no message
        return self.over_expert(self.over_tensor(total))[0]


def expert_names(config):
    """Of the parameters that expert parallel ranks divide."""
    return {name for name, parameter in parameters(config).items()
            if any(split.over == "expert" for split in parameter.splits)}


def divided_axes(config):
    """Name -> "rows" or "columns": the axis along which tensor parallel ranks divide a parameter's matrices."""
    return {name: split.axis for name, parameter in parameters(config).items()
            for split in parameter.splits if split.over == "tensor"}


class Matrices(nn.Cell):
    """Of matrices that tensor parallel ranks hold parts of, each rank some whole ones, as many as the others; and back.

    `construct`: x float32 [G, rows, columns], parts along `axis` -> [ceil(G / ranks), rows, columns]; the matrices that
    fill up the last ranks' are zeros. `back` takes what was made of them, and x.
    """

    def __init__(self, parallel, axis):
        super().__init__()
        axis = {"rows": 1, "columns": 2}[axis]
        self.ranks = parallel.tensor
        self.whole, self.parts = parallel.exchange(0, axis), parallel.exchange(axis, 0)

    def construct(self, x):
        return self.whole(filled(x, -(-x.shape[0] // self.ranks) * self.ranks))

    def back(self, made, x):
        return ops.slice(self.parts(made), (0, 0, 0), x.shape)


def filled(x, length):
    """x [B, ...] with zeros behind it, [length, ...]."""
    if x.shape[0] == length:
        return x
    return ops.cat((x, ops.zeros((length - x.shape[0],) + x.shape[1:], x.dtype)))
