"""The residual of N streams, plain forms: reading a sublayer's input off the streams, writing its output back, merging.

Streams [B, T, N, H] and what is read from them have the model's dtype; all else is float32.
"""
import mindspore as ms
from mindspore import ops

GATE_EPS = 1e-6  # on gates and in Sinkhorn: fixed in every public source, no config field


def read(small):
    rms_norm, sigmoid, softmax = small("rms_norm"), small("sigmoid"), small("softmax")

    def form(streams, gamma, phi, alpha, beta, eps, rounds):
        """gamma [N*H], phi [N*(N+2), N*H], alpha [3], beta [N*(N+2)] -> x [B, T, H], post [B, T, N, 1], mix.

        mix [B, T, N, N]: mix[i, j] is what stream i gives to new stream j.
        """
        n = streams.shape[2]
        m = ops.dense(_normed(streams, gamma, eps, rms_norm), phi)              # [B, T, N * (N + 2)]
        branch = ms.Tensor((0,) * n + (1,) * n + (2,) * (n * n), ms.int32)      # which alpha scales a gate
        m = m * ops.gather(alpha, branch, 0) + beta
        gates = sigmoid(m[..., :2 * n])
        pre, post = gates[..., :n] + GATE_EPS, 2 * gates[..., n:]
        mix = sinkhorn(softmax(ops.reshape(m[..., 2 * n:], m.shape[:2] + (n, n))), rounds)
        return _weighted_sum(pre, streams), ops.expand_dims(post, -1), mix

    return form


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


def write(y, post, mix, streams):
    """New stream j = post[j] * y + sum_i mix[i, j] * streams[i]. y [B, T, H] -> [B, T, N, H]."""
    mixed = ops.matmul(ops.swapaxes(mix, -1, -2), ops.cast(streams, ms.float32))
    return ops.cast(post * ops.cast(ops.expand_dims(y, 2), ms.float32) + mixed, streams.dtype)


def merge(small):
    rms_norm, sigmoid = small("rms_norm"), small("sigmoid")

    def form(streams, gamma, phi, alpha, beta, eps):
        """phi [N, N*H], alpha [1], beta [N] -> [B, T, H]."""
        m = ops.dense(_normed(streams, gamma, eps, rms_norm), phi)
        return _weighted_sum(sigmoid(m * alpha + beta) + GATE_EPS, streams)

    return form


def flatten(streams):
    """[B, T, N, H] -> [B, T, N * H], stream after stream."""
    return ops.reshape(streams, streams.shape[:2] + (streams.shape[2] * streams.shape[3],))


def _normed(streams, gamma, eps, rms_norm):
    return rms_norm(ops.cast(flatten(streams), ms.float32), gamma, eps)


def _weighted_sum(gate, streams):
    """sum_i gate[i] * streams[i]. gate [B, T, N] -> [B, T, H] in the streams' dtype."""
    total = ops.matmul(ops.expand_dims(gate, 2), ops.cast(streams, ms.float32))            # [B, T, 1, H]
    return ops.cast(ops.squeeze(total, 2), streams.dtype)
