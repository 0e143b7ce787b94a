"""Operators that differ by device, and the one table that chooses among their forms.

A small operator has a plain form and one for Ascend. A composed operator has a plain form, which is made of the
device's small operators, and may have a fused one for Ascend. Either may have a compiled form for the CPU, by its name
in the library.
"""
import mindspore as ms
from mindspore import context

from pangu_ms import cache
from pangu_ms.ops import (ascend, ascend_attention, ascend_experts, attention, compiled, cross_entropy, decoding,
                          experts, hyper_connection, portable, router)

_SMALL = {
    # operator: (portable form, Ascend form, compiled form)
    "linear": (portable.linear, portable.linear, "Linear"),
    "rms_norm": (portable.rms_norm, ascend.rms_norm, "RmsNorm"),
    "swiglu": (portable.swiglu, ascend.swiglu, "Swiglu"),
    "softmax": (portable.softmax, ascend.softmax, None),
    "sigmoid": (portable.sigmoid, ascend.sigmoid, None),
    "rotate": (portable.rotate, ascend.rotate, "Rotate"),
    "rotary_angles": (portable.rotary_angles, portable.rotary_angles, "RotaryAngles"),
    "short_conv": (portable.short_conv, portable.short_conv, "ShortConv"),
    "top_k": (portable.top_k, ascend.top_k, None),
    "remember": (cache.remember, cache.remember, "Remember"),
    "hyper_connection_write": (hyper_connection.write, hyper_connection.write, "HyperConnectionWrite"),
}
_COMPOSED = {
    # operator: (function of the device's small operators that makes the plain form, compiled form)
    "hyper_connection_read": (hyper_connection.read, "HyperConnectionRead"),
    "hyper_connection_merge": (hyper_connection.merge, "HyperConnectionMerge"),
    "latent_rows": (attention.latent_rows, "LatentRows"),
    "masked_softmax": (attention.masked_softmax, "MaskedSoftmax"),
    "absorbed_attention": (attention.absorbed, "AbsorbedAttention"),
    "expanded_attention": (attention.expanded, "ExpandedAttention"),
    "selected_attention": (attention.selected, None),
    "choose": (attention.choose, None),
    "attended": (attention.attended, None),
    "route": (router.route, "Route"),
    "few_tokens": (experts.few_tokens, "Experts"),
    "many_tokens": (experts.many_tokens, "Experts"),
    "feed_forward": (experts.feed_forward, "FeedForward"),
    "cross_entropy": (cross_entropy.cross_entropy, "CrossEntropy"),
    "decoding_query": (decoding.query, "DecodingQuery"),
    "decoding_row": (decoding.row, "DecodingRow"),
    "decoding_attention": (decoding.attention, "DecodingAttention"),
    "decoding_chosen": (decoding.chosen, "DecodingChosen"),
    "decoding_index_row": (decoding.index_row, "DecodingIndexRow"),
    "decoding_select": (decoding.select, "DecodingSelect"),
    "decoding_read": (decoding.read, "DecodingRead"),
    "decoding_write": (decoding.write, "DecodingWrite"),
    "decoding_turn": (decoding.turn, "DecodingTurn"),
    "decoding_join": (decoding.join, "DecodingJoin"),
    "decoding_residual": (decoding.residual, "DecodingResidual"),
    "decoding_experts": (decoding.experts, "DecodingExperts"),
}
_FUSED = {
    # composed operator: what makes its Ascend form; the others are made of small ones there too
    "expanded_attention": ascend_attention.expanded,
    "selected_attention": ascend_attention.selected,
    "choose": ascend_attention.choose,
    "many_tokens": ascend_experts.many_tokens,
    "cross_entropy": cross_entropy.streamed,
}


def operator(name, dtype):
    """The form of operator `name` for the device that is set when a cell is made, and the dtype it will compute in.

    dtype: a MindSpore dtype or its name.
    """
    ascend_device = context.get_context("device_target") == "Ascend"
    if name in _SMALL:
        plain, fused, function = _SMALL[name]
        plain = fused if ascend_device else plain
    else:
        make, function = _COMPOSED[name]
        make = _FUSED.get(name, make) if ascend_device else make
        plain = make(lambda small: operator(small, dtype))
    if function and not ascend_device and dtype in ("float32", ms.float32) and compiled.available():
        return compiled.form(function, plain)
    return plain
