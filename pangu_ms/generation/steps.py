"""What generation compiles: more tokens of every sequence through the trunk, and drafts of the MTP layers."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache.rings import append, in_ring, ring_slots, ring_update
from pangu_ms.cache.sizes import hidden_rows, tensor_shapes
from pangu_ms.model.step_info import StepInfo
from pangu_ms.shaping import arange

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
        sparse: DSA layers select their indexer's topk rows. To be used once the context, new rows included, is longer
            than that; before, selecting is the same as taking all.
        drafting: the cache has SLACK and the MTP layers: hidden rows are kept, and a prefill runs the MTP layers too.
        chunk, capacity: for a device that wants every shape known: T of a prefill, and rows that growing tensors hold
            for one sequence. None: both are left open.

    `construct(ids int32 [B, T], start int32 [B, 1], tensors)`: the tokens stand at positions start .. start + T - 1;
    tensors, updated in place, is what `arguments` makes of a `Cache`. -> logits float32 [B, T or 1, vocab_size].

    A drafting prefill takes ids [B, T + depths], for the MTP layers read ahead; tokens not known yet may be anything,
    since the next draft step computes their rows anew. A prefill of fixed shapes takes count int32 [1] as well: the
    rows from there on are padding, which leaves no trace but in growing tensors, past the length.
    """

    def __init__(self, causal_lm, batch, length, sparse, drafting=False, chunk=None, capacity=None):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        plan, slack = causal_lm.plan, SLACK if drafting else 0
        self.decode, self.sparse, self.drafting = length is not None, sparse, drafting
        self.depths = len(plan.mtp_layers) if drafting and not self.decode else 0
        self.layers = plan.layers if self.depths else plan.trunk
        self.step_info = StepInfo(plan, self.layers, slack)
        self.growing = first_growing(self.layers)
        self.trunk, self.phase = len(plan.trunk), ONE_GRAPH
        counted = () if chunk is None else (ms.Tensor(shape=[1], dtype=ms.int32),)
        width = length if self.decode or chunk is None else chunk + self.depths
        self.set_inputs(ms.Tensor(shape=[batch, width], dtype=ms.int32), ms.Tensor(shape=[batch, 1], dtype=ms.int32),
                        _open_tensors(causal_lm, self.layers, batch, slack, capacity), *counted)

    def arguments(self, cache):
        """The tensors of a cache that this step uses: MindSpore is slower for every one that it does not."""
        return as_arguments(cache, cache.layers[:len(self.layers)])

    def construct(self, ids, start, tensors, count=None):
        new = ids[:, :-self.depths] if self.depths else ids
        position = start + arange(new.shape[1])                                 # [B, T]
        capacity = capacity_of(tensors, self.growing, ids.shape[0])
        step = self.step_info(position, capacity, self.decode, self.sparse, count)
        merged, _ = self.causal_lm.model(new, step, tensors)
        if self.decode:
            shown = merged
        elif count is None:
            shown = merged[:, -1:]
        else:
            shown = ops.gather(merged, count - 1, 1)
        logits = self.causal_lm.logits(shown)
        if self.drafting:
            logits = ops.depend(logits, self._keep_hidden(tensors[len(self.layers)][0], merged, position, count))
        hidden = self.causal_lm.mtp_hidden(merged)
        for depth in range(1, self.depths + 1):
            ahead = ids[:, depth:] if depth == self.depths else ids[:, depth:depth - self.depths]
            hidden, _, _ = self.causal_lm.mtp(depth, ahead, hidden, step, tensors[self.trunk + depth - 1])
            logits = ops.depend(logits, hidden)                                 # a write nobody uses is dropped
        return logits

    def _keep_hidden(self, ring, merged, position, count):
        if self.decode:
            return append(ring, merged, in_ring(position, hidden_rows(SLACK)))
        return ring_update(ring, merged, ring_slots(position, hidden_rows(SLACK), False, count))


