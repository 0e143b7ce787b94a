"""Puts the low-rank pairs of an adapter beside the matrices of a network."""
import functools

import mindspore as ms
import numpy as np
from mindspore import nn

from pangu_ms.model.linear import without_bias

DROPOUT_CALL = "lora_dropout_call"  # a parameter that a resumed run needs besides the pairs, see `low_rank.dropped`


class Factor(nn.Cell):
    """A or B of one pair, or of all experts' pairs of a layer: `weight`, in the dtype of the frozen matrix."""

    def __init__(self, shape, dtype):
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.zeros(shape), dtype))
        self.matrix = {"weight": self.weight}


def attach(causal_lm, shapes, scale, dropout, seed):
    """Beside the frozen matrices come pairs, of which A is drawn as by PEFT, uniform up to I^-0.5, and B is zero.

    The handles of the matrices change where they stand, so every formula that was given one sees its pair.

    Args:
        causal_lm (CausalLM): of which no graph is compiled yet.
        shapes: name -> shape, of A and B of each module in turn: MODULE.lora_A.weight, MODULE.lora_B.weight.
        scale: of the pairs' products.
        dropout: share of a matrix's inputs that its pair does not see in training.
        seed: of A.
    """
    cells, names = dict(causal_lm.cells_and_names()), list(shapes)
    causal_lm.dropout_call = None
    if dropout > 0:
        causal_lm.dropout_call = ms.Parameter(ms.Tensor([0], ms.int32), DROPOUT_CALL, requires_grad=False)
    draw, first = np.random.default_rng(seed), causal_lm.ranks.rank * len(names)            # each rank drops by itself
    for salt, (down, up) in enumerate(zip(names[::2], names[1::2])):
        cell = cells[down.removesuffix(".lora_A.weight")]
        matrix = without_bias(cell.matrix)
        frozen, dtype = dict(matrix), matrix["weight"].dtype
        cell.lora_A, cell.lora_B = Factor(shapes[down], dtype), Factor(shapes[up], dtype)
        for factor, name in ((cell.lora_A, down), (cell.lora_B, up)):           # cells add their own name in front
            factor.matrix["weight"].name = name
        bound = shapes[down][-1] ** -0.5
        values = draw.uniform(-bound, bound, shapes[down]).astype(np.float32)
        cell.lora_A.matrix["weight"].set_data(ms.Tensor(values).astype(dtype))
        matrix.clear()
        matrix |= {"frozen": frozen, "lora_A": cell.lora_A.matrix, "lora_B": cell.lora_B.matrix, "scale": scale,
                   "dropout": None}
        if dropout > 0:
            matrix["dropout"] = {"rate": dropout, "call": causal_lm.dropout_call, "salt": first + salt}


def dropping(step):
    """Decorates a method of a cell with a `causal_lm` that computes gradients: pairs drop, each time other values."""
    @functools.wraps(step)
    def numbered(self, *batch):
        call = getattr(self.causal_lm, "dropout_call", None)
        if call is None:
            return step(self, *batch)
        number = abs(call.asnumpy().item()) + 1
        call.set_data(ms.Tensor([number], ms.int32))
        try:
            return step(self, *batch)
        finally:
            call.set_data(ms.Tensor([-number], ms.int32))
    return numbered
