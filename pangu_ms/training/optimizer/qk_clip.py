"""QK-clip: heads whose attention logits have grown too large get smaller query and key weights (arXiv:2507.20534).

After an optimizer step each head whose largest logit S in the forward was above the threshold has its logits scaled by
gamma = threshold / S, through the weights that they are products of:

- Latent attention: the rows of `q_b_proj` and `kv_b_proj` that make a head's queries and keys without position take
  sqrt(gamma) each. The rotary part of the keys is shared by all heads and stays; that of the queries takes all of
  gamma. Values stay.
- Grouped queries: a key head serves several query heads and is to them what the shared rotary part is above. So it
  stays, and a query head's rows, those of its bias too, take all of gamma: heads of one group do not change each other,
  and a norm of keys, which would undo smaller rows, does not matter. Where each query head has a key head of its own,
  neither normed nor beside sinks, both take sqrt(gamma).

Behind these rows there is no convolution and no norm, and a rotation is linear, so logits scale exactly. Sinks are
keys: those of latent attention come through `kv_b_proj`, those of grouped queries meet the same queries, and their
logits scale like all others. Moments stay as they are.
"""
import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.architectures.tensors import layer_prefix
from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import LatentAttention
from pangu_ms.parallel import collectives
from pangu_ms.parallel.sharded_states import ShardedStates
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.optimizer.states import write_back

KEY = "pangu_training.qk_clip_threshold"
STAYS, ROOT, ALL = 0, 1, 2  # what a row is multiplied by: 1, sqrt(gamma), gamma


class QKClip(nn.Cell):
    """`clip(largest)`, behind the update of a step, makes rows smaller -> what it has written.

    largest: float32 [L, heads], the largest logits of `layers` and of all heads, whatever this rank has of them.

    Args:
        threshold: of logits.
        layers: of the plan.
        optimizer: whose master copies are scaled with the parameters. Of a shard of them this rank scales its own;
            16-bit parameters are then scaled by themselves, and rounded once more until the next update.
        ranks: of the model.

    Raises:
        ConfigError: the optimizer is no PanguMuon, or leaves alone what would have to be scaled.
    """

    def __init__(self, threshold, layers, optimizer, ranks):
        super().__init__(auto_prefix=False)
        if not isinstance(optimizer, PanguMuon):
            raise ConfigError(f"{KEY}: found {threshold} with the optimizer {type(optimizer).__name__}, which may keep "
                              "copies of what is scaled; take PanguMuon, or 0")
        rows = factor_places(layers, ranks)
        trained = {parameter.name for parameter in optimizer.parameters}
        if frozen := [name for name in rows if name not in trained]:
            raise ConfigError(f"{KEY}: found {threshold}, but {frozen[0]} is not trained, which it would scale; take 0")
        masters, params, others = [], [], []
        for group in optimizer.groups:
            known = [i for i, parameter in enumerate(group.params) if parameter.name in rows]
            if not known:
                continue
            if isinstance(group, ShardedStates):
                others += [(group.params[i], rows[group.params[i].name]) for i in known]
                others.append((group.states["part"], _places_of_shard(group, rows)))
            else:
                masters += [(group.masters[i], rows[group.params[i].name]) for i in known]
                params += [group.params[i] for i in known]
        self.params, self.count = ms.ParameterTuple(params), len(masters)
        arrays, places = zip(*masters, *others)
        self.arrays = ms.ParameterTuple(arrays)
        self.places = tuple(ms.Tensor(each, ms.int32) for each in places)
        self.threshold, self.each = threshold, ops.Map()

    def construct(self, largest):
        # Selected, for a quotient of equal numbers need not be 1: it may be computed by a reciprocal.
        gamma = ops.select(largest > self.threshold, self.threshold / largest, ops.ones_like(largest))
        gamma = ops.reshape(gamma, (-1,))
        factors = ops.cat((ops.ones((1,), ms.float32), ops.sqrt(gamma), gamma))
        scaled = self.each(ops.partial(_scale_rows, factors), self.arrays, self.places)
        return scaled, self.each(write_back, self.params, scaled[:self.count])


