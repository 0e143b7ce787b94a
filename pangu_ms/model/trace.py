"""A full forward that shows its pieces: what a port to another device or another implementation is compared with.

The keys, with L trunk layers, n of them DSA, m of them MoE:

    streams [L, B, T, N, H]                   after each layer; of a plain residual hidden [L, B, T, H]
    attn, mlp [L, B, T, H]                    what the sublayers give, before the norm behind them
    index_layers [n], index_scores [n, B, T, T] (-inf ahead of the query), index_sel uint8 [n, B, T, T]
    router_layers [m], router_ids [m, B, T, K] ascending, router_w [m, B, T, K] in the same order
    merged, final [B, T, H]                   before and after the final norm; merged where there are streams
    logits [B, T, V]
    mtp{d}_hidden [B, T - d, H], mtp{d}_logits [B, T - d, V], and of that layer mtp{d}_attn, mtp{d}_mlp [B, T - d, H],
    mtp{d}_router_ids, mtp{d}_router_w [B, T - d, K]
"""
import numpy as np
from mindspore import nn, ops

from pangu_ms.model.step_info import positions


def tokens_ahead(values, depth):
    """[B, T] -> row p holds the value of row p + depth; the last `depth` rows hold zero."""
    return ops.cat((values[:, depth:], ops.zeros_like(values[:, :depth])), 1)


class MTPForward(nn.Cell):
    """ids int32 [B, T] -> the logits of each depth, float32 [B, T - d, V]."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        self.depths = len(causal_lm.plan.mtp_layers)

    def construct(self, ids):
        step = self.causal_lm.whole(positions(ids), True)
        merged, _ = self.causal_lm.model(ids, step, None)
        return [logits for _, logits, _ in _mtp_depths(self.causal_lm, self.depths, ids, merged, step)]


class TraceForward(nn.Cell):
    """ids int32 [B, T] -> (merged, final, logits), (stream, pieces) of each trunk layer, (hidden, logits, pieces) of
    each MTP depth."""

    def __init__(self, causal_lm):
        super().__init__(auto_prefix=False)
        self.causal_lm = causal_lm
        self.depths = len(causal_lm.plan.mtp_layers)

    def construct(self, ids):
        step = self.causal_lm.whole(positions(ids), True)
        merged, layers = self.causal_lm.model(ids, step, None)
        last = merged, self.causal_lm.model.norm(merged), self.causal_lm.logits(merged)
        shown = ()
        for stream, pieces in layers:                                           # what a trace has no key for is dropped
            index = pieces["index"]
            if len(index) > 0:
                index = index["scores"], index["selected"]
            shown = shown + ((stream, pieces["attn"], pieces["mlp"], index, _routing(pieces)),)
        return last, shown, _mtp_depths(self.causal_lm, self.depths, ids, merged, step)


def _routing(pieces):
    routing = pieces["routing"]
    return (routing["ids"], routing["weights"]) if len(routing) > 0 else ()


def _mtp_depths(causal_lm, depths, ids, merged, step):
    hidden, found = causal_lm.mtp_hidden(merged), ()
    for depth in range(1, min(depths, ids.shape[1] - 1) + 1):                   # a depth needs a token to read
        # The last `depth` rows have no token to read: what they give is cut off, and no other row sees them.
        hidden, normed, pieces = causal_lm.mtp(depth, tokens_ahead(ids, depth), hidden, step, None)
        inner = pieces["attn"], pieces["mlp"], _routing(pieces)
        found = found + ((hidden[:, :-depth], causal_lm.head(normed)[:, :-depth], inner),)
    return found


def collect_trace(plan, outputs):
    """The outputs of `TraceForward` as the dictionary above, numpy arrays."""
    (merged, final, logits), layers, depths = outputs
    batch, length = merged.shape[:2]
    streams, attn, mlp, index, routing = zip(*layers)
    trace = {"streams" if plan.residual else "hidden": _stack(streams), "attn": _stack(attn), "mlp": _stack(mlp)}
    if dsa := [layer.index for layer in plan.trunk if layer.attention.kind == "dsa"]:
        trace["index_layers"] = np.array(dsa, np.int32)
        trace["index_scores"] = _stack(index[i][0] for i in dsa)
        trace["index_sel"] = _stack(index[i][1] for i in dsa).astype(np.uint8)
    if moe := [layer.index for layer in plan.trunk if layer.moe]:
        trace["router_layers"] = np.array(moe, np.int32)
        trace |= _ascending("", *(_stack(routing[i][j] for i in moe).reshape(len(moe), batch, length, -1)
                                  for j in (0, 1)))
    if plan.residual:
        trace["merged"] = merged.asnumpy()
    trace |= {"final": final.asnumpy(), "logits": logits.asnumpy()}
    for depth, (hidden, mtp_logits, (attn, mlp, routing)) in enumerate(depths, 1):
        name = f"mtp{depth}_"
        trace |= {name + "hidden": hidden.asnumpy(), name + "logits": mtp_logits.asnumpy(),
                  name + "attn": attn.asnumpy()[:, :-depth], name + "mlp": mlp.asnumpy()[:, :-depth]}
        if routing:
            trace |= _ascending(name, *(each.asnumpy().reshape(batch, length, -1)[:, :-depth] for each in routing))
    return trace


def _ascending(name, chosen, weights):
    """Experts [..., K] and their weights, in the order of the experts."""
    order = chosen.argsort(-1)
    return {f"{name}router_ids": np.take_along_axis(chosen, order, -1),
            f"{name}router_w": np.take_along_axis(weights, order, -1)}


def _stack(tensors):
    return np.stack([tensor.asnumpy() for tensor in tensors])
