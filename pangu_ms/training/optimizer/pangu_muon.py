"""The optimizer: Muon for the matrices, AdamW for everything else, in the groups of `groups.py`."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.architectures.tensors import parameters
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.parallel.sharded_states import ShardedStates
from pangu_ms.training.optimizer.adamw import AdamW
from pangu_ms.training.optimizer.groups import NS_COEFFICIENTS, decays, group_parameters
from pangu_ms.training.optimizer.muon import Muon
from pangu_ms.training.optimizer.sharding import WholeMatrices


class PanguMuon(nn.Optimizer):
    """`optimizer(gradients)` changes its `parameters` in place; gradients come in the order of `parameters`.

    Muon: m = momentum * m + g; the update is g + momentum * m (Nesterov), orthogonalised by Newton-Schulz steps and
    scaled by 0.2 * sqrt(larger side), so that its size is what AdamW's usually is and one learning rate serves both.
    Decay is decoupled, and left out for vectors, convolutions and sinks. Moments are float32, as are the master copies
    of parameters of another dtype.

    Args:
        params: the parameters to train, under their names in the model. `parameters` holds them in another order.
        config: of the model.
        learning_rate: a number, or a LearningRateSchedule over steps.
        weight_decay: of Muon and AdamW.
        momentum: of Muon.
        ns_coefficients: (a, b, c) of each Newton-Schulz step X <- aX + (bA + cA^2)X with A = XX^T.
        adamw_betas, adamw_eps: of AdamW.
        muon: False: AdamW for all of them.
        ranks (Ranks): of the model. Each matrix that tensor parallel ranks share is orthogonalised whole.
        shard_states: ranks that hold the same parameters share their states (ZeRO-1).

    Attributes:
        sharded (list[ShardedStates]): the groups whose states ranks share.
        sharded_names (set[str]): of the states that are shared.
        own_names (set[str]): of the parameters of this cell that hold a rank's share of them.
    """

    def __init__(self, params, config, learning_rate=1e-3, weight_decay=0.1, momentum=0.95,
                 ns_coefficients=NS_COEFFICIENTS, adamw_betas=(0.9, 0.95), adamw_eps=1e-8, muon=True, ranks=Ranks(),
                 shard_states=False):
        by_name, tensors = {parameter.name: parameter for parameter in params}, parameters(config)
        groups = group_parameters({name: p.shape for name, p in by_name.items()},
                                  {name: p.dtype for name, p in by_name.items()}, tensors, ranks, muon, shard_states)
        members = [[by_name[name] for name in names] for names in groups.values()]
        super().__init__(learning_rate, sum(members, []), 0.0)
        self.betas = tuple(adamw_betas)
        self.powers = ms.ParameterTuple([ms.Parameter(ms.Tensor(1.0, ms.float32), f"adam_beta{i}_power", False)
                                         for i in (1, 2)])
        coefficients = tuple(tuple(step) for step in ns_coefficients)
        cells = []
        for group, each in zip(groups, members):
            if group.matrix:
                _, row_pattern, axis = group.matrix
                matrices = WholeMatrices(ranks, axis) if axis else None

                def make(own, row_pattern=row_pattern, matrices=matrices):
                    return Muon(own, row_pattern, weight_decay, momentum, coefficients, matrices)
            else:
                rates = tuple(weight_decay if decays(tensors[p.name]) else 0.0 for p in each)
                if group.sharded:                                               # one array of what decays alike
                    rates = rates[:1]

                def make(own, rates=rates):
                    return AdamW(own, rates, self.betas, adamw_eps)
            if group.sharded:
                row = each[0].shape[-2:] if group.matrix else ()
                cells.append(ShardedStates(each, row, make, ranks, group.sharded[0]))
            else:
                cells.append(make(each))
        self.groups = nn.CellList(cells, auto_prefix=False)
        self.sharded = [cell for cell in cells if isinstance(cell, ShardedStates)]
        own = {parameter.name for cell in self.sharded for parameter in cell.get_parameters()}
        self.own_names = own - by_name.keys()
        self.sharded_names = {f"{kind}.{p.name}" for cell in self.sharded for kind in cell.kinds() for p in cell.params}
        ends = [sum(map(len, members[:i + 1])) for i in range(len(members))]
        self.ranges = list(zip([0, *ends], ends))

    def construct(self, gradients):
        rate = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        powers = (ops.assign(self.powers[0], self.powers[0] * self.betas[0]),
                  ops.assign(self.powers[1], self.powers[1] * self.betas[1]))
        for group, (first, end) in zip(self.groups, self.ranges):               # one after the other, on all ranks
            rate = ops.depend(rate, group(gradients[first:end], rate, powers))
        return rate

    def gathered_states(self):
        """Name -> float32 array of the states that ranks share, whole; on all ranks at once."""
        found = {}
        for cell in self.sharded:
            found |= cell.gathered()
        return found

    def set_gathered_states(self, arrays):
        """What `gathered_states` gave, of this rank's part of the model."""
        for cell in self.sharded:
            cell.set_states(arrays)
