"""The values that a new model starts from (section 11)."""
import math

import mindspore as ms
import numpy as np

from pangu_ms.architectures import tensors
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.errors import ConfigError
from pangu_ms.training.objectives.settings import DEPTH_SCALED, TINY, TrainingSettings

MHC_ALPHA = 0.01
DEPTH_SCALES = {tensors.POST_ATTENTION_NORM: 0.283, tensors.POST_MLP_NORM: 0.432}  # c_attn and c_mlp of Pangu Ultra


def initialize(causal_lm, seed, settings=TrainingSettings()):
    """Sets every parameter of the model, from `seed` alone: float32 draws, in the order of the parameters' names.

    Projections are normal(0, initializer_range), experts and routers normal(0, moe_init_std); those that write to the
    residual (o_proj, down_proj) are smaller by sqrt(2L) for L trunk layers, so that the sum of all layers' writes does
    not grow with L. The embedding is a truncated normal of H^-0.5, cut at two standard deviations. Norms are one, or
    post_norm_init behind a sublayer. Short convolutions are zero, their sites then pass on what they get, and so is the
    selection bias. A hyper-connection reads a little more of stream l mod N than of the others for layer l, writes to
    all streams alike, and leaves a little more of each stream in its place.

    Two settings are of Pangu Ultra 135B (arXiv 2504.07866, depth-scaled sandwich norm and TinyInit), for L trunk layers
    of width d. post_norm_init "depth_scaled": the norms behind attention are 0.283 / sqrt(L), those behind the
    feed-forward 0.432 / sqrt(L). initializer "tiny": all that is normal has the standard deviation sqrt(1 / (2 d L)),
    experts, routers and what writes to the residual too. The embedding stays as above.

    Raises:
        ConfigError: post_norm_init "depth_scaled", and the network has no norms behind sublayers.
    """
    known, draw = tensors.parameters(causal_lm.config), np.random.default_rng(seed)
    if settings.post_norm_init == DEPTH_SCALED and not any(p.initial in DEPTH_SCALES for p in known.values()):
        raise ConfigError(f"pangu_training.post_norm_init: found {DEPTH_SCALED}, wanted no such key for a network "
                          "without norms behind its sublayers")
    for name, parameter in sorted(causal_lm.parameters_dict().items()):
        values = initial_values(known[name], causal_lm.plan, settings, draw)   # on all ranks, of which each has a part
        values = sliced(known[name], causal_lm.ranks.model).part_of(values).astype(np.float32)
        parameter.set_data(ms.Tensor(values).astype(parameter.dtype))


def initial_values(tensor, plan, settings, draw):
    """float64 values of one of the tensors of a plan, drawn from the generator `draw`."""
    kind, shape = tensor.initial, tensor.shape
    if kind == tensors.STREAM_GATES:
        streams = plan.residual.streams
        pre = np.eye(streams)[(tensor.layer.index + 1) % streams]
        return np.concatenate((pre, np.zeros(streams), np.eye(streams).ravel()))
    if kind == tensors.EMBEDDING:
        return _truncated(draw, shape) * plan.hidden_size ** -0.5
    layers = len(plan.trunk)
    if kind in DEPTH_SCALES:
        depth_scaled = settings.post_norm_init == DEPTH_SCALED
        return np.full(shape, DEPTH_SCALES[kind] / math.sqrt(layers) if depth_scaled else settings.post_norm_init)
    constants = {tensors.ONE: 1.0, tensors.ZERO: 0.0, tensors.ALPHA: MHC_ALPHA}
    if kind in constants:
        return np.full(shape, constants[kind])
    if settings.initializer == TINY:
        return draw.standard_normal(shape) * math.sqrt(1 / (2 * plan.hidden_size * layers))
    std = settings.moe_init_std if kind in (tensors.ROUTED, tensors.ROUTED_OUTPUT) else plan.initializer_range
    if kind in (tensors.OUTPUT, tensors.ROUTED_OUTPUT):
        std /= math.sqrt(2 * layers)
    return draw.standard_normal(shape) * std


def _truncated(draw, shape):
    """Standard normal values, drawn again where they lie beyond two."""
    values = draw.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = draw.standard_normal(outside.sum())
    return values
