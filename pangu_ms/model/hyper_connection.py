"""mHC: manifold-constrained hyper-connections, the residual of N streams (section 3)."""
import mindspore as ms
from mindspore import nn

from pangu_ms.model.linear import Linear, parameter
from pangu_ms.ops import operator


class HyperConnection(nn.Cell):
    """One module around one sublayer: `construct` reads its input off the streams, `write` puts its output back.

    Everything is float32 but the streams [B, T, N, H] and what is read from them, which have the model's dtype.
    """

    def __init__(self, config):
        super().__init__()
        n, width = config.mhc_num_stream, config.mhc_num_stream * config.hidden_size
        self.phi = Linear(width, n * (n + 2), config, ms.float32)
        self.norm_gamma = parameter((width,), config, ms.float32, "ones")
        self.branch_alpha = parameter((3,), config, ms.float32)
        self.branch_beta = parameter((n * (n + 2),), config, ms.float32)
        self.eps, self.rounds = config.mhc_norm_eps, config.mhc_recur_norm
        self.read = operator("hyper_connection_read", config.compute_dtype)
        self.mix = operator("hyper_connection_write", config.compute_dtype)

    def construct(self, streams):
        """streams [B, T, N, H] -> input [B, T, H], post [B, T, N, 1], mix [B, T, N (from), N (to)]."""
        return self.read(streams, *self.parameters())

    def parameters(self):
        """What an operator that reads is given besides the streams."""
        return self.norm_gamma, self.phi.weight, self.branch_alpha, self.branch_beta, self.eps, self.rounds

    def write(self, y, post, mix, streams):
        """New stream j = post[j] * y + sum_i mix[i, j] * streams[i]. y [B, T, H] -> [B, T, N, H]."""
        return self.mix(y, post, mix, streams)


class StreamMerge(nn.Cell):
    """The end of the trunk: streams [B, T, N, H] -> [B, T, H] by N gates."""

    def __init__(self, config):
        super().__init__()
        n, width = config.mhc_num_stream, config.mhc_num_stream * config.hidden_size
        self.phi = Linear(width, n, config, ms.float32)
        self.norm_gamma = parameter((width,), config, ms.float32, "ones")
        self.branch_alpha_pre = parameter((1,), config, ms.float32)
        self.branch_beta_pre = parameter((n,), config, ms.float32)
        self.eps = config.rms_norm_eps
        self.merge = operator("hyper_connection_merge", config.compute_dtype)

    def construct(self, streams):
        return self.merge(streams, self.norm_gamma, self.phi.weight, self.branch_alpha_pre, self.branch_beta_pre,
                          self.eps)
