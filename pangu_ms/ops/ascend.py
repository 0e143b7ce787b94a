"""The fused CANN forms of the small operators in `portable.py`: same arguments, same result up to rounding.

None of these, nor of those in `ascend_attention.py` and `ascend_experts.py`, has run on a device yet. They follow what
MindSpore 2.9 says of its operators. Type and shape inference of a graph that holds them passes on a host without CANN
and stops where the kernel is chosen; where the layout of an operand could be wrong, tests/ops puts what the operator's
documentation says in its place and compares with the plain form.
"""
import mindspore as ms
from mindspore import mint, ops
from mindspore.ops.auto_generate import RotaryPositionEmbedding

_ROTATE = RotaryPositionEmbedding()


def rms_norm(x, weight, eps):
    return ops.rms_norm(x, ops.cast(weight, x.dtype), eps)[0]


def softmax(x):
    return ops.softmax(x, -1)


def sigmoid(x):
    return ops.sigmoid(x)


def swiglu(gate, up):
    return ops.swiglu(ops.cat((gate, up), -1), -1)


def rotate(x, cos, sin, start):
    """The operator wants every angle twice, and all three of one dtype: float32, since angles lose too much in less."""
    end = start + 2 * cos.shape[-1]
    turned = _ROTATE(ops.cast(x[..., start:end], ms.float32), ops.cat((cos, cos), -1), ops.cat((sin, sin), -1), 0)
    parts = (ops.cast(turned, x.dtype),)
    if start > 0:
        parts = (x[..., :start],) + parts
    if end < x.shape[-1]:
        parts = parts + (x[..., end:],)
    return ops.cat(parts, -1)


def top_k(scores, k):
    """In descending order, which `sparse_flash_attention` relies on: what is masked comes last."""
    return ops.cast(mint.topk(scores, k, -1)[1], ms.int32)
