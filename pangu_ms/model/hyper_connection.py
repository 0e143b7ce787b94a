"""mHC: manifold-constrained hyper-connections, the residual of N streams (section 3)."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.model.linear import Linear, parameter
from pangu_ms.ops import operator

GATE_EPS = 1e-6  # on gates and in Sinkhorn: fixed in every public source, no config field


def sinkhorn(a, rounds):
    """Rows a [..., N, N] float32 that sum to 1 -> nearly doubly stochastic matrices.

    The softmax that made them was the first round's step over rows; columns follow, then rows and columns in each
    further round. It ends on columns, so that every new stream is a convex mix of the old ones.
    """
    total = ops.ReduceSum(keep_dims=True)
    a = a + GATE_EPS
    a = a / (total(a, -2) + GATE_EPS)
    for _ in range(rounds - 1):
        a = a / (total(a, -1) + GATE_EPS)
        a = a / (total(a, -2) + GATE_EPS)
    return a


class HyperConnection(nn.Cell):
    """One module around one sublayer: `construct` reads its input off the streams, `write` puts its output back.

    Everything is float32 but the streams [B, T, N, H] and what is read from them, which have the model's dtype.
    """

    def __init__(self, config):
        super().__init__()
        self.streams, self.rounds = config.mhc_num_stream, config.mhc_recur_norm
        n, width = self.streams, self.streams * config.hidden_size
        self.phi = Linear(width, n * (n + 2), config, ms.float32)
        self.norm_gamma = parameter((width,), config, ms.float32, "ones")
        self.branch_alpha = parameter((3,), config, ms.float32)
        self.branch_beta = parameter((n * (n + 2),), config, ms.float32)
        self.gate_alpha = ms.Tensor(np.repeat([0, 1, 2], [n, n, n * n]).astype(np.int32))  # which alpha scales a gate
        self.eps = config.mhc_norm_eps
        self.rms_norm, self.sigmoid, self.softmax = operator("rms_norm"), operator("sigmoid"), operator("softmax")

    def construct(self, streams):
        """streams [B, T, N, H] -> input [B, T, H], post [B, T, N, 1], mix [B, T, N (from), N (to)]."""
        n = self.streams
        m = self.phi(_normed(streams, self.norm_gamma, self.eps, self.rms_norm))           # [B, T, N * (N + 2)]
        m = m * ops.gather(self.branch_alpha, self.gate_alpha, 0) + self.branch_beta
        gates = self.sigmoid(m[..., :2 * n])
        pre, post = gates[..., :n] + GATE_EPS, 2 * gates[..., n:]
        mix = sinkhorn(self.softmax(ops.reshape(m[..., 2 * n:], m.shape[:2] + (n, n))), self.rounds)
        return _weighted_sum(pre, streams), ops.expand_dims(post, -1), mix

    def write(self, y, post, mix, streams):
        """New stream j = post[j] * y + sum_i mix[i, j] * streams[i]. y [B, T, H] -> [B, T, N, H]."""
        mixed = ops.matmul(ops.swapaxes(mix, -1, -2), ops.cast(streams, ms.float32))
        return ops.cast(post * ops.cast(ops.expand_dims(y, 2), ms.float32) + mixed, streams.dtype)


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
        self.rms_norm, self.sigmoid = operator("rms_norm"), operator("sigmoid")

    def construct(self, streams):
        m = self.phi(_normed(streams, self.norm_gamma, self.eps, self.rms_norm))
        return _weighted_sum(self.sigmoid(m * self.branch_alpha_pre + self.branch_beta_pre) + GATE_EPS, streams)


def flatten_streams(streams):
    """[B, T, N, H] -> [B, T, N * H], stream after stream."""
    return ops.reshape(streams, streams.shape[:2] + (streams.shape[2] * streams.shape[3],))


def _normed(streams, gamma, eps, rms_norm):
    return rms_norm(ops.cast(flatten_streams(streams), ms.float32), gamma, eps)


def _weighted_sum(gate, streams):
    """sum_i gate[i] * streams[i]. gate [B, T, N] -> [B, T, H] in the streams' dtype."""
    total = ops.matmul(ops.expand_dims(gate, 2), ops.cast(streams, ms.float32))            # [B, T, 1, H]
    return ops.cast(ops.squeeze(total, 2), streams.dtype)
