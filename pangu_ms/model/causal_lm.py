"""The network of a plan: embedding, layers, final norm and head; the trunk first, then the MTP layers on its output."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.block import Block
from pangu_ms.model.hyper_connection import StreamMerge
from pangu_ms.model.linear import Embedding, Linear, linear
from pangu_ms.model.mtp import MTPLayer
from pangu_ms.model.norm import RMSNorm
from pangu_ms.model.step_info import StepInfo, positions
from pangu_ms.parallel import collectives


class Decoder(nn.Cell):
    """Embedding, trunk layers, MTP layers (behind the trunk's in `layers`), stream merge, final norm."""

    def __init__(self, plan, ranks):
        super().__init__()
        self.embed_tokens = Embedding(plan, ranks)
        self.layers = nn.CellList([(MTPLayer if layer.mtp_depth else Block)(layer, plan, ranks)
                                   for layer in plan.layers])
        self.depth, self.streams = len(plan.trunk), plan.residual.streams if plan.residual else 0
        if self.streams:
            self.merge_mhc_module = StreamMerge(plan, plan.residual)
        self.norm = RMSNorm(plan.hidden_size, plan)

    def construct(self, ids, step, cache):
        """ids int32 [B, T] -> hidden [B, T, H] before the final norm; without a cache (stream, pieces) of each trunk
        layer.

        cache: None, or for each layer its tensors (`Block.layer`).
        """
        stream = self.embed_tokens(ids)                                         # [B, T, H]
        if self.streams:                                                        # every stream starts as the embedding
            stream = ops.tile(ops.expand_dims(stream, 2), (1, 1, self.streams, 1))
        layers = ()
        for i in range(self.depth):
            stream, pieces = self.layers[i](stream, step, None if cache is None else cache[i])
            if cache is None:                                                  # what nobody reads takes long to compile
                layers = layers + ((stream, pieces),)
        return self.merge_mhc_module(stream) if self.streams else stream, layers


class CausalLM(nn.Cell):
    """ids int32 [B, T] -> logits float32 [B, T, vocab_size], the full sequence without a cache.

    Args:
        plan (Plan): of the whole model.
        ranks (Ranks): which part of it this process holds.
    """

    def __init__(self, plan, ranks):
        super().__init__()
        self.plan, self.ranks = plan, ranks
        self.model = Decoder(plan, ranks)
        if plan.tied_head:
            self.head_matrix = self.model.embed_tokens.matrix
        else:
            self.lm_head = Linear(plan.hidden_size, plan.vocab_size // ranks.tensor, plan)
            self.head_matrix = self.lm_head.matrix
        self.gather = collectives.gather_columns(ranks)
        self.step_info = StepInfo(plan, plan.layers)
        self.mtp_reads_merged = plan.mtp_hidden == "merged"

    def construct(self, ids):
        merged, _ = self.model(ids, self.whole(positions(ids), True), None)
        return self.logits(merged)

    def whole(self, position, sparse, largest_logits=False):
        """The `StepInfo` of a forward without a cache: position int32 [B, T]; sparse: DSA layers select."""
        return self.step_info(position, None, False, sparse, None, largest_logits)

    def logits(self, merged):
        """Hidden [B, T, H] before the final norm -> float32 [B, T, vocab_size]."""
        return self.head(self.model.norm(merged))

    def head(self, normed):
        """Hidden [B, T, H] behind the final norm, or an MTP layer's -> float32 [B, T, vocab_size]."""
        return self.gather(ops.cast(linear(normed, self.head_matrix), ms.float32))

    def mtp_hidden(self, merged):
        """What depth 1 reads: public sources differ on whether it is normed (`Plan.mtp_hidden`)."""
        return merged if self.mtp_reads_merged else self.model.norm(merged)

    def mtp(self, depth, ahead, hidden, step, cache):
        """One MTP depth: ahead int32 [B, T], for each row p the token at p + depth; hidden [B, T, H], of depth - 1.

        cache: None, or the layer's tensors -> hidden [B, T, H], for the next depth; normed [B, T, H], of which
        row p of the head's logits predicts the token at p + depth + 1; the layer's pieces.
        """
        return self.model.layers[self.model.depth + depth - 1](self.model.embed_tokens(ahead), hidden, step, cache)
