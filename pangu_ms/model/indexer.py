"""DSA's lightning indexer: which `index_topk` rows a query of the main attention may see (section 6)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.linear import Linear
from pangu_ms.model.norm import RMSNorm
from pangu_ms.ops import operator


class Indexer(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, config)
        self.wk = Linear(config.hidden_size, self.dim, config)
        self.k_norm = RMSNorm(self.dim, config)
        self.weights_proj = Linear(config.hidden_size, self.heads, config)
        self.scale = self.heads ** -0.5 * self.dim ** -0.5  # no effect on the ranking; the KL loss needs it
        self.rotate = operator("rotate", config.compute_dtype)

    def keys(self, x, rows):
        """x [B, T, H], the layer's normed input -> [B, T, index_head_dim], normed and rotated."""
        key = ops.expand_dims(self.k_norm(self.wk(x)), 2)
        return ops.squeeze(self.rotate(key, rows["cos"], rows["sin"], 0), 2)    # unlike in the main heads, first

    def construct(self, x, q_latent, keys, rows):
        """q_latent [B, T, q_lora_rank], after conv and norm; keys [B, S, D] -> scores float32 [B, T, S], not masked."""
        b, s = keys.shape[:2]
        q = ops.reshape(self.wq_b(q_latent), (b, -1, self.heads, self.dim))
        q = ops.reshape(self.rotate(q, rows["cos"], rows["sin"], 0), (b, -1, self.dim))         # [B, T * heads, D]
        each = ops.relu(ops.cast(ops.BatchMatMul(transpose_b=True)(q, keys), ms.float32))
        each = ops.reshape(each, (b, -1, self.heads, s))                        # [B, T, heads, S]
        weight = ops.expand_dims(ops.cast(self.weights_proj(x), ms.float32) * self.scale, 2)
        return ops.squeeze(ops.matmul(weight, each), 2)
