"""The routed experts, y[n] = sum over k of weight[n, k] * expert[id[n, k]](x[n]), and their layer (section 7).

`experts_gathered` and `experts_grouped` are two forms of one function, both exact for every routing: nothing is
dropped, however skewed the load. Of a choice whose id is not one of the E here, an expert of another rank, there is
nothing to add.

    x [..., H], ids int32 [..., K], weights float32 [..., K], matrices gate and up [E, F, H], down [E, H, F] -> [..., H]
"""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.device import replaceable
from pangu_ms.model.elementary import swiglu
from pangu_ms.model.feed_forward import FeedForward, feed_forward
from pangu_ms.model.linear import Linear, dense_weight, parameter
from pangu_ms.model.low_rank import with_pair
from pangu_ms.model.pieces import BLOCK
from pangu_ms.model.router import route
from pangu_ms.parallel import collectives
from pangu_ms.shaping import arange


@replaceable
def moe(x, router, experts, shared, decode):
    """Routed and shared experts of x [B, T, H] together, where one rank holds them all -> y, the routing of `route`.

    decode: few tokens. The routing of a decoding step may lack its logits.
    """
    routing = route(x, router)
    product = experts_gathered if decode else experts_grouped
    return product(x, routing["ids"], routing["weights"], experts) + feed_forward(x, shared), routing


@replaceable
def experts_gathered(x, ids, weights, matrices):
    """For few tokens: each (token, choice) pair gathers its expert. Moves N * K experts' weights."""
    k = ids.shape[-1]
    ids, weights = _of_these(ids, weights, expert_count(matrices))
    rows = ops.tile(ops.reshape(x, (-1, 1, x.shape[-1])), (1, k, 1))            # [N, K, H], N tokens
    rows = ops.reshape(rows, (-1, 1, x.shape[-1]))                              # [P, 1, H], P pairs of token and choice
    return weighted_sum(_by_matrix(rows, ops.reshape(ids, (-1,)), matrices), weights, x)


