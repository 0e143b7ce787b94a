"""MoME: the depthwise causal convolution with a residual, at three sites of every layer (section 4)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache.rings import ring_update
from pangu_ms.device import replaceable
from pangu_ms.model.linear import parameter


@replaceable
def short_conv(x, past, weight, mask):
    """y_t = x_t + sum_j weight[:, j] * x_{t-k+1+j} where mask, else x_t.

    x [B, T, C]; past [B, P, C], P >= k-1, the inputs right before x; weight [C, 1, k]; mask bool [B, T, 1].
    """
    channels, _, width = weight.shape
    seen = ops.cast(ops.cat((past, x), 1), ms.float32)                          # [B, P + T, C]
    weight = ops.cast(ops.reshape(weight, (channels, width)), ms.float32)
    first = past.shape[1] - width + 1
    y = ops.cast(x, ms.float32) * weight[:, width - 1]
    for j in range(width - 1):                                                  # the last tap is the current token
        y = y + seen[:, first + j:j + 1 - width] * weight[:, j]
    return ops.cast(ops.cast(x, ms.float32) + ops.select(mask, y, ops.zeros_like(y)), x.dtype)


def conv_with_taps(x, conv, taps, step):
    """`short_conv` of x [B, T, C] and what came before it.

    The start rule goes by absolute position: y_t = x_t at the positions 0 .. k-2 of a sequence. So it holds for a
    one-token prompt and in every chunk of a prefill, and it keeps documents apart that are packed into one row.

    Args:
        conv: the handle of a `ShortConv`; None: x is given back.
        taps: ring of the last inputs [B * R, C], updated in place; None without a cache: zeros, which the rule hides.
    """
    if conv is None:
        return x
    weight = conv["weight"]
    if taps is None:
        past = ops.zeros((x.shape[0], weight.shape[2] - 1, x.shape[2]), x.dtype)
    else:
        past = ring_update(taps, x, step["taps"])
    return short_conv(x, past, weight, step["conv_mask"])


class ShortConv(nn.Cell):
    """The weight [C, 1, k] of one site, which the attention's formulas apply; of width 1 there is none."""

    def __init__(self, channels, width, plan):
        super().__init__()
        self.handle = None
        if width > 1:
            self.weight = parameter((channels, 1, width), plan)
            self.handle = {"weight": self.weight}
