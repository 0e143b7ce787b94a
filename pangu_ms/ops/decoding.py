"""What a decoding step does to its few new tokens: plain forms, made of the other operators.

On the CPU each is compiled whole, because for few tokens a launch costs more than most of what is launched.

    position int32 [B, T], of the new tokens; cos, sin [B, T, 1, P / 2]; ring [B * R, C], conv [C, 1, k]

Tensors of the cache are updated in place: position p of a sequence lies in row p mod R of its R rows. Nothing here is
differentiated.
"""
from mindspore import ops

from pangu_ms.cache import ring_order, ring_slots
from pangu_ms.ops.attention import chosen_rows, with_sinks


def query(small):
    linear, ring_conv, rms_norm, rotate = small("linear"), _ring_conv(small), small("rms_norm"), small("rotate")

    def form(x, down, ring, conv, norm, up, position, cos, sin, nope, eps):
        """x [B, T, H], down [Q, H], norm [Q], up [heads * D, Q] -> q_latent [B, T, Q], q [B, T, heads * D], turned."""
        latent = rms_norm(ring_conv(linear(x, down), ring, conv, position), norm, eps)
        q = ops.reshape(linear(latent, up), (x.shape[0], -1, up.shape[0] // (nope + 2 * cos.shape[-1]),
                                             nope + 2 * cos.shape[-1]))
        return latent, ops.reshape(rotate(q, cos, sin, nope), (x.shape[0], -1, up.shape[0]))

    return form


