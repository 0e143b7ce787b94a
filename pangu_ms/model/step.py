"""The step that generation compiles: T more tokens of every sequence through the trunk, with a cache."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.cache import GROWING, LATENT, layer_shapes
from pangu_ms.model.rows import Rows


class Step(nn.Cell):
    """One function for a prefill chunk of any length and for decoding, compiled in up to four forms.

    Args of the cell:
        batch: sequences at once.
        decode: one new row: absorbed attention, experts gathered by token. Otherwise any number of rows: expanded
            attention, experts in blocks, logits of the last row alone.
        sparse: DSA layers select `index_topk` rows. To be used once the context, new rows included, is longer than
            that; before, selecting is the same as taking all.

    `construct(ids int32 [B, T], start int32 [B, 1], memory)`: the tokens stand at positions start .. start + T - 1;
    memory is `Cache.tensors`, updated in place. -> logits float32 [B, T or 1, vocab_size].
    """

    def __init__(self, causal_lm, batch, decode, sparse, slack=0):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        config = causal_lm.config
        self.plans = config.layers[:config.num_hidden_layers]
        self.rows = Rows(config, self.plans, slack)
        self.decode, self.sparse = decode, sparse
        # A layer whose tensors tell the capacity; when every layer has a window, nothing needs it.
        self.growing = next((i for i, plan in enumerate(self.plans) if plan.window is None), None)

        # What is compiled: the length of a prefill chunk and the capacity of growing tensors stay open.
        dtype, length = getattr(ms, config.compute_dtype), 1 if decode else None
        memory = []
        for plan in self.plans:
            shapes = layer_shapes(config, plan, 1, slack)
            memory.append(tuple(ms.Tensor(shape=[None if plan.window is None and i in GROWING else batch * rows, width],
                                          dtype=dtype) for i, (rows, width) in enumerate(shapes)))
        self.set_inputs(ms.Tensor(shape=[batch, length], dtype=ms.int32), ms.Tensor(shape=[batch, 1], dtype=ms.int32),
                        ms.mutable(memory))

    def construct(self, ids, start, memory):
        position = start + ops.expand_dims(ops.arange(ids.shape[1], dtype=ms.int32), 0)         # [B, T]
        capacity = 1 if self.growing is None else memory[self.growing][LATENT].shape[0] // ids.shape[0]
        rows = self.rows(position, capacity, self.decode, self.sparse)
        merged, _ = self.causal_lm.model(ids, rows, memory)
        return self.causal_lm.logits(merged if self.decode else merged[:, -1:])
