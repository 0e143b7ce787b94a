"""The compiled forms for the CPU: C++ operators of `cpu/`, float32 alone, there when the library was built at install.

Each stands in for a plain form: same arguments, same result up to rounding. The gradient is compiled too
(`gradients.py`), or the plain form's.
PANGU_MS_COMPILED_OPS=0 in the environment turns them off.
"""
import ctypes
import functools
import inspect
import os
from pathlib import Path

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from pangu_ms.ops.gradients import BPROPS

OUTPUTS = {  # where it is not one float32
    "RotaryAngles": (ms.float32,) * 2, "HyperConnectionRead": (ms.float32,) * 3, "Route": (ms.int32, ms.float32),
    "DecodingQuery": (ms.float32,) * 2, "DecodingRead": (ms.float32,) * 3, "DecodingTurn": (ms.float32,) * 4,
    "DecodingSelect": (ms.int32,), "DecodingJoin": (ms.float32,) * 2, "DecodingResidual": (ms.float32,) * 2,
    "DecodingExperts": (ms.float32, ms.int32, ms.float32),
}
NO_GRADIENT = ("Decoding", "RotaryAngles")  # how their names begin


def available():
    """Whether the library is built, and for a machine like this one, and not turned off."""
    return os.environ.get("PANGU_MS_COMPILED_OPS") != "0" and _library() is not None


@functools.cache
def _library():
    for path in Path(__file__).parent.glob("_cpu*.so"):
        if ctypes.CDLL(str(path)).machine_supported():
            return path
    return None


def form(function, plain):
    """The operator `function` of the library: the arguments of `plain`, and its gradient where none is compiled."""
    arguments, outputs = list(inspect.signature(plain).parameters), OUTPUTS.get(function, (ms.float32,))
    if function in BPROPS:
        bprop, gradients = BPROPS[function]
        given = [f"d{i}" for i in range(len(outputs))]
        bprop = bprop(_operator(f"{function}Gradient", arguments + given, (ms.float32,) * gradients))
    else:
        bprop = None if function.startswith(NO_GRADIENT) else _plain_bprop(plain, len(arguments))
    return _operator(function, arguments, outputs, bprop)


def _operator(function, inputs, outputs, bprop=None):
    info = CustomRegOp(function)
    for i, name in enumerate(inputs):
        info.input(i, name)
    for i in range(len(outputs)):
        info.output(i, f"y{i}")
    info = info.dtype_format(*[DataType.None_None] * (len(inputs) + len(outputs))).target("CPU").get_op_info()
    return ops.Custom(f"{_library()}:{function}", out_shape=None, out_dtype=outputs if outputs[1:] else outputs[0],
                      func_type="aot", bprop=bprop, reg_info=info)


def _plain_bprop(plain, inputs):
    """For an operator that training does not use. Inputs that MindSpore knows as constants must come last."""
    gradient = ops.GradOperation(get_all=True, sens_param=True)(plain)

    def five(a, b, c, d, e, out, dout):
        return gradient(a, b, c, d, e, dout)

    def six(a, b, c, d, e, f, out, dout):
        return gradient(a, b, c, d, e, f, dout)

    return {5: five, 6: six}[inputs]
