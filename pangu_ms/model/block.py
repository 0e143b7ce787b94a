"""A layer: attention and feed-forward, each read off the residual and put back between two norms (sections 3 and 8).

Trunk layers and MTP layers are the same but for their residual. A layer that is no sandwich has no norms behind its
sublayers (section 1 of the family).
"""
from mindspore import nn, ops

from pangu_ms.model import plan as records
from pangu_ms.model.experts import MoELayer
from pangu_ms.model.feed_forward import FeedForward
from pangu_ms.model.grouped_query_attention import GroupedQueryAttention
from pangu_ms.model.hyper_connection import HyperConnection, flatten
from pangu_ms.model.latent_attention import LatentAttention
from pangu_ms.model.norm import RMSNorm
from pangu_ms.model.residual import residual_post, residual_post_pre, residual_pre
from pangu_ms.parallel import collectives

ATTENTION = {records.LatentAttention: LatentAttention, records.GroupedQueryAttention: GroupedQueryAttention}


class Block(nn.Cell):
    """stream [B, T, N, H] (plain: [B, T, H]) -> stream, and the layer's pieces (`layer`)."""

    def __init__(self, layer, plan, ranks):
        super().__init__()
        hidden = plan.hidden_size
        self.moe, self.attn_gates, self.mlp_gates = layer.moe, None, None
        self.cache_names = tuple(layer.attention.cache_tensors)
        if layer.residual:
            self.attn_mhc_module = HyperConnection(plan, layer.residual)
            self.attn_gates = self.attn_mhc_module.gates
        self.input_layernorm = RMSNorm(hidden, plan)
        self.self_attn = ATTENTION[type(layer.attention)](layer.attention, plan, ranks)
        # In a sandwich the norm behind attention, otherwise that in front of the feed-forward: the release's name.
        self.post_attention_layernorm = RMSNorm(hidden, plan)
        if layer.residual:
            self.mlp_mhc_module = HyperConnection(plan, layer.residual)
            self.mlp_gates = self.mlp_mhc_module.gates
        self.behind_attn, self.before_mlp, self.behind_mlp = None, self.post_attention_layernorm.handle, None
        if layer.sandwich:
            self.pre_mlp_layernorm = RMSNorm(hidden, plan)
            self.behind_attn, self.before_mlp = self.before_mlp, self.pre_mlp_layernorm.handle
        if self.moe:
            self.mlp = MoELayer(layer.feed_forward, plan, ranks)
        else:
            self.mlp = FeedForward(layer.feed_forward.intermediate_size, plan, ranks)
        if layer.sandwich:
            self.post_mlp_layernorm = RMSNorm(hidden, plan)
            self.behind_mlp = self.post_mlp_layernorm.handle
        self.copy, self.reduce = collectives.copy(ranks, "tensor"), collectives.reduce(ranks, "tensor")
        self.block_norm = layer.block_norm
        if self.block_norm:
            self.block_post_layernorm = RMSNorm(layer.residual.streams * hidden, plan)

    def construct(self, stream, step, cache):
        return self.layer(stream, step, cache)

    def layer(self, stream, step, cache):
        """-> stream, {"attn", "mlp" [B, T, H], what the sublayers give; "index", what DSA's indexer did, or ();
        "routing" of `route`, or (); "largest_logits" float32 [heads] of attention, or () where the step does not ask}.

        What nobody uses of the second is dropped when the graph is compiled.
        cache: None, or the layer's tensors in the order of `cache_tensors`: a graph takes no dictionaries whose shapes
        are open.
        """
        if cache is not None:
            cache = named(self.cache_names, cache)
        x, back = residual_pre(stream, self.attn_gates, self.input_layernorm.handle, step)
        attn, index, largest = self.self_attn(x, step, cache)
        stream, x, back = residual_post_pre(attn, self.behind_attn, back, stream, self.mlp_gates,
                                            self.before_mlp, step)
        routing = ()
        if self.moe:
            mlp, routing = self.mlp(x, step)
        else:
            mlp = self.reduce(self.mlp(self.copy(x)))
        stream = residual_post(mlp, self.behind_mlp, back, stream, step)
        if self.block_norm:                                                     # one norm over all N * H values
            stream = ops.reshape(self.block_post_layernorm(flatten(stream)), stream.shape)
        return stream, {"attn": attn, "index": index, "mlp": mlp, "routing": routing, "largest_logits": largest}


def named(names, tensors):
    """The tensors by their names."""
    found = {}
    for i, name in enumerate(names):
        found[name] = tensors[i]
    return found
