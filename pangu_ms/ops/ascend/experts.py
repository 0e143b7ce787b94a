"""The routed experts' product on fused CANN operators: the pairs of token and choice sorted by expert, one product."""
import mindspore as ms
from mindspore import ops

from pangu_ms.model import experts
from pangu_ms.model.elementary import swiglu
from pangu_ms.model.experts import expert_count, weighted_sum
from pangu_ms.model.low_rank import with_pair
from pangu_ms.shaping import arange

MOST_EXPERTS = 1024             # of the grouped product
MOST_CHOICES = 512              # of the sort


_experts_grouped = experts.experts_grouped.formula


def experts_grouped(x, ids, weights, matrices):
    """Without empty rows. Pairs whose expert is elsewhere are sorted behind all others.

    What the grouped product and its gradient leave in rows of no group is nobody's promise: both ends cut it off.
    The grouped product takes matrices [in, out] and the checkpoint's are [out, in]: each is transposed first, a
    copy of all experts. The weighted sum stays outside the fused operator, for float32.
    """
    count, k = expert_count(matrices), ids.shape[-1]
    if count > MOST_EXPERTS or k > MOST_CHOICES:
        return _experts_grouped(x, ids, weights, matrices)
    tokens = ops.reshape(x, (-1, x.shape[-1]))                              # [N, H]
    here = ops.logical_and(ids >= 0, ids < count)
    sorted_by = ops.reshape(ops.select(here, ids, ops.full_like(ids, count)), (-1, k))
    rows, places = ops.moe_token_permute(tokens, sorted_by)                 # [P, H], [P]
    of_expert = ops.expand_dims(ops.reshape(ids, (-1,)), 1) == arange(count)                        # [P, E]
    sizes = ops.cast(ops.sum(ops.cast(of_expert, ms.float32), 0), ms.int64)
    pair = ops.expand_dims(arange(rows.shape[0]), 1)                        # [P, 1]
    grouped = ops.broadcast_to(pair < ops.sum(sizes), rows.shape)
    rows = ops.select(grouped, rows, ops.zeros_like(rows))
    product = ops.partial(_product, sizes)
    inner = swiglu(with_pair(product, rows, matrices["gate"]), with_pair(product, rows, matrices["up"]))
    y = with_pair(product, inner, matrices["down"])
    y = ops.select(grouped, y, ops.zeros_like(y))
    return weighted_sum(ops.moe_token_unpermute(y, places), weights, x)


def _product(sizes, rows, matrix):
    """rows [P, I], of which sizes int64 [E] go to each expert in turn, {"weight": [E, O, I]} -> [P, O]."""
    return ops.function.math_func.gmm([rows], [ops.transpose(matrix["weight"], (0, 2, 1))], group_list=sizes,
                                      group_list_type=1)[0]
