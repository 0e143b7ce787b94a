"""The optimizer's states and operations on one rank, by the groups that it makes of the parameters."""
import math

from pangu_ms.estimate.work import Case
from pangu_ms.training.optimizer.groups import NS_COEFFICIENTS, Group


def units(case: Case, group: Group, names: list[str]) -> int:
    """What the rank holds of a group: matrices, an expert's each by itself, of AdamW's groups values."""
    return sum(math.prod(case.shapes[name][:-2] if group.matrix else case.shapes[name]) for name in names)


def kept(case: Case, group: Group, names: list[str]) -> int:
    """Of those, how many it keeps the states of: ranks that share them take equally many."""
    return -(-units(case, group, names) // (case.ranks.size(group.sharded[0]) if group.sharded else 1))


def share(case: Case, group: Group, names: list[str]) -> float:
    return kept(case, group, names) / units(case, group, names)


def state_bytes(case: Case) -> dict[str, float]:
    """Float32 states: a master copy where the parameter is not float32, one moment for Muon's, two for AdamW's.

    Where ranks share them, float32 parameters have masters as well.
    """
    found = {"masters": 0.0, "muon_moments": 0.0, "adamw_moments": 0.0}
    for group, names in case.groups.items():
        part = share(case, group, names)
        for name in names:
            size = 4 * case.counts[name] * part
            found["muon_moments" if group.matrix else "adamw_moments"] += size * (1 if group.matrix else 2)
            if group.sharded or case.bytes[name] < 4 * case.counts[name]:
                found["masters"] += size
    return found


def work_bytes(case: Case) -> float:
    """Three float32 copies while Muon orthogonalises a group: the update, its powers' sum, their product.

    Ranks that share the states stack the gradients of all, and keep their share of that.
    """
    def of_group(group, names):
        values = sum(case.counts[name] for name in names)
        return 12 * share(case, group, names) * values + (values * case.width if group.sharded else 0)
    return max((of_group(group, names) for group, names in case.groups.items() if group.matrix), default=0.0)


def update_flops(case: Case) -> float:
    """Muon's Newton-Schulz steps, all float32.

    A step on a matrix with sides m <= n takes XX^T (2m^2 n), its square (2m^3) and the product with X (2m^2 n). Tensor
    ranks that share matrices take equally many of those that are kept.
    """
    total = 0.0
    for group, names in case.groups.items():
        if group.matrix:
            _, (periods, sizes), axis = group.matrix
            whole = -(-kept(case, group, names) // (case.ranks.tensor if axis else 1))
            for size in sizes:
                m, n = sorted((periods * size, case.tensors[names[0]].columns))
                total += whole * len(NS_COEFFICIENTS) * (4 * m * m * n + 2 * m ** 3)
    return total
