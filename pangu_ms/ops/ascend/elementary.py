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


def apply_rope(x, rope, start):
    """The operator wants an angle for each dimension, and all three of one dtype: float32, since angles lose too much
    in less. Its mode is 0 for halves and 1 for interleaved pairs."""
    end, interleaved = start + 2 * rope["cos"].shape[-1], rope["interleaved"]
    cos, sin = _of_both(rope["cos"], interleaved), _of_both(rope["sin"], interleaved)
    rotated = _ROTATE(ops.cast(x[..., start:end], ms.float32), cos, sin, 1 if interleaved else 0)
    parts = (ops.cast(rotated, x.dtype),)
    if start > 0:
        parts = (x[..., :start],) + parts
    if end < x.shape[-1]:
        parts = parts + (x[..., end:],)
    return ops.cat(parts, -1)


def _of_both(angles, interleaved):
    """[B, T, 1, h] -> [B, T, 1, 2h]: for both dimensions of each pair."""
    if interleaved:
        return ops.reshape(ops.stack((angles, angles), -1), angles.shape[:3] + (2 * angles.shape[3],))
    return ops.cat((angles, angles), -1)


def top_k(scores, k):
    """In descending order, which `sparse_flash_attention` relies on: what is masked comes last."""
    return ops.cast(mint.topk(scores, k, -1)[1], ms.int32)
