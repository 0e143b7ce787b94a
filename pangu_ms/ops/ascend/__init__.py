"""What an Ascend computes in place of formulas: fused CANN operators.

None of these has run on a device yet. They follow what MindSpore 2.9 says of its operators. Type and shape inference of
a graph that holds them passes on a host without CANN and stops where the kernel is chosen; where the layout of an
operand could be wrong, tests/ops puts what the operator's documentation says in its place and compares with the
formula.
"""
from pangu_ms.model.cross_entropy import streamed_cross_entropy as cross_entropy
from pangu_ms.ops.ascend.attention import (
    expanded_attention, gathers_no_rows, grouped_attention, sparse_attention, topk_indices,
)
from pangu_ms.ops.ascend.elementary import apply_rope, rms_norm, sigmoid, softmax, swiglu, top_k
from pangu_ms.ops.ascend.experts import experts_grouped

__all__ = ["apply_rope", "available", "cross_entropy", "expanded_attention", "experts_grouped", "gathers_no_rows",
           "grouped_attention", "rms_norm", "sigmoid", "softmax", "sparse_attention", "swiglu", "top_k", "topk_indices"]


def available(dtype):
    """In every dtype: what an operator does not take, it gives to the formula."""
    return True
