"""DSA's lightning indexer: which `index_topk` rows a query of the main attention may see (section 6)."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.model.linear import Linear
from pangu_ms.model.norm import RMSNorm
from pangu_ms.ops import operator
from pangu_ms.ops.attention import index_scores


class Indexer(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, config)
        self.wk = Linear(config.hidden_size, self.dim, config)
        self.k_norm = RMSNorm(self.dim, config)
        self.weights_proj = Linear(config.hidden_size, self.heads, config)
        self.scale = self.heads ** -0.5 * self.dim ** -0.5  # no effect on the ranking; the KL loss needs it
        self.all = ms.Tensor(np.arange(config.index_topk), ms.int32)
        self.rotate = operator("rotate", config.compute_dtype)
        self.choice = operator("choose", config.compute_dtype)
        self.index_row, self.select = (operator(f"decoding_{what}", config.compute_dtype)
                                       for what in ("index_row", "select"))

    def keys(self, x, rows):
        """x [B, T, H], the layer's normed input -> [B, T, index_head_dim], normed and rotated."""
        key = ops.expand_dims(self.k_norm(self.wk(x)), 2)
        return ops.squeeze(self.rotate(key, rows["cos"], rows["sin"], 0), 2)    # unlike in the main heads, first

    def construct(self, x, q_latent, keys, rows):
        """q_latent [B, T, q_lora_rank], after conv and norm; keys [B, S, D] -> scores float32 [B, T, S], not masked."""
        q, weight = self._query(x, q_latent, rows)
        return index_scores(q, keys, weight)

    def choose(self, x, q_latent, keys, rows):
        """The same, then the best rows of each query -> int32 [B, T, index_topk], for `selected_attention`."""
        q, weight = self._query(x, q_latent, rows)
        return self.choice(q, keys, weight, rows["position"], self.all.shape[0])

    def _query(self, x, q_latent, rows):
        q = ops.reshape(self.wq_b(q_latent), (x.shape[0], -1, self.heads, self.dim))
        weight = ops.cast(self.weights_proj(x), ms.float32) * self.scale
        return self.rotate(q, rows["cos"], rows["sin"], 0), weight

    def keep(self, x, kept, rows):
        """Decoding: the keys of x [B, T, H] are written to kept [B * S, D] -> they, [B, T, D]."""
        return self.index_row(x, self.wk.weight, self.k_norm.weight, kept, rows["position"], rows["cos"], rows["sin"],
                              self.k_norm.eps)

    def decode(self, x, q_latent, kept, rows):
        """Decoding: `keep`, then the best rows of each query -> positions int32 [B, T, index_topk], some behind it."""
        return self.select(x, self.wk.weight, self.k_norm.weight, kept, rows["position"], rows["cos"], rows["sin"],
                           q_latent, self.wq_b.weight, self.weights_proj.weight, self.all, self.k_norm.eps)
