"""A full forward that shows its pieces: what a port to another device or another implementation is compared with.

The keys, with L trunk layers, n of them DSA, m of them MoE:

    streams [L, B, T, N, H]                   after each layer
    attn, mlp [L, B, T, H]                    what the sublayers give, before the norm behind them
    index_layers [n], index_scores [n, B, T, T] (-inf ahead of the query), index_sel uint8 [n, B, T, T]
    router_layers [m], router_ids [m, B, T, K] ascending, router_w [m, B, T, K] in the same order
    merged, final [B, T, H]                   before and after the final norm
    logits [B, T, V]
    mtp{d}_hidden [B, T - d, H], mtp{d}_logits [B, T - d, V]
"""
import numpy as np
from mindspore import nn, ops

from pangu_ms.model.rows import positions


class MTPForward(nn.Cell):
    """ids int32 [B, T] -> the logits of each depth, float32 [B, T - d, V]."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        self.depths = causal_lm.config.num_nextn_predict_layers

    def construct(self, ids):
        rows = self.causal_lm.rows(positions(ids), None, False, True)
        merged, _ = self.causal_lm.model(ids, rows, None)
        return [logits for _, logits in _mtp_depths(self.causal_lm, self.depths, ids, merged, rows)]


class TraceForward(nn.Cell):
    """ids int32 [B, T] -> (merged, final, logits), pieces of each trunk layer, (hidden, logits) of each MTP depth."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.causal_lm = causal_lm
        self.depths = causal_lm.config.num_nextn_predict_layers

    def construct(self, ids):
        rows = self.causal_lm.rows(positions(ids), None, False, True)
        merged, layers = self.causal_lm.model(ids, rows, None)
        last = merged, self.causal_lm.model.norm(merged), self.causal_lm.logits(merged)
        return last, layers, _mtp_depths(self.causal_lm, self.depths, ids, merged, rows)


def _mtp_depths(causal_lm, depths, ids, merged, rows):
    hidden, found = causal_lm.mtp_hidden(merged), ()
    for depth in range(1, min(depths, ids.shape[1] - 1) + 1):                   # a depth needs a token to read
        # The last `depth` rows have no token to read: what they give is cut off, and no other row sees them.
        ahead = ops.cat((ids[:, depth:], ops.zeros_like(ids[:, :depth])), 1)
        hidden, _ = causal_lm.mtp(depth, ahead, hidden, rows, None)
        found = found + ((hidden[:, :-depth], causal_lm.mtp_head(depth, hidden)[:, :-depth]),)
    return found


def collect_trace(config, outputs):
    """The outputs of `TraceForward` as the dictionary above, numpy arrays."""
    (merged, final, logits), layers, depths = outputs
    trunk = config.layers[:config.num_hidden_layers]
    batch, length = merged.shape[:2]
    streams, attn, index, mlp, routing = zip(*layers)
    trace = {"streams": _stack(streams), "attn": _stack(attn), "mlp": _stack(mlp)}
    if dsa := [plan.index for plan in trunk if plan.kind == "dsa"]:
        trace["index_layers"] = np.array(dsa, np.int32)
        trace["index_scores"] = _stack(index[i][0] for i in dsa)
        trace["index_sel"] = _stack(index[i][1] for i in dsa).astype(np.uint8)
    if moe := [plan.index for plan in trunk if plan.moe]:
        shape = (len(moe), batch, length, config.num_experts_per_tok)
        chosen, weights = (_stack(routing[i][j] for i in moe).reshape(shape) for j in (0, 1))
        order = chosen.argsort(-1)
        trace["router_layers"] = np.array(moe, np.int32)
        trace["router_ids"] = np.take_along_axis(chosen, order, -1)
        trace["router_w"] = np.take_along_axis(weights, order, -1)
    trace |= {"merged": merged.asnumpy(), "final": final.asnumpy(), "logits": logits.asnumpy()}
    for depth, (hidden, mtp_logits) in enumerate(depths, 1):
        trace[f"mtp{depth}_hidden"], trace[f"mtp{depth}_logits"] = hidden.asnumpy(), mtp_logits.asnumpy()
    return trace


def _stack(tensors):
    return np.stack([tensor.asnumpy() for tensor in tensors])
