"""The values that a new model starts from (section 11)."""
import hashlib
import math

import mindspore as ms
import numpy as np
from tqdm import tqdm

from pangu_ms.architectures import tensors
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.errors import ConfigError
from pangu_ms.training.objectives.settings import DEPTH_SCALED, TINY, TrainingSettings

MHC_ALPHA = 0.01
TILE = 64  # rows and columns that one generator draws
DEPTH_SCALES = {tensors.POST_ATTENTION_NORM: 0.283, tensors.POST_MLP_NORM: 0.432}  # c_attn and c_mlp of Pangu Ultra


def initialize(causal_lm, seed, settings=TrainingSettings()):
    """Sets every parameter of the model, from `seed` alone: each number from the parameter's name and its place there.

    A rank draws what it holds, and no more memory is taken than that.

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
    known = tensors.parameters(causal_lm.config)
    if settings.post_norm_init == DEPTH_SCALED and not any(p.initial in DEPTH_SCALES for p in known.values()):
        raise ConfigError(f"pangu_training.post_norm_init: found {DEPTH_SCALED}, wanted no such key for a network "
                          "without norms behind its sublayers")
    ranks = causal_lm.ranks
    for name, parameter in tqdm(causal_lm.parameters_dict().items(), "initial values", unit="tensor", delay=2,
                                leave=False, disable=None if ranks.rank == 0 else True):
        values = initial_values(sliced(known[name], ranks.model), causal_lm.plan, settings, seed)
        parameter.set_data(ms.Tensor(values).astype(parameter.dtype))


def initial_values(part, plan, settings, seed):
    """float32 values of what a rank holds of a tensor: `part` is one of `checkpoint.layout.stacked`."""
    tensor, shape = part.parameter, part.shape
    kind = tensor.initial
    if kind == tensors.STREAM_GATES:
        streams = plan.residual.streams
        pre = np.eye(streams)[(tensor.layer.index + 1) % streams]
        return part.part_of(np.concatenate((pre, np.zeros(streams), np.eye(streams).ravel())).astype(np.float32))
    if kind == tensors.EMBEDDING:
        return _normal(part, seed, plan.hidden_size ** -0.5, cut=2)
    layers = len(plan.trunk)
    if kind in DEPTH_SCALES:
        depth_scaled = settings.post_norm_init == DEPTH_SCALED
        value = DEPTH_SCALES[kind] / math.sqrt(layers) if depth_scaled else settings.post_norm_init
        return np.full(shape, value, np.float32)
    constants = {tensors.ONE: 1.0, tensors.ZERO: 0.0, tensors.ALPHA: MHC_ALPHA}
    if kind in constants:
        return np.full(shape, constants[kind], np.float32)
    if settings.initializer == TINY:
        return _normal(part, seed, math.sqrt(1 / (2 * plan.hidden_size * layers)))
    std = settings.moe_init_std if kind in (tensors.ROUTED, tensors.ROUTED_OUTPUT) else plan.initializer_range
    if kind in (tensors.OUTPUT, tensors.ROUTED_OUTPUT):
        std /= math.sqrt(2 * layers)
    return _normal(part, seed, std)


def _normal(part, seed, std, cut=None):
    """Normal values of what a rank holds of a tensor, cut at `cut` standard deviations.

    The tensor's matrices are drawn in tiles, each by a generator of its own. So whoever holds some of a tile has the
    same numbers there, and nobody draws the tiles of others.
    """
    name = f"{seed} {part.name}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    values = np.empty((part.rows, part.columns), np.float32)
    for piece in part.slices:
        own = values[piece.at:piece.at + piece.rows]
        for row, rows, from_row in _tiles(piece.row, piece.rows):
            for column, columns, from_column in _tiles(piece.column, piece.columns):
                tile = _tile(key, (column, row, piece.member), cut)
                own[rows, columns] = tile[from_row, from_column]
    values *= std
    return values.reshape(part.shape)


def _tiles(first, length):
    """Of the tiles that `length` rows or columns from `first` on lie in: number, where there, and from where in it."""
    for number in range(first // TILE, -(-(first + length) // TILE)):
        begin, end = max(number * TILE, first), min((number + 1) * TILE, first + length)
        yield number, slice(begin - first, end - first), slice(begin - number * TILE, end - number * TILE)


def _tile(key, place, cut):
    """Standard normal values, float32 [TILE, TILE], drawn again where they lie beyond `cut`."""
    # The generator counts: its first word is for the draws of a tile, the others say which tile.
    draw = np.random.Generator(np.random.Philox(key=key, counter=np.array((0, *place), np.uint64)))
    values = draw.standard_normal((TILE, TILE), np.float32)
    while cut and (outside := np.abs(values) > cut).any():
        values[outside] = draw.standard_normal(outside.sum(), np.float32)
    return values
