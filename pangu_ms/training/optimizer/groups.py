"""Which parameters an optimizer updates together: by Muon those that are alike, by AdamW all others.

Public training code names Muon but not its settings, so the choices are ours. Which rows of a projection make one
matrix follows MindFormers' Muon (core/optim/muon.py): each expert by itself with gate and up apart, and of a projection
to several parts each part over all heads (`tensors.Parameter.row_pattern`). MindFormers' own cannot be used: it updates
the router and the hyper-connections as matrices too, and wants Megatron's parameter names. Needs no MindSpore.
"""
import math
from collections import Counter
from typing import NamedTuple

from pangu_ms.architectures.tensors import Parameter
from pangu_ms.parallel.ranks import Ranks

STACKED = 2 ** 28  # values of equal matrices that are orthogonalised at once, or one parameter
NS_COEFFICIENTS = ((3.4445, -4.775, 2.0315),) * 5  # (a, b, c) of each Newton-Schulz step, see `muon.orthogonalise`


class Group(NamedTuple):
    """What parameters that are updated together have in common.

    Attributes:
        matrix: for Muon (shape on this rank, row pattern of what tensor ranks hold together, axis along which they cut
            it, or None); None: AdamW.
        sharded: where ranks that hold the same parameters share their states (the dimension of those ranks, dtype,
            whether they decay); None: every rank keeps the states of all that it holds.
        number: of the groups that are alike but for this.
    """

    matrix: tuple | None
    sharded: tuple | None
    number: int


def group_parameters(shapes, dtypes, tensors: dict[str, Parameter], ranks: Ranks, muon: bool,
                     shard_states: bool) -> dict[Group, list[str]]:
    """The names of `shapes` by group, in their order.

    Args:
        shapes: name -> shape on this rank.
        dtypes: name -> dtype.
        tensors: of the whole model.
        muon: False: AdamW for all of them.
        shard_states: ranks that hold the same parameters share their states.
    """
    groups, counts = {}, Counter()
    for name, shape in shapes.items():
        tensor, matrix, sharded = tensors[name], None, None
        if muon and tensor.is_matrix:
            split = tensor.split_over("tensor") if ranks.tensor > 1 else None
            parts = ranks.tensor if split and split.axis == "rows" else 1
            matrix = shape, tensor.joined_pattern(parts), split and split.axis
        holders = holders_of(tensor)
        holding = ranks.size(holders) if shard_states else 1
        if holding > 1:
            sharded = holders, dtypes[name], decays(tensor)
        kind = matrix, sharded
        at_once = most_at_once(math.prod(shape), holding) if matrix else len(shapes)
        groups.setdefault(Group(*kind, counts[kind] // at_once), []).append(name)
        counts[kind] += 1
    return groups


def holders_of(tensor: Parameter) -> str:
    """The dimension of the ranks that hold the same values of a parameter."""
    return "data" if tensor.split_over("expert") else "batch"


def most_at_once(size: int, holding: int) -> int:
    """How many matrices of `size` values are stacked at once, where `holding` ranks share them."""
    return max(1, STACKED // (holding * size)) * holding


def decays(tensor: Parameter) -> bool:
    """Weight decay is left out for vectors, convolutions and sinks."""
    return min(tensor.rows, tensor.columns) > 1 and tensor.component not in ("sink", "convolution")
