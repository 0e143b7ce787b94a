"""Operators that differ by device, and the one table that chooses among their forms."""
from mindspore import context

from pangu_ms.ops import ascend, experts, portable

_FORMS = {
    # operator: (portable form, Ascend form)
    "rms_norm": (portable.rms_norm, ascend.rms_norm),
    "swiglu": (portable.swiglu, ascend.swiglu),
    "softmax": (portable.softmax, ascend.softmax),
    "sigmoid": (portable.sigmoid, ascend.sigmoid),
    "rotate": (portable.rotate, portable.rotate),
    "top_k": (portable.top_k, portable.top_k),
    "few_tokens": (experts.few_tokens, experts.few_tokens),
    "many_tokens": (experts.many_tokens, experts.many_tokens),
}


def operator(name):
    """The form of operator `name` for the device that is set when a cell is made."""
    return _FORMS[name][context.get_context("device_target") == "Ascend"]