@replaceable
def experts_grouped(x, ids, weights, matrices):
    """For prefill and training: pairs sorted by expert into blocks of BLOCK rows, each block with one expert.

    An expert with c tokens fills ceil(c / BLOCK) blocks; empty rows compute on a zero token. Moves one expert's
    weights for each block, of which there are at most P / BLOCK + E.
    """
    k = ids.shape[-1]
    tokens = ops.reshape(x, (-1, x.shape[-1]))                                  # [N, H]
    n = tokens.shape[0]
    count = expert_count(matrices)
    ids, weights = _of_these(ids, weights, count)
    chosen = ops.reshape(ids, (-1,))                                            # [P]
    pairs = chosen.shape[0]
    blocks = (pairs + BLOCK - 1) // BLOCK + count
    # Where each pair goes: its expert's first row plus the number of earlier pairs of that expert.
    of_expert = ops.cast(ops.expand_dims(chosen, 1) == arange(count), ms.float32)                      # [P, E]
    before = ops.cumsum(of_expert, 0) - of_expert
    load = ops.cast(ops.sum(of_expert, 0), ms.int32)                            # [E]
    end = ops.cumsum((load + BLOCK - 1) // BLOCK, 0)                            # [E], in blocks
    first = (end - (load + BLOCK - 1) // BLOCK) * BLOCK                         # [E], in rows
    rank = ops.cast(ops.sum(before * of_expert, 1), ms.int32)                   # [P]
    row = ops.gather(first, chosen, 0) + rank                                   # [P]
    ended = ops.cast(ops.expand_dims(arange(blocks), 1) >= end, ms.int32)                      # [blocks, E]
    expert = ops.minimum(ops.sum(ended, 1), count - 1)
    # Row -> token; rows that no pair fills read the zero token at the end.
    token = arange(pairs) // k
    source = ops.tensor_scatter_update(ops.full((blocks * BLOCK,), n, dtype=ms.int32), ops.expand_dims(row, 1),
                                       ops.cast(token, ms.int32))
    padded = ops.cat((tokens, ops.zeros((1, x.shape[-1]), x.dtype)), 0)         # [N + 1, H]
    rows = ops.reshape(ops.gather(padded, source, 0), (-1, BLOCK, x.shape[-1]))  # [blocks, BLOCK, H]
    y = _by_matrix(rows, expert, matrices)
    y = ops.gather(ops.reshape(y, (-1, x.shape[-1])), row, 0)                   # [P, H]
    return weighted_sum(y, weights, x)


def expert_count(matrices):
    return dense_weight(matrices["gate"]).shape[0]


def _of_these(ids, weights, count):
    """Choices of experts that are not here become choices of the first one, with no weight."""
    here = ops.logical_and(ids >= 0, ids < count)
    return ops.select(here, ids, ops.zeros_like(ids)), ops.select(here, weights, ops.zeros_like(weights))


def _by_matrix(rows, expert, matrices):
    """rows [G, M, H] through one expert each, expert int32 [G] -> [G, M, H]."""
    product = ops.partial(_product, expert)
    inner = swiglu(with_pair(product, rows, matrices["gate"]), with_pair(product, rows, matrices["up"]))
    return with_pair(product, inner, matrices["down"])


def _product(expert, rows, matrix):
    """rows [G, M, I], each G by its matrix of {"weight": [E, O, I]} -> [G, M, O]."""
    return ops.BatchMatMul(transpose_b=True)(rows, ops.gather(matrix["weight"], expert, 0))


def weighted_sum(y, weights, x):
    """y [P, ..., H], weights [..., K] -> shaped like x [..., H], summed in float32."""
    k = weights.shape[-1]
    y = ops.cast(ops.reshape(y, (-1, k, y.shape[-1])), ms.float32)
    total = ops.sum(y * ops.reshape(weights, (-1, k, 1)), 1)
    return ops.cast(ops.reshape(total, x.shape), x.dtype)


class Stack(nn.Cell):
    """One matrix for each expert, stacked: weight [E, O, I]."""

    def __init__(self, experts, in_features, out_features, plan):
        super().__init__()
        self.weight = parameter((experts, out_features, in_features), plan)
        self.matrix = {"weight": self.weight}


class Experts(nn.Cell):
    """The experts of this rank: what a token has chosen elsewhere comes from there, in the sum over the ranks.

    Where it takes one expert of each group, a rank has whole groups, and as many choices of every token as groups:
    the same number of rows on all ranks, whatever the routing.
    """

    def __init__(self, moe, plan, ranks):
        super().__init__()
        count, width = moe.num_experts // ranks.expert, moe.intermediate_size // ranks.tensor
        self.first, self.sharded = ranks.expert_rank * count, ranks.expert > 1
        self.choices = moe.groups // ranks.expert if moe.groups else moe.experts_per_token     # that may lie here
        self.first_choice = ranks.expert_rank * self.choices if moe.groups else 0
        self.dispatch, self.combine = collectives.dispatch_and_combine(ranks)
        self.gate_proj = Stack(count, plan.hidden_size, width, plan)
        self.up_proj = Stack(count, plan.hidden_size, width, plan)
        self.down_proj = Stack(count, width, plan.hidden_size, plan)
        self.matrices = {"gate": self.gate_proj.matrix, "up": self.up_proj.matrix, "down": self.down_proj.matrix}

    def construct(self, x, ids, weights):
        if self.sharded:
            x, weights = self.dispatch(x), self.dispatch(weights)
            ids = ops.cast(self.dispatch(ops.cast(ids, ms.float32)), ms.int32) - self.first     # a message is float
            ids, weights = (ops.narrow(each, -1, self.first_choice, self.choices) for each in (ids, weights))
        return self.combine(experts_grouped(x, ids, weights, self.matrices))


class MoELayer(nn.Cell):
    """x [B, T, H] -> y [B, T, H], and the routing."""

    def __init__(self, moe, plan, ranks):
        super().__init__()
        self.gate = Linear(plan.hidden_size, moe.num_experts, plan, ms.float32)
        bias, factor = ms.Tensor([0.0] * moe.num_experts, ms.float32), None
        if moe.selection_bias:
            bias = self.e_score_correction_bias = parameter((moe.num_experts,), plan, ms.float32, "zeros")
        if moe.router_scale:
            factor = self.router_scale = parameter((1, moe.num_experts), plan, ms.float32, "ones")
        scale = ms.Tensor([moe.scale] * moe.experts_per_token, ms.float32)                  # by choice
        self.router = {"gate": self.gate.matrix, "bias": bias, "scale": scale, "normalise": moe.normalise,
                       "scoring": moe.scoring, "grouped": moe.groups is not None, "factor": factor,
                       "kept": None}                                            # for `route`
        self.decoding_router = self.router | {"kept": moe.decoding_experts_per_group}
        self.experts = Experts(moe, plan, ranks)
        shared = FeedForward(moe.shared_intermediate_size, plan, ranks)
        setattr(self, moe.shared_name, shared)                                  # the release's name
        self.shared = shared.matrices
        self.copy, self.reduce = collectives.copy(ranks, "tensor"), collectives.reduce(ranks, "tensor")
        self.alone, self.together = ranks.model.count == 1, ranks.expert == 1

    def construct(self, x, step):
        decode = step["decode"]
        router = self.decoding_router if decode else self.router
        if self.alone or decode and self.together:                              # which has no gradients to sum
            y, routing = moe(x, router, self.experts.matrices, self.shared, decode)
            return self.reduce(y), routing
        routing = route(x, router)
        seen, weights = self.copy(x), self.copy(routing["weights"])
        return self.reduce(self.experts(seen, routing["ids"], weights) + feed_forward(seen, self.shared)), routing
