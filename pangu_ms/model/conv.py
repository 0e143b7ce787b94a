"""MoME: the depthwise causal convolution with a residual at three sites of every layer (section 4)."""
from mindspore import nn

from pangu_ms.model.linear import parameter
from pangu_ms.ops import operator


class ShortConv(nn.Cell):
    """y_t = x_t + sum_j weight[:, j] * x_{t-k+1+j}, and y_t = x_t at the positions 0 .. k-2 of a sequence.

    The start rule goes by absolute position, so it holds for a one-token prompt and in every chunk of a prefill, and it
    keeps documents apart that are packed into one row.
    """

    def __init__(self, channels, config):
        super().__init__()
        self.width = config.router_sliding_window
        self.weight = parameter((channels, 1, self.width), config)
        self.short_conv = operator("short_conv", config.compute_dtype)

    def construct(self, x, past, open_):
        """x [B, T, C]; past [B, P, C], P >= k-1, the inputs right before x; open_ bool [B, T, 1]: position >= k-1."""
        return self.short_conv(x, past, self.weight, open_)