def _scale_rows(factors, array, places):
    """array [rows, ...] times the factors at places int32 [rows]; a shard has both by matrix too."""
    factor = ops.reshape(ops.gather(factors, places, 0), places.shape + (1,) * (array.ndim - places.ndim))
    return ops.assign(array, ops.cast(ops.cast(array, ms.float32) * factor, array.dtype))


def _places_of_shard(group, rows):
    """Of this rank's part of what a `ShardedStates` updates: int32 [count, rows of a matrix], or of numbers [count]."""
    found = np.zeros((group.length, *group.row[:1]), np.int32)
    for parameter, start, size in zip(group.params, group.starts, group.sizes):
        if parameter.name in rows:
            each = np.repeat(rows[parameter.name], 1 if group.row else math.prod(parameter.shape[1:]))
            found[start:start + size] = each.reshape(size, *group.row[:1])
    return found[group.first:group.first + group.count]


def factor_places(layers, ranks):
    """Name of a parameter that is scaled -> int32 [rows on this rank]: which factor a row takes.

    The factors are 1, then the roots of [L, heads], then the gammas themselves.
    """
    found = {}
    for place, layer in enumerate(layers):
        count = layer.attention.num_heads
        for name, (heads, kinds) in clipped_rows(layer.attention, ranks).items():
            number = 1 + place * count + heads + (kinds - ROOT) * len(layers) * count
            found[layer_prefix(layer.index) + name] = np.where(kinds == STAYS, 0, number).astype(np.int32)
    return found


def clipped_rows(attention, ranks):
    """The rule: name below a layer -> for each row on this rank (its head's number, STAYS | ROOT | ALL)."""
    heads = attention.num_heads // ranks.tensor
    first = ranks.tensor_rank * heads

    def rows(count, *parts):
        """Of `count` heads, each of which has the rows of all parts, (number, kind), in turn."""
        kinds = np.repeat([kind for _, kind in parts], [number for number, _ in parts])
        return np.repeat(first + np.arange(count), kinds.size), np.tile(kinds, count)

    if isinstance(attention, LatentAttention):
        nope = attention.qk_nope_head_dim
        return {"self_attn.q_b_proj.weight": rows(heads, (nope, ROOT), (attention.qk_rope_head_dim, ALL)),
                "self_attn.kv_b_proj.weight": rows(heads, (nope, ROOT), (attention.v_head_dim, STAYS))}
    groups, width = attention.num_kv_heads // ranks.tensor, attention.head_dim
    own_keys = groups == heads and not attention.key_norm and not attention.sinks
    query, key = rows(heads, (width, ROOT if own_keys else ALL)), rows(groups, (width, ROOT if own_keys else STAYS))
    if attention.fused:
        found = {"qkv": [np.concatenate(each) for each in zip(query, key, rows(groups, (attention.v_head_dim, STAYS)))]}
    else:
        found = {"q": query} | ({"k": key} if own_keys else {})
    ends = ("weight", "bias") if attention.bias else ("weight",)
    return {f"self_attn.{name}_proj.{end}": each for name, each in found.items() for end in ends}


class LargestOfRanks(nn.Cell):
    """float32 [L, heads of this rank] -> [L, heads], the largest of all ranks' sequences."""

    def __init__(self, ranks):
        super().__init__()
        self.sequences = collectives.all_gather(ranks, "batch") if ranks.batch > 1 else nn.Identity()
        self.heads = collectives.gather_columns(ranks)

    def construct(self, largest):
        largest = ops.ReduceMax(True)(self.sequences(ops.expand_dims(largest, 0)), 0)           # [1, L, heads of ranks]
        return self.heads(largest)[0]
