"""A trunk layer: attention and feed-forward, each inside a hyper-connection and between two norms (section 3)."""
from mindspore import nn, ops

from pangu_ms.model.attention import Attention
from pangu_ms.model.feed_forward import FeedForward
from pangu_ms.model.hyper_connection import HyperConnection
from pangu_ms.model.moe import MoE
from pangu_ms.model.norm import RMSNorm
from pangu_ms.ops import operator
from pangu_ms.ops.hyper_connection import flatten


class Block(nn.Cell):
    def __init__(self, config, plan, parallel):
        super().__init__()
        hidden = config.hidden_size
        self.attn_mhc_module = HyperConnection(config)
        self.input_layernorm = RMSNorm(hidden, config)
        self.self_attn = Attention(config, plan, parallel)
        self.post_attention_layernorm = RMSNorm(hidden, config)
        self.mlp_mhc_module = HyperConnection(config)
        self.pre_mlp_layernorm = RMSNorm(hidden, config)
        self.mlp = MoE(config, parallel) if plan.moe else FeedForward(config.intermediate_size, config, parallel)
        self.post_mlp_layernorm = RMSNorm(hidden, config)
        self.read, self.turn, self.write = (operator(f"decoding_{what}", config.compute_dtype)
                                            for what in ("read", "turn", "write"))
        self.copy, self.reduce = parallel.copy("tensor"), parallel.reduce("tensor")
        self.moe, self.last_norm = plan.moe, plan.block_post_layernorm
        if self.last_norm:
            self.block_post_layernorm = RMSNorm(config.mhc_num_stream * hidden, config)

    def construct(self, streams, rows, memory):
        """streams [B, T, N, H] -> streams, and what the layer did: (attn, index, mlp, routing).

        attn, mlp [B, T, H]; `index` of `Attention`, and () without DSA; `routing` of `MoE`, and () without experts.
        What nobody uses of the second is dropped when the graph is compiled.
        """
        if rows["decode"]:
            return self._decode(streams, rows, memory), ()
        x, post, mix = self.attn_mhc_module(streams)
        attn, index = self.self_attn(self.input_layernorm(x), rows, memory)
        streams = self.attn_mhc_module.write(self.post_attention_layernorm(attn), post, mix, streams)

        x, post, mix = self.mlp_mhc_module(streams)
        x = self.pre_mlp_layernorm(x)
        routing = ()
        if self.moe:
            mlp, routing = self.mlp(x, rows["decode"])
        else:
            mlp = self.reduce(self.mlp(self.copy(x)))
        streams = self.mlp_mhc_module.write(self.post_mlp_layernorm(mlp), post, mix, streams)

        return self._finish(streams), (attn, index, mlp, routing)

    def _decode(self, streams, rows, memory):
        """The same for few tokens, by operators that take several of these steps at once."""
        norm, attn_norm = self.input_layernorm, self.post_attention_layernorm
        mlp_norm, last = self.pre_mlp_layernorm, self.post_mlp_layernorm
        attn_mhc, mlp_mhc = self.attn_mhc_module, self.mlp_mhc_module
        x, post, mix = self.read(streams, norm.weight, *attn_mhc.parameters(), norm.eps)
        attn, _ = self.self_attn(x, rows, memory)
        streams, x, post, mix = self.turn(attn, attn_norm.weight, post, mix, streams, mlp_norm.weight,
                                          *mlp_mhc.parameters(), norm.eps)
        if self.moe:
            mlp, _ = self.mlp(x, True)
        else:
            mlp = self.reduce(self.mlp(x))
        return self._finish(self.write(mlp, last.weight, post, mix, streams, last.eps))

    def _finish(self, streams):
        if self.last_norm:                                                      # one norm over all N * H values
            streams = ops.reshape(self.block_post_layernorm(flatten(streams)), streams.shape)
        return streams
