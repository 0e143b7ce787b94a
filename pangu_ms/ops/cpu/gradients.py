"""The `bprop` of each compiled operator that has a compiled gradient.

Each function takes the gradient operator, whose arguments are the operator's own and then the gradient of each output,
and gives the function that MindSpore calls: (arguments ..., outputs, their gradients) -> a gradient for each argument.
Zeros stand for those that are constants of a model: whole numbers, masks, angles, scales. They are written out one by
one because MindSpore counts parameters, and a loop over them would take it most of the time to compile a model.
"""
from mindspore.ops.composite.multitype_ops.zeros_like_impl import zeros_like


def linear(gradient):
    def bprop(x, weight, out, dout):
        return gradient(x, weight, dout)
    return bprop


def linear_bias(gradient):
    def bprop(x, weight, bias, out, dout):
        return gradient(x, weight, bias, dout)
    return bprop


def rms_norm(gradient):
    def bprop(x, weight, eps, out, dout):
        dx, dweight = gradient(x, weight, eps, dout)
        return dx, dweight, zeros_like(eps)
    return bprop


def swiglu(gradient):
    def bprop(gate, up, out, dout):
        return gradient(gate, up, dout)
    return bprop


def rotate(gradient):
    def bprop(x, cos, sin, start, interleaved, out, dout):
        dx = gradient(x, cos, sin, start, interleaved, dout)
        return dx, zeros_like(cos), zeros_like(sin), zeros_like(start), zeros_like(interleaved)
    return bprop


def short_conv(gradient):
    def bprop(x, past, weight, open_, out, dout):
        dx, dpast, dweight = gradient(x, past, weight, open_, dout)
        return dx, dpast, dweight, zeros_like(open_)
    return bprop


def hyper_connection_read(gradient):
    def bprop(streams, gamma, phi, alpha, beta, eps, rounds, out, dout):
        dstreams, dgamma, dphi, dalpha, dbeta = gradient(streams, gamma, phi, alpha, beta, eps, rounds,
                                                         dout[0], dout[1], dout[2])
        return dstreams, dgamma, dphi, dalpha, dbeta, zeros_like(eps), zeros_like(rounds)
    return bprop


def hyper_connection_write(gradient):
    def bprop(y, post, mix, streams, out, dout):
        return gradient(y, post, mix, streams, dout)
    return bprop


def hyper_connection_merge(gradient):
    def bprop(streams, gamma, phi, alpha, beta, eps, out, dout):
        dstreams, dgamma, dphi, dalpha, dbeta = gradient(streams, gamma, phi, alpha, beta, eps, dout)
        return dstreams, dgamma, dphi, dalpha, dbeta, zeros_like(eps)
    return bprop


def latent_rows(gradient):
    def bprop(latent, kv, weight, cos, sin, eps, interleaved, out, dout):
        dlatent, dkv, dweight = gradient(latent, kv, weight, cos, sin, eps, interleaved, dout)
        return (dlatent, dkv, dweight, zeros_like(cos), zeros_like(sin), zeros_like(eps),
                zeros_like(interleaved))
    return bprop


def masked_softmax(gradient):
    def bprop(score, visible, scale, out, dout):
        return gradient(score, visible, scale, dout), zeros_like(visible), zeros_like(scale)
    return bprop


def expanded_attention(gradient):
    def bprop(q, sinks, keys, visible, kv_b, scale, out, dout):
        dq, dsinks, dkeys, dkv_b = gradient(q, sinks, keys, visible, kv_b, scale, dout)
        return dq, dsinks, dkeys, zeros_like(visible), dkv_b, zeros_like(scale)
    return bprop


def expanded_attention_largest(gradient):
    of_output = expanded_attention(gradient)                                    # the largest logits have no gradient

    def bprop(q, sinks, keys, visible, kv_b, scale, out, dout):
        return of_output(q, sinks, keys, visible, kv_b, scale, out[0], dout[0])
    return bprop


def grouped_attention(gradient):
    def bprop(q, keys, values, sink_keys, sink_values, visible, scale, out, dout):
        dq, dkeys, dvalues, dsink_keys, dsink_values = gradient(q, keys, values, sink_keys, sink_values, visible, scale,
                                                                dout)
        return dq, dkeys, dvalues, dsink_keys, dsink_values, zeros_like(visible), zeros_like(scale)
    return bprop


def grouped_attention_largest(gradient):
    of_output = grouped_attention(gradient)

    def bprop(q, keys, values, sink_keys, sink_values, visible, scale, out, dout):
        return of_output(q, keys, values, sink_keys, sink_values, visible, scale, out[0], dout[0])
    return bprop


def route(gradient):
    def bprop(logits, bias, scale, softmax, grouped, normalise, out, dout):
        dlogits = gradient(logits, bias, scale, softmax, grouped, normalise, dout[0], dout[1])
        return (dlogits, zeros_like(bias), zeros_like(scale), zeros_like(softmax), zeros_like(grouped),
                zeros_like(normalise))
    return bprop


def experts(gradient):
    def bprop(x, ids, weights, gate, up, down, out, dout):
        dx, dweights, dgate, dup, ddown = gradient(x, ids, weights, gate, up, down, dout)
        return dx, zeros_like(ids), dweights, dgate, dup, ddown
    return bprop


def feed_forward(gradient):
    def bprop(x, gate, up, down, out, dout):
        return gradient(x, gate, up, down, dout)
    return bprop


def cross_entropy(gradient):
    def bprop(hidden, weight, labels, mask, out, dout):
        dhidden, dweight = gradient(hidden, weight, labels, mask, dout)
        return dhidden, dweight, zeros_like(labels), zeros_like(mask)
    return bprop


BPROPS = {  # operator of the library: its function above, and how many gradients the gradient operator gives
    "Linear": (linear, 2),
    "LinearBias": (linear_bias, 3),
    "RmsNorm": (rms_norm, 2),
    "Swiglu": (swiglu, 2),
    "Rotate": (rotate, 1),
    "ShortConv": (short_conv, 3),
    "HyperConnectionRead": (hyper_connection_read, 5),
    "HyperConnectionWrite": (hyper_connection_write, 4),
    "HyperConnectionMerge": (hyper_connection_merge, 5),
    "LatentRows": (latent_rows, 3),
    "MaskedSoftmax": (masked_softmax, 1),
    "ExpandedAttention": (expanded_attention, 4),
    "ExpandedAttentionLargest": (expanded_attention_largest, 4),
    "GroupedAttention": (grouped_attention, 5),
    "GroupedAttentionLargest": (grouped_attention_largest, 5),
    "Route": (route, 1),
    "Experts": (experts, 5),
    "FeedForward": (feed_forward, 4),
    "CrossEntropy": (cross_entropy, 2),
}
