"""mHC: manifold-constrained hyper-connections, the residual of N streams (section 3).

Streams [B, T, N, H] and what is read from them have the model's dtype; all else is float32.
"""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.device import replaceable
from pangu_ms.model.elementary import sigmoid, softmax
from pangu_ms.model.linear import Linear, linear, parameter
from pangu_ms.model.norm import rms_norm

GATE_EPS = 1e-6  # on gates and in Sinkhorn: fixed in every public source, no config field


@replaceable
def mhc_pre(streams, gates):
    """A sublayer's input x [B, T, H], read off the streams, and how its output is put back.

    gates: norm (gamma [N*H]), phi [N*(N+2), N*H], alpha [3], beta [N*(N+2)]: pre and post gates of each stream, then
    the mixing matrix; rounds. -> x, post [B, T, N, 1], residual_mix [B, T, N, N]: residual_mix[i, j] is what stream i
    gives to new stream j.
    """
    n = streams.shape[2]
    m = linear(_normed(streams, gates), gates["phi"])                           # [B, T, N * (N + 2)]
    branch = ms.Tensor((0,) * n + (1,) * n + (2,) * (n * n), ms.int32)          # which alpha scales a gate
    m = m * ops.gather(gates["alpha"], branch, 0) + gates["beta"]
    opened = sigmoid(m[..., :2 * n])
    pre, post = opened[..., :n] + GATE_EPS, 2 * opened[..., n:]
    mix = softmax(ops.reshape(m[..., 2 * n:], m.shape[:2] + (n, n)))
    return _weighted_sum(pre, streams), ops.expand_dims(post, -1), sinkhorn(mix, gates["rounds"])


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


@replaceable
def mhc_post(y, post, residual_mix, streams):
    """New stream j = post[j] * y + sum_i residual_mix[i, j] * streams[i]. y [B, T, H] -> [B, T, N, H]."""
    mixed = ops.matmul(ops.transpose(residual_mix, (0, 1, 3, 2)), ops.cast(streams, ms.float32))
    return ops.cast(post * ops.cast(ops.expand_dims(y, 2), ms.float32) + mixed, streams.dtype)


@replaceable
def mhc_merge(streams, gates):
    """The end of the trunk: a sum of the streams by N gates -> [B, T, H]. gates: phi [N, N*H], alpha [1], beta [N]."""
    m = linear(_normed(streams, gates), gates["phi"])
    return _weighted_sum(sigmoid(m * gates["alpha"] + gates["beta"]) + GATE_EPS, streams)


def flatten(streams):
    """[B, T, N, H] -> [B, T, N * H], stream after stream."""
    return ops.reshape(streams, streams.shape[:2] + (streams.shape[2] * streams.shape[3],))


def _normed(streams, gates):
    return rms_norm(ops.cast(flatten(streams), ms.float32), gates["norm"])


def _weighted_sum(gate, streams):
    """sum_i gate[i] * streams[i]. gate [B, T, N] -> [B, T, H] in the streams' dtype."""
    total = ops.matmul(ops.expand_dims(gate, 2), ops.cast(streams, ms.float32))            # [B, T, 1, H]
    return ops.cast(ops.squeeze(total, 2), streams.dtype)


class HyperConnection(nn.Cell):
    """The gates around one sublayer: `gates` is what `mhc_pre` takes."""

    def __init__(self, plan, residual):
        super().__init__()
        n, width = residual.streams, residual.streams * plan.hidden_size
        self.phi = Linear(width, n * (n + 2), plan, ms.float32)
        self.norm_gamma = parameter((width,), plan, ms.float32, "ones")
        self.branch_alpha = parameter((3,), plan, ms.float32)
        self.branch_beta = parameter((n * (n + 2),), plan, ms.float32)
        self.gates = {"norm": {"weight": self.norm_gamma, "eps": residual.eps}, "phi": self.phi.matrix,
                      "alpha": self.branch_alpha, "beta": self.branch_beta, "rounds": residual.rounds}


class StreamMerge(nn.Cell):
    """The end of the trunk: streams [B, T, N, H] -> [B, T, H] by N gates."""

    def __init__(self, plan, residual):
        super().__init__()
        n, width = residual.streams, residual.streams * plan.hidden_size
        self.phi = Linear(width, n, plan, ms.float32)
        self.norm_gamma = parameter((width,), plan, ms.float32, "ones")
        self.branch_alpha_pre = parameter((1,), plan, ms.float32)
        self.branch_beta_pre = parameter((n,), plan, ms.float32)
        self.gates = {"norm": {"weight": self.norm_gamma, "eps": plan.rms_norm_eps}, "phi": self.phi.matrix,
                      "alpha": self.branch_alpha_pre, "beta": self.branch_beta_pre}

    def construct(self, streams):
        return mhc_merge(streams, self.gates)
