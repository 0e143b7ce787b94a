"""The steps that generation compiles: more tokens of every sequence, with a cache."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache import (GROWING, LATENT, grow, hidden_rows, layer_shapes, remember, remember_real, ring_order,
                            ring_slots)
from pangu_ms.model.rows import Rows

# Rows of room in every ring when drafts may be rolled back. A draft step computes the last drafts + depths rows of the
# MTP layers anew and drafts - depths behind them, and for a short text the first of those lie before position 0, in
# slots from the end of the ring: 24 keeps them apart in the smallest ring (k - 1 taps) for 8 drafts of 3 layers.
SLACK = 24

# MindSpore's phase of inference. A cell in it goes straight to its compiled graph from the second call on; any other
# compares all arguments and walks all sub-cells each time. `set_inputs` makes one graph serve every call.
ONE_GRAPH = "increment"


class Step(nn.Cell):
    """T more tokens through the trunk: one function for a prefill chunk, for decoding, for verifying drafts.

    Args of the cell:
        batch: sequences at once.
        length: of decoding, T, few tokens: absorbed attention, experts gathered by token, logits of every row. None: a
            prefill, of any T: expanded attention, experts in blocks, logits of the last row alone. An open T would cost
            decoding more than its work: MindSpore then works out every shape anew in each call.
        sparse: DSA layers select `index_topk` rows. To be used once the context, new rows included, is longer than
            that; before, selecting is the same as taking all.
        drafting: the cache has SLACK and the MTP layers: hidden rows are kept, and a prefill runs the MTP layers too.
        fixed: for a device that wants every shape known: (T of a prefill, rows that growing tensors hold for one
            sequence). None: both are left open.

    `construct(ids int32 [B, T], start int32 [B, 1], memory)`: the tokens stand at positions start .. start + T - 1;
    memory, updated in place, is what the step uses of `Cache.tensors`: of the trunk's layers, of the MTP layers too in
    a drafting prefill, of the hidden ring too when drafting. MindSpore is slower for every tensor that is not used.
    -> logits float32 [B, T or 1, vocab_size]. A drafting prefill takes ids [B, T + depths], for the MTP layers read
    ahead; tokens not known yet may be anything, since the next draft step computes their rows anew. A prefill of fixed
    shapes takes count int32 [1] as well: the rows from there on are padding, which leaves no trace but in growing
    tensors, past the length.
    """

    def __init__(self, causal_lm, batch, length, sparse, drafting=False, fixed=None):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        config, slack = causal_lm.config, SLACK if drafting else 0
        self.decode, self.sparse, self.drafting = length is not None, sparse, drafting
        self.trunk = config.num_hidden_layers
        self.plans = config.layers if drafting and not self.decode else config.layers[:self.trunk]
        self.rows = Rows(config, self.plans, slack)
        self.depths = config.num_nextn_predict_layers if drafting and not self.decode else 0
        # A layer whose tensors tell the capacity; when every layer has a window, nothing needs it.
        self.growing = next((i for i, plan in enumerate(self.plans) if plan.window is None), None)
        self.phase = ONE_GRAPH
        chunk, capacity = fixed or (None, None)
        counted = () if self.decode or fixed is None else (ms.Tensor(shape=[1], dtype=ms.int32),)
        width = length if self.decode or fixed is None else chunk + self.depths
        self.set_inputs(ms.Tensor(shape=[batch, width], dtype=ms.int32), ms.Tensor(shape=[batch, 1], dtype=ms.int32),
                        memory_shapes(causal_lm, self.plans, batch, slack, capacity), *counted)

    def construct(self, ids, start, memory, count=None):
        new = ids[:, :-self.depths] if self.depths else ids
        position = start + ops.arange(new.shape[1], dtype=ms.int32)                             # [B, T]
        capacity = 1 if self.growing is None else memory[self.growing][LATENT].shape[0] // ids.shape[0]
        rows = self.rows(position, capacity, self.decode, self.sparse, count)
        merged, _ = self.causal_lm.model(new, rows, memory)
        if self.decode:
            shown = merged
        elif count is None:
            shown = merged[:, -1:]
        else:
            shown = ops.gather(merged, count - 1, 1)
        logits = self.causal_lm.logits(shown)
        if self.drafting:
            logits = ops.depend(logits, self._keep_hidden(merged, position, memory, count))
        hidden = self.causal_lm.mtp_hidden(merged)
        for depth in range(1, self.depths + 1):
            ahead = ids[:, depth:] if depth == self.depths else ids[:, depth:depth - self.depths]
            hidden, _ = self.causal_lm.mtp(depth, ahead, hidden, rows, memory[self.trunk + depth - 1])
            logits = ops.depend(logits, hidden)                                 # a write nobody uses is dropped
        return logits

    def _keep_hidden(self, merged, position, memory, count):
        ring, size = memory[len(self.plans)][0], hidden_rows(SLACK)
        last = position if count is None else position[:, :1] + count - 1
        order, slots = ring_order(position, size), ring_slots(last, size, self.decode)
        if self.decode:
            return grow(ring, merged, slots)
        if count is None:
            return remember(ring, merged, order, slots, False)
        return remember_real(ring, merged, order, slots, count)


class Draft(nn.Cell):
    """The MTP layers after the last token: greedy drafts of the next ones (section 8).

    `construct(tokens int32 [B, M], start int32 [B, 1], memory)`: memory is that of the MTP layers that draft and of the
    hidden ring, as in `Cache.tensors`. Row p of depth 1, start <= p < start + M, reads the
    trunk's hidden row p, which a step has kept, and the token at p + 1, given in `tokens`; the last row reads the last
    token of the text. Depth d reads the depth before and the token d ahead, drafts included. -> drafts int32
    [B, drafts], their logits float32 [B, drafts, vocab_size].

    M = `window(drafts, depths)` rows are computed, although only the last one drafts: those that the last draft step
    computed with drafts which were not accepted are thereby written anew, in the layers' rings and taps.
    """

    def __init__(self, causal_lm, batch, drafts):
        super().__init__(auto_prefix=False)
        self.causal_lm = causal_lm
        config = causal_lm.config
        self.depths = min(drafts, config.num_nextn_predict_layers)
        self.repeats = drafts - self.depths                                     # of the last layer, on its own output
        plans = config.layers[config.num_hidden_layers:][:self.depths]
        self.rows = Rows(config, plans, SLACK)
        self.phase = ONE_GRAPH
        self.set_inputs(ms.Tensor(shape=[batch, Draft.window(drafts, self.depths)], dtype=ms.int32),
                        ms.Tensor(shape=[batch, 1], dtype=ms.int32),
                        memory_shapes(causal_lm, plans, batch, SLACK))

    @staticmethod
    def window(drafts, depths):
        """Rows to compute: up to drafts + 1 tokens came since the last draft step, and `depths` rows read drafts."""
        return drafts + min(drafts, depths)

    def construct(self, tokens, start, memory):
        position = start + ops.arange(tokens.shape[1], dtype=ms.int32)                          # [B, M]
        size = hidden_rows(SLACK)
        rows = self.rows(position, 1, True, False)
        kept = ops.gather(memory[self.depths][0], ring_slots(position, size, True), 0)          # [B, M, H]
        hidden = self.causal_lm.mtp_hidden(kept)
        drafts, logits = (), ()
        for depth in range(1, self.depths + self.repeats + 1):
            if depth > self.depths:                                             # one row further, for each repeat
                tokens, hidden, position = tokens[:, -1:], hidden[:, -1:], position[:, -1:] + 1
                rows = self.rows(position, 1, True, False)
            head = min(depth, self.depths)
            hidden, _ = self.causal_lm.mtp(head, tokens, hidden, rows, memory[head - 1])
            logit = self.causal_lm.mtp_head(head, hidden[:, -1:])               # [B, 1, V]
            draft = ops.Argmax(-1, ms.int32)(logit)                             # [B, 1]
            tokens = ops.cat((tokens[:, 1:], draft), 1)
            drafts, logits = drafts + (draft,), logits + (logit,)
        return ops.cat(drafts, 1), ops.cat(logits, 1)


def memory_shapes(causal_lm, plans, batch, slack, capacity=None):
    """What a step is compiled for: the shapes of `Cache.tensors`; capacity None leaves that of growing tensors open."""
    config, memory = causal_lm.config, []
    dtype = getattr(ms, config.compute_dtype)
    for plan in plans:
        shapes = layer_shapes(config, plan, capacity or 1, slack, causal_lm.parallel.tensor)
        opened = GROWING if plan.window is None and capacity is None else ()
        memory.append(tuple(ms.Tensor(shape=[None if i in opened else batch * rows, width], dtype=dtype)
                            for i, (rows, width) in enumerate(shapes)))
    if slack:
        memory.append((ms.Tensor(shape=[batch * hidden_rows(slack), config.hidden_size], dtype=dtype),))
    return ms.mutable(memory)
