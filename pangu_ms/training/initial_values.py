"""The values that a new model starts from (section 11)."""
import math

import mindspore as ms
import numpy as np

from pangu_ms.checkpoint.layout import cut, sliced
from pangu_ms.checkpoint.names import parameters
from pangu_ms.training.settings import TrainingSettings

MHC_ALPHA = 0.01


def initialize(causal_lm, seed, settings=TrainingSettings()):
    """Sets every parameter of the model, from `seed` alone: float32 draws, in the order of the parameters' names.

    Projections are normal(0, initializer_range), experts and routers normal(0, moe_init_std); those that write to the
    residual (o_proj, down_proj) are smaller by sqrt(2L) for L trunk layers, so that the sum of all layers' writes does
    not grow with L. The embedding is a truncated normal of H^-0.5, cut at two standard deviations. Norms are one, or
    post_norm_init behind a sublayer. Short convolutions are zero, their sites then pass on what they get, and so is the
    selection bias. A hyper-connection reads a little more of stream l mod N than of the others for layer l, writes to
    all streams alike, and leaves a little more of each stream in its place.
    """
    config, parallel, draw = causal_lm.config, causal_lm.parallel, np.random.default_rng(seed)
    known = parameters(config)
    for name, parameter in sorted(causal_lm.parameters_dict().items()):
        values = _values(name, known[name].shape, config, settings, draw)       # on all ranks, of which each has a part
        values = cut(values, sliced(known[name], parallel.grid, parallel.model_rank)).astype(np.float32)
        parameter.set_data(ms.Tensor(values).astype(parameter.dtype))


def _values(name, shape, config, settings, draw):
    kind = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    streams = config.mhc_num_stream
    if kind in ("post_attention_layernorm", "post_mlp_layernorm"):
        return np.full(shape, settings.post_norm_init)
    if "norm" in kind:                                                          # norm_gamma too
        return np.ones(shape)
    if kind == "e_score_correction_bias" or kind.endswith("conv"):
        return np.zeros(shape)
    if kind in ("branch_alpha", "branch_alpha_pre"):
        return np.full(shape, MHC_ALPHA)
    if kind == "branch_beta_pre":                                               # of the merge: all streams alike
        return np.zeros(shape)
    if kind == "branch_beta":
        layer = int(name.split(".")[2])
        pre = np.eye(streams)[(layer + 1) % streams]
        return np.concatenate((pre, np.zeros(streams), np.eye(streams).ravel()))
    if kind == "embed_tokens":
        return _truncated(draw, shape) * config.hidden_size ** -0.5
    routed = ".mlp.experts." in name or kind == "gate"
    std = settings.moe_init_std if routed else config.initializer_range
    if kind in ("o_proj", "down_proj"):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return draw.standard_normal(shape) * std


def _truncated(draw, shape):
    """Standard normal values, drawn again where they lie beyond two."""
    values = draw.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = draw.standard_normal(outside.sum())
    return values
