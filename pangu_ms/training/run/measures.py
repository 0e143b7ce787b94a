"""Numbers of a step besides its losses: gradient norms by part of the model, load by layer, and operations a second."""
from collections import defaultdict


from pangu_ms.architectures.tensors import has_gradient, parameters
from pangu_ms.errors import ConfigError
from pangu_ms.estimate.devices import DEVICES
from pangu_ms.estimate.phases import flops_per_token
from pangu_ms.estimate.work import Case, Work
from pangu_ms.parallel.ranks import Ranks

# What the components of the tensors' table count as; those that are not here are "other": norms, mHC, merges.
PARTS = {"embedding": "embedding", "head": "head", "attention": "attention", "convolution": "attention",
         "sink": "attention", "indexer": "indexer", "dense_mlp": "dense_mlp", "shared_expert": "shared_expert",
         "expert": "expert", "router": "router"}


class Measures:
    """Of the outputs of a `TrainStep`, and how long it took, numbers by name.

    `grad_norm/PART`: the norm before clipping of the gradients of that part; their squares add up to the square of
    grad_norm. `mtp` are all tensors of the MTP layers. `expert_balance/layer_I`: load of layer I's busiest expert over
    the mean.

    `tflops`: 10^12 operations a second of one device, as `estimate` counts those of the model: forward and backward of
    every token, padding included, attention over visible rows of whole sequences, nothing that is computed again.
    `mfu`: their share of the device's peak, if it is known. Neither is there while a part of the model is frozen.

    Args:
        step: the `TrainStep`.
        device: a name in `estimate.devices.DEVICES`.
    """

    def __init__(self, step, device=None):
        causal_lm, self.objective, self.devices = step.causal_lm, step.objective, step.causal_lm.ranks.count
        self.config, self.dtype = causal_lm.config, causal_lm.plan.dtype
        table, names = parameters(self.config), [parameter.name for parameter in step.optimizer.parameters]
        self.parts = [part_of(table[name]) for name in names]
        self.layers = [causal_lm.plan.layers[place].index for place in self.objective.moe_layers]
        self.whole = set(names) == {name for name in table if has_gradient(name)}
        self.peak, self.flops = peak(device, self.dtype), {}

    def __call__(self, outputs, length, tokens_per_second):
        load, squares = (output.asnumpy() for output in outputs[3:5])
        sums = defaultdict(float)
        for part, square in zip(self.parts, squares.tolist()):
            sums[part] += square
        found = {f"grad_norm/{part}": sums[part] ** 0.5 for part in sorted(sums)}
        found |= {f"expert_balance/layer_{layer}": (each.max() / each.mean()).item()
                  for layer, each in zip(self.layers, load)}
        if self.whole:
            rate = self.flops_of_token(length) * tokens_per_second / self.devices / 1e12
            found |= {"tflops": rate} | ({"mfu": rate / self.peak} if self.peak else {})
        return found

    def flops_of_token(self, length):
        """Operations of a training step for each token of a sequence of this length."""
        if length not in self.flops:
            case = Case(self.config, Ranks(batch_sharded=True), Work("train", length, 1, self.dtype, fused=True))
            found = flops_per_token(case)["step"]
            self.flops[length] = sum(value for name, value in found.items()
                                     if name != "indexer_loss" or self.objective.indexed)
        return self.flops[length]


def part_of(tensor) -> str:
    """The part that a tensor's gradient counts in."""
    in_mtp = tensor.layer is not None and tensor.layer.mtp_depth > 0
    return "mtp" if in_mtp else PARTS.get(tensor.component, "other")


def peak(device, dtype):
    """TFLOP/s of a device in the model's dtype, None for no device; `ConfigError` when it is not in the table."""
    if device is None:
        return None
    if device not in DEVICES:
        raise ConfigError(f"callbacks.PanguMonitor.device: found {device!r}, wanted {' or '.join(DEVICES)}, or a line "
                          "more in pangu_ms/estimate/devices.py")
    return DEVICES[device].float32_tflops if dtype == "float32" else DEVICES[device].bfloat16_tflops
