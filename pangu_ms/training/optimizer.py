"""Muon for the matrices, AdamW for everything else.

Public training code names Muon but not its settings, so the choices are ours. Which rows of a projection make one
matrix follows MindFormers' Muon (core/optim/muon.py): each expert by itself with gate and up apart, the nope rows of
all heads and the rope rows of all heads of q_b_proj, the latent rows and the rope rows of kv_a_proj_with_mqa, the key
rows and the value rows of all heads of kv_b_proj. MindFormers' own cannot be used: it updates the router and the
hyper-connections as matrices too, and wants Megatron's parameter names. Attention logits are not clipped (QK-clip):
they never leave the attention operator, whose fused forms do not give them out.
"""
import functools
from collections import Counter

import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.parallel import Parallel
from pangu_ms.training.divided import Divided
from pangu_ms.training.parallel import Matrices, divided_axes, expert_names
from pangu_ms.training.updates import AdamW, Muon

ADAMW = ("embed_tokens", "lm_head", "gate", "phi")  # two-dimensional, yet no map between hidden vectors of one layer
STACKED = 2 ** 28  # values of equal parameters that are updated at once, or one parameter
NS_COEFFICIENTS = ((3.4445, -4.775, 2.0315),) * 5


def matrix_rows(name, shape, config):
    """How Muon sees a parameter: (periods, (rows, ...)), or None for AdamW.

    The rows of a two-dimensional parameter are `periods` times the pattern of sizes; what stands at one place of the
    pattern, over all periods, is one matrix. Three-dimensional ones hold one matrix for each expert.
    """
    kind = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    if "sink" in kind or "conv" in kind or kind in ADAMW or len(shape) < 2:
        return None
    if kind == "q_b_proj":
        return config.num_attention_heads, (config.qk_nope_head_dim, config.qk_rope_head_dim)
    if kind == "kv_a_proj_with_mqa":
        return 1, (config.kv_lora_rank, config.qk_rope_head_dim)
    if kind == "kv_b_proj":
        return config.num_attention_heads, (config.qk_nope_head_dim, config.v_head_dim)
    return 1, (shape[-2],)


class PanguMuon(nn.Optimizer):
    """`optimizer(gradients)` changes its `parameters` in place; gradients come in the order of `parameters`.

    Muon: m = momentum * m + g; the update is g + momentum * m (Nesterov), orthogonalised by Newton-Schulz steps and
    scaled by 0.2 * sqrt(larger side), so that its size is what AdamW's usually is and one learning rate serves both.
    Decay is decoupled, and left out for vectors, convolutions and sinks. Moments are float32, as are the master copies
    of parameters of another dtype.

    Args:
        params: the parameters to train, under their names in the model. `parameters` holds them in another order.
        config: the `PanguConfig` of the model.
        learning_rate: a number, or a LearningRateSchedule over steps.
        weight_decay: of Muon and AdamW.
        momentum: of Muon.
        ns_coefficients: (a, b, c) of each Newton-Schulz step X <- aX + (bA + cA^2)X with A = XX^T.
        adamw_betas, adamw_eps: of AdamW.
        muon: False: AdamW for all of them.
        parallel (Parallel): of the model. Each matrix that tensor parallel ranks divide is orthogonalised whole.
        divide_states: ranks that hold the same parameters divide their states among them.
    """

    def __init__(self, params, config, learning_rate=1e-3, weight_decay=0.1, momentum=0.95,
                 ns_coefficients=NS_COEFFICIENTS, adamw_betas=(0.9, 0.95), adamw_eps=1e-8, muon=True,
                 parallel=Parallel(), divide_states=False):
        axes, experts = divided_axes(config) if parallel.tensor > 1 else {}, expert_names(config)
        groups, counts = {}, Counter()                                          # of what is updated at once
        for parameter in params:
            rows = matrix_rows(parameter.name, parameter.shape, config) if muon else None
            matrices = rows and (parameter.shape, rows, axes.get(parameter.name))               # None: AdamW
            alike = "data" if parameter.name in experts else "batch"            # the ranks that hold it
            ranks = parallel.size(alike) if divide_states else 1
            kind = matrices, (alike, parameter.dtype, _decayed(parameter)) if ranks > 1 else None
            at_once = max(1, STACKED // (ranks * parameter.size)) * ranks if matrices else len(params)
            groups.setdefault((*kind, counts[kind] // at_once), []).append(parameter)
            counts[kind] += 1
        super().__init__(learning_rate, sum(groups.values(), []), 0.0)
        self.betas = tuple(adamw_betas)
        self.powers = ms.ParameterTuple([ms.Parameter(ms.Tensor(1.0, ms.float32), f"adam_beta{i}_power", False)
                                         for i in (1, 2)])
        coefficients = tuple(tuple(step) for step in ns_coefficients)
        cells = []
        for (matrices, divided, _), members in groups.items():
            if matrices:
                _, rows, axis = matrices
                make = functools.partial(Muon, rows=rows, decay=weight_decay, momentum=momentum,
                                         coefficients=coefficients, matrices=Matrices(parallel, axis) if axis else None)
            else:
                decays = tuple(weight_decay if _decayed(p) else 0.0 for p in members)
                make = functools.partial(AdamW, decays=decays[:1] if divided else decays, betas=self.betas,
                                         eps=adamw_eps)
            row = members[0].shape[-2:] if matrices else ()
            cells.append(Divided(members, row, make, parallel, divided[0]) if divided else make(members))
        self.groups = nn.CellList(cells, auto_prefix=False)
        self.divided = [cell for cell in cells if isinstance(cell, Divided)]
        parts = {parameter.name for cell in self.divided for parameter in cell.get_parameters()}
        self.parts = parts - {parameter.name for parameter in params}           # names of what holds divided states
        self.divided_names = {f"{kind}.{p.name}" for cell in self.divided for kind in cell.kinds() for p in cell.params}
        sizes = [len(members) for members in groups.values()]
        self.ranges = [(sum(sizes[:i]), sum(sizes[:i + 1])) for i in range(len(sizes))]

    def construct(self, gradients):
        rate = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        powers = (ops.assign(self.powers[0], self.powers[0] * self.betas[0]),
                  ops.assign(self.powers[1], self.powers[1] * self.betas[1]))
        for group, (first, end) in zip(self.groups, self.ranges):               # one after the other, on all ranks
            rate = ops.depend(rate, group(gradients[first:end], rate, powers))
        return rate

    def divided_states(self):
        """Name -> float32 array of the divided states, whole; on all ranks at once."""
        found = {}
        for cell in self.divided:
            found |= cell.whole_states()
        return found

    def set_divided_states(self, arrays):
        """What `divided_states` gave, of this rank's part of the model."""
        for cell in self.divided:
            cell.set_states(arrays)


def _decayed(parameter):
    return len(parameter.shape) > 1 and "sink" not in parameter.name and "conv" not in parameter.name
