"""Elementary formulas on fused CANN operators: same arguments, same result up to rounding."""
import mindspore as ms
from mindspore import mint, ops
from mindspore.ops.auto_generate import RotaryPositionEmbedding

_ROTATE = RotaryPositionEmbedding()


def rms_norm(x, norm):
    return ops.rms_norm(x, ops.cast(norm["weight"], x.dtype), norm["eps"])[0]


def softmax(x):
    return ops.softmax(x, -1)


def sigmoid(x):
    return ops.sigmoid(x)


def swiglu(gate, up):
    return ops.swiglu(ops.cat((gate, up), -1), -1)


def apply_rope(x, cos, sin, start):
    """The operator wants every angle twice, and all three of one dtype: float32, since angles lose too much in less."""
    end = start + 2 * cos.shape[-1]
    rotated = _ROTATE(ops.cast(x[..., start:end], ms.float32), ops.cat((cos, cos), -1), ops.cat((sin, sin), -1), 0)
    parts = (ops.cast(rotated, x.dtype),)
    if start > 0:
        parts = (x[..., :start],) + parts
    if end < x.shape[-1]:
        parts = parts + (x[..., end:],)
    return ops.cat(parts, -1)


def top_k(scores, k):
    """In descending order, which `sparse_flash_attention` relies on: what is masked comes last."""
    return ops.cast(mint.topk(scores, k, -1)[1], ms.int32)
