"""Multi-head latent attention with learned sinks and short convolutions; full, sliding-window or DSA (sections 4 to 6).

Keys and values are kept as latent rows [kv_lora_rank | qk_rope_head_dim]: the normed latent, then the rotated key part
that all heads share. The operators `expanded` and `absorbed` attention are two forms of one function that reads them.
"""
from mindspore import nn, ops

from pangu_ms.cache import INDEX_KEYS, KV_TAPS, LATENT, O_TAPS, Q_TAPS, grow, remember_real
from pangu_ms.model.conv import ShortConv
from pangu_ms.model.indexer import Indexer
from pangu_ms.model.linear import Linear, parameter
from pangu_ms.model.norm import RMSNorm
from pangu_ms.ops import operator
from pangu_ms.ops.attention import with_sinks
from pangu_ms.ops.portable import MASKED


class Attention(nn.Cell):
    """`plan.kind` decides which rows a query sees; the sinks are seen always and count in no window and no top-k."""

    def __init__(self, config, plan, parallel):
        super().__init__()
        self.heads = config.num_attention_heads // parallel.tensor              # of this rank
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.topk, self.sinks = config.kv_lora_rank, config.index_topk, config.param_sink_number
        self.window = plan.window or 0
        self.windowed, self.dsa = plan.window is not None, plan.kind == "dsa"
        self.visible, self.order, self.slot = (f"{what}_{plan.window}" for what in ("visible", "order", "slot"))
        hidden, q_rank, out = config.hidden_size, config.q_lora_rank, self.heads * config.v_head_dim
        self.q_a_proj = Linear(hidden, q_rank, config)
        self.qa_conv = ShortConv(q_rank, config)
        self.q_a_layernorm = RMSNorm(q_rank, config)
        self.q_b_proj = Linear(q_rank, self.heads * (self.nope + self.rope), config)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rope, config)
        self.compresskv_conv = ShortConv(self.latent, config)
        self.kv_a_layernorm = RMSNorm(self.latent, config)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + config.v_head_dim), config)
        self.param_sink_compressed_kv = parameter((config.param_sink_number, self.latent), config)
        self.param_sink_k_pe = parameter((config.param_sink_number, self.rope), config)
        self.o_conv = ShortConv(out, config)
        self.o_proj = Linear(out, hidden, config)
        if self.dsa:
            self.indexer = Indexer(config)
        self.copy, self.reduce = parallel.copy("tensor"), parallel.reduce("tensor")
        self.scale = (self.nope + self.rope) ** -0.5
        self.rotate, self.top_k = operator("rotate", config.compute_dtype), operator("top_k", config.compute_dtype)
        self.latent_rows = operator("latent_rows", config.compute_dtype)
        self.remember = operator("remember", config.compute_dtype)
        self.selected = operator("selected_attention", config.compute_dtype)
        self.expanded = operator("expanded_attention", config.compute_dtype)
        self.query, self.row, self.attend, self.attend_chosen = (
            operator(f"decoding_{what}", config.compute_dtype) for what in ("query", "row", "attention", "chosen"))

    def construct(self, x, rows, memory):
        """x [B, T, H], normed -> y [B, T, H], and for DSA without a cache what the indexer did.

        That is: its scores and selection [B, T, T], then what its loss needs: x, q_latent [B, T, q_lora_rank],
        q [B, T, heads, nope + rope] and the latent rows [B, T, latent + rope].

        memory: None, or this layer's tensors (latent, q taps, kv taps, o taps[, indexer keys]), updated in place.
        """
        if rows["decode"]:
            return self._decode(x, rows, memory), ()
        q_latent, q, row = self._project(x, rows, memory)
        index, chosen = (), None
        if memory is None:
            keys, visible = row, rows[self.visible]
            if self.dsa:
                scores = self._masked_scores(x, q_latent, self.indexer.keys(x, rows), rows)
                selected = self._selection(scores, rows["causal"])
                index = scores, selected, x, q_latent, q, row
                if rows["sparse"]:
                    visible = with_sinks(selected, self.sinks)
        elif self.windowed:
            past = self._remember(memory[LATENT], row, rows[self.order], rows[self.slot], rows["count"])
            keys, visible = ops.cat((past, row), 1), rows[self.visible]
        else:
            cached = ops.reshape(grow(memory[LATENT], row, rows["slot"]), (x.shape[0], -1, self.latent + self.rope))
            keys, visible = cached, rows[self.visible]
            if self.dsa:
                fresh = self.indexer.keys(x, rows)
                past = ops.reshape(grow(memory[INDEX_KEYS], fresh, rows["slot"]), (x.shape[0], -1, fresh.shape[-1]))
                keys = ops.depend(keys, past)                                   # a write nobody uses is dropped
                if rows["sparse"]:
                    chosen = self.indexer.choose(x, q_latent, past, rows)
        sinks, keys, kv_b = self.copy(self.sink_rows()), self.copy(keys), self.kv_b_proj.weight
        if chosen is None:
            out = self.expanded(q, sinks, keys, visible, kv_b, self.scale)      # [B, T, heads * value]
        else:
            out = self.selected(q, sinks, keys, chosen, rows["position"], kv_b, self.scale)
        out = self.o_conv(out, self._past(out, memory, O_TAPS, rows), rows["conv_open"])
        return self.reduce(self.o_proj(out)), index

    def _decode(self, x, rows, memory):
        """The same for few tokens and their cache, by operators that take several of these steps at once -> y."""
        position, cos, sin, eps = rows["position"], rows["cos"], rows["sin"], self.kv_a_layernorm.eps
        q_latent, q = self.query(x, self.q_a_proj.weight, memory[Q_TAPS], self.qa_conv.weight,
                                 self.q_a_layernorm.weight, self.q_b_proj.weight, position, cos, sin, self.nope, eps)
        row = self.row(x, self.kv_a_proj_with_mqa.weight, memory[KV_TAPS], self.compresskv_conv.weight,
                       self.kv_a_layernorm.weight, memory[LATENT], position, cos, sin, eps)
        kept = ops.depend(memory[LATENT], row)
        sees, attend = self.window, self.attend
        if self.dsa:
            if rows["sparse"]:
                sees = self.indexer.decode(x, q_latent, memory[INDEX_KEYS], rows)
                attend = self.attend_chosen
            else:
                kept = ops.depend(kept, self.indexer.keep(x, memory[INDEX_KEYS], rows))     # or it is dropped
        return self.reduce(attend(
            q, self.param_sink_compressed_kv, self.param_sink_k_pe, self.kv_a_layernorm.weight, kept,
            self.kv_b_proj.weight, memory[O_TAPS], self.o_conv.weight, self.o_proj.weight, position, sees, self.scale,
            eps))

    def _project(self, x, rows, memory):
        """-> q_latent [B, T, q_lora_rank], q [B, T, heads, nope + rope], the new latent rows [B, T, D]."""
        q_in, kv = self.q_a_proj(x), self.kv_a_proj_with_mqa(x)
        latent = kv[..., :self.latent]
        q_in = self.qa_conv(q_in, self._past(q_in, memory, Q_TAPS, rows), rows["conv_open"])
        latent = self.compresskv_conv(latent, self._past(latent, memory, KV_TAPS, rows), rows["conv_open"])
        q_latent = self.q_a_layernorm(q_in)
        q = ops.reshape(self.q_b_proj(self.copy(q_latent)), (x.shape[0], -1, self.heads, self.nope + self.rope))
        q = self.rotate(q, rows["cos"], rows["sin"], self.nope)
        row = self.latent_rows(latent, kv, self.kv_a_layernorm.weight, rows["cos"], rows["sin"],
                               self.kv_a_layernorm.eps)
        return q_latent, q, row

    def _past(self, new, memory, site, rows):
        """The convolution inputs before this call: from the taps, or zeros, which the start rule never lets in."""
        if memory is None:
            return ops.zeros((new.shape[0], self.qa_conv.width - 1, new.shape[2]), new.dtype)
        return self._remember(memory[site], new, rows["tap_order"], rows["tap_slot"], rows["count"])

    def _remember(self, ring, new, order, slots, count):
        if count is None:
            return self.remember(ring, new, order, slots, False)
        return remember_real(ring, new, order, slots, count)

    def sink_rows(self):
        """[sinks, latent + rope]: normed like every latent row, never convolved, never rotated."""
        return ops.cat((self.kv_a_layernorm(self.param_sink_compressed_kv), self.param_sink_k_pe), -1)

    def _masked_scores(self, x, q_latent, index_keys, rows):
        scores = self.indexer(x, q_latent, index_keys, rows)
        return ops.select(rows["causal"], scores, ops.full_like(scores, MASKED))

    def _selection(self, scores, causal):
        """bool [B, T, S]: the index_topk best of each query's earlier rows, all of them while there are no more."""
        if scores.shape[-1] <= self.topk:
            return causal
        chosen = self.top_k(ops.stop_gradient(scores), self.topk)               # choosing has no gradient
        ones = ops.ones_like(chosen, dtype=scores.dtype)
        picked = ops.tensor_scatter_elements(ops.zeros_like(scores), chosen, ones, -1)
        return ops.logical_and(picked > 0, causal)
