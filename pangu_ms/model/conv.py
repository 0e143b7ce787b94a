"""MoME: the depthwise causal convolution with a residual at three sites of every layer (section 4)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.linear import parameter


class ShortConv(nn.Cell):
    """y_t = x_t + sum_j weight[:, j] * x_{t-k+1+j}, and y_t = x_t at the positions 0 .. k-2 of a sequence.

    The start rule goes by absolute position, so it holds for a one-token prompt and in every chunk of a prefill, and it
    keeps documents apart that are packed into one row.
    """

    def __init__(self, channels, config):
        super().__init__()
        self.width = config.router_sliding_window
        self.weight = parameter((channels, 1, self.width), config)

    def construct(self, x, past, open_):
        """x [B, T, C]; past [B, P, C], P >= k-1, the inputs right before x; open_ bool [B, T, 1]: position >= k-1."""
        seen = ops.cast(ops.cat((past, x), 1), ms.float32)                      # [B, P + T, C]
        weight = ops.cast(ops.reshape(self.weight, (-1, self.width)), ms.float32)
        first = past.shape[1] - self.width + 1
        y = ops.cast(x, ms.float32) * weight[:, self.width - 1]
        for j in range(self.width - 1):                                         # the last tap is the current token
            y = y + seen[:, first + j:j + 1 - self.width] * weight[:, j]
        return ops.cast(ops.cast(x, ms.float32) + ops.select(open_, y, ops.zeros_like(y)), x.dtype)
