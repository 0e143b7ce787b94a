"""The small operators in plain MindSpore: the forms that the tests prove right.

Each computes in float32 whatever its inputs and gives its result in the dtype of its first argument, except `top_k`.
All are differentiable, except in integer arguments.
"""
import mindspore as ms
from mindspore import ops

MASKED = float("-inf")


def linear(x, weight):
    """x [..., I], weight [O, I] -> [..., O], in the dtype of both."""
    return ops.dense(x, weight)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., D], weight [D]."""
    wide = ops.cast(x, ms.float32)
    scale = ops.rsqrt(ops.mean(ops.square(wide), -1, keep_dims=True) + eps)
    return ops.cast(wide * scale * ops.cast(weight, ms.float32), x.dtype)


def swiglu(gate, up):
    """silu(gate) * up, elementwise."""
    wide = ops.cast(gate, ms.float32)
    return ops.cast(wide * ops.sigmoid(wide) * ops.cast(up, ms.float32), gate.dtype)


def softmax(x):
    """Over the last axis. x float32.

    In float64 inside: MindSpore's float32 exp on the CPU is off by up to 5e-6 of its value, which the layers of a
    model add up to more than all other rounding together.
    """
    return ops.cast(ops.softmax(ops.cast(x, ms.float64), -1), ms.float32)


def sigmoid(x):
    """Elementwise, x float32; for gates and scores, in float64 inside for the same reason."""
    return ops.cast(ops.sigmoid(ops.cast(x, ms.float64)), ms.float32)


def rotate(x, cos, sin, start):
    """Half-split rotary embedding of the dimensions start .. start + 2h - 1; the others stay as they are.

    Dimension start + i is paired with start + i + h. x [B, T, heads, D], cos and sin [B, T, 1, h], float32.
    """
    wide, half = ops.cast(x, ms.float32), cos.shape[-1]
    first, second = wide[..., start:start + half], wide[..., start + half:start + 2 * half]
    parts = (first * cos - second * sin, second * cos + first * sin)
    if start > 0:
        parts = (wide[..., :start],) + parts
    if start + 2 * half < x.shape[-1]:
        parts = parts + (wide[..., start + 2 * half:],)
    return ops.cast(ops.cat(parts, -1), x.dtype)


def rotary_angles(position, coarse, fine):
    """position int32 [B, T] -> cos and sin [B, T, 1, h], by the addition theorem; see `RotaryAngles`.

    coarse [.., 2h] and fine [S, 2h]: cosines, then sines, of the multiples of S and of 0 .. S - 1.
    """
    position = ops.expand_dims(ops.maximum(position, 0), 2)                     # rows before the text mean nothing
    stride, half = fine.shape[0], fine.shape[1] // 2
    coarse, fine = ops.gather(coarse, position // stride, 0), ops.gather(fine, position % stride, 0)
    (cos_a, sin_a), (cos_b, sin_b) = ops.split(coarse, half, -1), ops.split(fine, half, -1)
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def short_conv(x, past, weight, open_):
    """y_t = x_t + sum_j weight[:, j] * x_{t-k+1+j} where open_, else x_t.

    x [B, T, C]; past [B, P, C], P >= k-1, the inputs right before x; weight [C, 1, k]; open_ bool [B, T, 1].
    """
    channels, _, width = weight.shape
    seen = ops.cast(ops.cat((past, x), 1), ms.float32)                          # [B, P + T, C]
    weight = ops.cast(ops.reshape(weight, (channels, width)), ms.float32)
    first = past.shape[1] - width + 1
    y = ops.cast(x, ms.float32) * weight[:, width - 1]
    for j in range(width - 1):                                                  # the last tap is the current token
        y = y + seen[:, first + j:j + 1 - width] * weight[:, j]
    return ops.cast(ops.cast(x, ms.float32) + ops.select(open_, y, ops.zeros_like(y)), x.dtype)


def top_k(scores, k):
    """Positions int32 [..., k] of the k largest of scores [..., S], in any order; exact, ties broken either way."""
    return ops.topk(scores, k)[1]