def row(small):
    linear, ring_conv, latent_rows = small("linear"), _ring_conv(small), small("latent_rows")

    def form(x, down, ring, conv, norm, kept, position, cos, sin, eps):
        """x [B, T, H], down [L + P, H], norm [L], kept [B * S, L + P] -> the new rows [B, T, L + P], kept as well."""
        kv = linear(x, down)
        latent = ring_conv(kv[..., :norm.shape[0]], ring, conv, position)
        rows = latent_rows(latent, kv, norm, cos, sin, eps)
        slots = ring_slots(position, kept.shape[0] // x.shape[0], True)
        return ops.depend(rows, ops.scatter_update(kept, slots, rows))          # a write nobody uses is dropped

    return form


def attention(small):
    attend = _attend(small)

    def form(q, sink_latent, sink_k_pe, norm, kept, kv_b, ring, conv, weight, position, window, scale, eps):
        """q [B, T, heads * (nope + P)], sinks [S0, L] and [S0, P], kept [B * R, L + P], weight [H, C] -> y [B, T, H].

        A query sees the rows of the last `window` positions, all earlier ones if window is 0, and the sinks.
        """
        keys = ops.reshape(kept, (q.shape[0], -1, kept.shape[1]))
        last, at = position[:, -1:], ops.expand_dims(position, 2)               # [B, 1], [B, T, 1]
        places = keys.shape[1]
        # A row holds the last position that lies there.
        held = last - (last - ops.arange(places, dtype=last.dtype)) % places    # [B, R]
        back = at - ops.expand_dims(held, 1)                                    # [B, T, R]
        seen = ops.logical_and(back >= 0, back <= at)
        if window:
            seen = ops.logical_and(seen, back < window)
        return attend(q, sink_latent, sink_k_pe, norm, keys, seen, kv_b, ring, conv, weight, position, scale, eps)

    return form


def chosen(small):
    attend = _attend(small)

    def form(q, sink_latent, sink_k_pe, norm, kept, kv_b, ring, conv, weight, position, chosen, scale, eps):
        """The same, but a query sees of the rows chosen int32 [B, T, K] what `selected_attention` says."""
        keys, seen = chosen_rows(ops.reshape(kept, (q.shape[0], -1, kept.shape[1])), chosen, position)
        return attend(q, sink_latent, sink_k_pe, norm, keys, seen, kv_b, ring, conv, weight, position, scale, eps)

    return form


def index_row(small):
    linear, rms_norm, rotate = small("linear"), small("rms_norm"), small("rotate")

    def form(x, weight, norm, kept, position, cos, sin, eps):
        """The indexer's keys: x [B, T, H], weight [D, H], kept [B * S, D] -> the new ones [B, T, D], kept as well."""
        key = ops.expand_dims(rms_norm(linear(x, weight), norm, eps), 2)
        key = ops.squeeze(rotate(key, cos, sin, 0), 2)
        slots = ring_slots(position, kept.shape[0] // x.shape[0], True)
        return ops.depend(key, ops.scatter_update(kept, slots, key))            # a write nobody uses is dropped

    return form


def select(small):
    keys, linear, rotate, choose = index_row(small), small("linear"), small("rotate"), small("choose")

    def form(x, weight, norm, kept, position, cos, sin, q_latent, to_q, to_weight, all_, eps):
        """The indexer: its new keys are kept, and the best rows of all selected -> their positions int32 [B, T, K].

        q_latent [B, T, Q], to_q [heads * D, Q], to_weight [heads, H]; all_ int32 [K] is 0 .. K - 1. What a query that
        has fewer earlier rows is given besides lies behind it, for `chosen` to leave out.
        """
        batch, heads = x.shape[0], to_weight.shape[0]
        kept = ops.depend(kept, keys(x, weight, norm, kept, position, cos, sin, eps))
        past = ops.reshape(kept, (batch, -1, kept.shape[1]))
        q = ops.reshape(linear(q_latent, to_q), (batch, -1, heads, kept.shape[1]))
        return choose(rotate(q, cos, sin, 0), past, linear(x, to_weight), position, all_.shape[0])

    return form


def read(small):
    hyper_connection_read, rms_norm = small("hyper_connection_read"), small("rms_norm")

    def form(streams, norm, gamma, phi, alpha, beta, eps, rounds, norm_eps):
        """A read and the norm of what is read, norm [H]."""
        x, post, mix = hyper_connection_read(streams, gamma, phi, alpha, beta, eps, rounds)
        return rms_norm(x, norm, norm_eps), post, mix

    return form


def write(small):
    hyper_connection_write, rms_norm = small("hyper_connection_write"), small("rms_norm")

    def form(y, norm, post, mix, streams, eps):
        """The norm of y [B, T, H] and its write."""
        return hyper_connection_write(rms_norm(y, norm, eps), post, mix, streams)

    return form


def turn(small):
    before, behind = write(small), read(small)

    def form(y, norm, post, mix, streams, next_norm, gamma, phi, alpha, beta, eps, rounds, norm_eps):
        """From one sublayer to the next: a write, then a read -> streams, x, post, mix."""
        streams = before(y, norm, post, mix, streams, norm_eps)
        x, post, mix = behind(streams, next_norm, gamma, phi, alpha, beta, eps, rounds, norm_eps)
        return streams, x, post, mix

    return form


def join(small):
    linear, rms_norm = small("linear"), small("rms_norm")

    def form(embedding, embedding_norm, hidden, hidden_norm, weight, norm, eps):
        """The beginning of an MTP layer: both [B, T, H], normed, as one; weight [H, 2 * H] -> x, the norm of x."""
        both = ops.cat((rms_norm(embedding, embedding_norm, eps), rms_norm(hidden, hidden_norm, eps)), -1)
        x = linear(both, weight)
        return x, rms_norm(x, norm, eps)

    return form


def residual(small):
    rms_norm = small("rms_norm")

    def form(x, y, norm, next_norm, eps):
        """x + the norm of y, all [B, T, H], and the norm of that."""
        x = x + rms_norm(y, norm, eps)
        return x, rms_norm(x, next_norm, eps)

    return form


def experts(small):
    linear, route, few_tokens = small("linear"), small("route"), small("few_tokens")
    feed_forward = small("feed_forward")

    def form(x, router, bias, scale, normalise, gate, up, down, shared_gate, shared_up, shared_down):
        """x [B, T, H], router [E, H] -> y [B, T, H], routed and shared experts together, ids and weights [B, T, K]."""
        ids, weights = route(linear(ops.cast(x, router.dtype), router), bias, scale, normalise)
        shared = feed_forward(x, shared_gate, shared_up, shared_down)
        return few_tokens(x, ids, weights, gate, up, down) + shared, ids, weights

    return form


def _attend(small):
    linear, ring_conv, rms_norm = small("linear"), _ring_conv(small), small("rms_norm")
    absorbed = small("absorbed_attention")

    def form(q, sink_latent, sink_k_pe, norm, keys, seen, kv_b, ring, conv, weight, position, scale, eps):
        """keys [B, S, D] or [B, T, S, D], seen bool [B, T, S]."""
        batch, _, width = q.shape
        heads = (width - kv_b.shape[0] + ring.shape[1]) // sink_k_pe.shape[1]
        q = ops.reshape(q, (batch, -1, heads, width // heads))
        sinks = ops.cat((rms_norm(sink_latent, norm, eps), sink_k_pe), -1)
        out = absorbed(q, sinks, keys, with_sinks(seen, sinks.shape[0]), kv_b, scale)
        return linear(ring_conv(out, ring, conv, position), weight)

    return form


def _ring_conv(small):
    remember, short_conv = small("remember"), small("short_conv")

    def form(x, ring, conv, position):
        size = ring.shape[0] // x.shape[0]
        past = remember(ring, x, ring_order(position, size), ring_slots(position, size, True), True)
        return short_conv(x, past, conv, ops.expand_dims(position >= conv.shape[2] - 1, 2))

    return form
