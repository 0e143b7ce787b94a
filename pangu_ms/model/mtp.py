"""A multi-token-prediction layer: no hyper-connections, a plain residual and its own window (section 8)."""
from mindspore import nn, ops

from pangu_ms.model.attention import Attention
from pangu_ms.model.linear import Linear
from pangu_ms.model.moe import MoE
from pangu_ms.model.norm import RMSNorm
from pangu_ms.ops import operator


class SharedHead(nn.Cell):
    """The norm before the trunk's lm_head. The head itself, stored once more in a Hugging Face file, is shared."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config)

    def construct(self, hidden):
        return self.norm(hidden)


class MTPLayer(nn.Cell):
    def __init__(self, config, plan, parallel):
        super().__init__()
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, config)
        self.hnorm = RMSNorm(hidden, config)
        self.eh_proj = Linear(2 * hidden, hidden, config)
        self.input_layernorm = RMSNorm(hidden, config)
        self.self_attn = Attention(config, plan, parallel)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.pre_mlp_layernorm = RMSNorm(hidden, config)
        self.mlp = MoE(config, parallel)
        self.post_mlp_layernorm = RMSNorm(hidden, config)
        self.shared_head = SharedHead(config)
        self.join, self.residual = (operator(f"decoding_{what}", config.compute_dtype) for what in ("join", "residual"))

    def construct(self, embedding, hidden, rows, memory):
        """embedding [B, T, H] of the tokens `depth` ahead, hidden [B, T, H] of the depth before -> hidden, routing.

        Hidden is un-normed. Row p keeps position p. `shared_head` of the result goes to the trunk's lm_head; the result
        itself to the next depth.
        """
        if rows["decode"]:
            return self._decode(embedding, hidden, rows, memory)
        x = self.eh_proj(ops.cat((self.enorm(embedding), self.hnorm(hidden)), -1))          # embedding first
        attn, _ = self.self_attn(self.input_layernorm(x), rows, memory)
        x = x + self.post_attention_layernorm(attn)
        mlp, routing = self.mlp(self.pre_mlp_layernorm(x), rows["decode"])
        return x + self.post_mlp_layernorm(mlp), routing

    def _decode(self, embedding, hidden, rows, memory):
        """The same for few tokens, by operators that take several of these steps at once."""
        eps = self.enorm.eps
        x, normed = self.join(embedding, self.enorm.weight, hidden, self.hnorm.weight, self.eh_proj.weight,
                              self.input_layernorm.weight, eps)
        attn, _ = self.self_attn(normed, rows, memory)
        x, normed = self.residual(x, attn, self.post_attention_layernorm.weight, self.pre_mlp_layernorm.weight, eps)
        mlp, routing = self.mlp(normed, True)
        return x + self.post_mlp_layernorm(mlp), routing