class Draft(nn.Cell):
    """The MTP layers after the last token: greedy drafts of the next ones (section 8).

    `construct(tokens int32 [B, M], start int32 [B, 1], tensors)`, tensors as `arguments` makes them of a `Cache`. Row p
    of depth 1, start <= p < start + M, reads the trunk's hidden row p, which a step has kept, and the token at p + 1,
    given in `tokens`; the last row reads the last token of the text. Depth d reads the depth before and the token d
    ahead, drafts included. -> drafts int32 [B, drafts], their logits float32 [B, drafts, vocab_size].

    M = `window(drafts, depths)` rows are computed, although only the last one drafts: those that the last draft step
    computed with drafts which were not accepted are thereby written anew, in the layers' tensors.

    capacity: for a device that wants every shape known, as in `Step`.
    """

    def __init__(self, causal_lm, batch, drafts, capacity=None):
        super().__init__(auto_prefix=False)
        self.causal_lm, plan = causal_lm, causal_lm.plan
        self.depths, self.trunk = min(drafts, len(plan.mtp_layers)), len(plan.trunk)
        self.repeats = drafts - self.depths                                     # of the last layer, on its own output
        layers = plan.mtp_layers[:self.depths]
        self.growing = first_growing(layers)
        self.step_info = StepInfo(plan, layers, SLACK)
        self.phase = ONE_GRAPH
        self.set_inputs(ms.Tensor(shape=[batch, Draft.window(drafts, self.depths)], dtype=ms.int32),
                        ms.Tensor(shape=[batch, 1], dtype=ms.int32),
                        _open_tensors(causal_lm, layers, batch, SLACK, capacity))

    @staticmethod
    def window(drafts, depths):
        """Rows to compute: up to drafts + 1 tokens came since the last draft step, and `depths` rows read drafts."""
        return drafts + min(drafts, depths)

    def arguments(self, cache):
        return as_arguments(cache, cache.layers[self.trunk:self.trunk + self.depths])

    def construct(self, tokens, start, tensors):
        ring = tensors[self.depths][0]
        position = start + arange(tokens.shape[1])                              # [B, M]
        capacity = capacity_of(tensors, self.growing, tokens.shape[0])
        step = self.step_info(position, capacity, True, False)
        hidden = self.causal_lm.mtp_hidden(ops.gather(ring, in_ring(position, hidden_rows(SLACK)), 0))      # [B, M, H]
        drafts, logits = (), ()
        for depth in range(1, self.depths + self.repeats + 1):
            if depth > self.depths:                                             # one row further, for each repeat
                tokens, hidden, position = tokens[:, -1:], hidden[:, -1:], position[:, -1:] + 1
                step = self.step_info(position, capacity, True, False)
            head = min(depth, self.depths)
            hidden, normed, _ = self.causal_lm.mtp(head, tokens, hidden, step, tensors[head - 1])
            logit = self.causal_lm.head(normed[:, -1:])                         # [B, 1, V]
            draft = ops.Argmax(-1, ms.int32)(logit)                             # [B, 1]
            tokens = ops.cat((tokens[:, 1:], draft), 1)
            drafts, logits = drafts + (draft,), logits + (logit,)
        return ops.cat(drafts, 1), ops.cat(logits, 1)


def first_growing(layers):
    """Places of a layer and of its tensor which tells the capacity; None where no layer's tensors grow."""
    return next(((i, j) for i, layer in enumerate(layers)
                 for j, each in enumerate(layer.attention.cache_tensors.values()) if each.rows is None), None)


def capacity_of(tensors, growing, batch):
    """Rows of growing tensors for one sequence; 1 where there are none and nothing needs it."""
    return 1 if growing is None else tensors[growing[0]][growing[1]].shape[0] // batch


def as_arguments(cache, layers):
    """Tensors of a cache's layers, and behind them its ring of hidden rows, as a graph takes them."""
    hidden = [] if cache.hidden is None else [(cache.hidden,)]
    return ms.mutable([tuple(tensors.values()) for tensors in layers] + hidden)


def _open_tensors(causal_lm, layers, batch, slack, capacity=None):
    """What a step is compiled for: the shapes of `as_arguments`; capacity None leaves that of growing tensors open."""
    plan, tensors = causal_lm.plan, []
    dtype = getattr(ms, plan.dtype)
    for layer in layers:
        kinds = layer.attention.cache_tensors
        shapes = tensor_shapes(layer, capacity or 1, slack, causal_lm.ranks.tensor)
        tensors.append(tuple(
            ms.Tensor(shape=[None if kinds[name].rows is None and capacity is None else batch * rows, width],
                      dtype=dtype) for name, (rows, width) in shapes.items()))
    if slack:
        tensors.append((ms.Tensor(shape=[batch * hidden_rows(slack), plan.hidden_size], dtype=dtype),))
    return ms.mutable(tensors)
