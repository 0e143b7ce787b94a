"""The compiled forms for the CPU: C++ operators of `cpu/`, float32 alone, there when the library was built at install.

Each stands in for a plain form: same arguments, same result up to rounding, and a compiled gradient or the plain form's.
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
from mindspore.ops.composite.multitype_ops.zeros_like_impl import zeros_like

OUTPUTS = {"HyperConnectionRead": (ms.float32,) * 3, "Route": (ms.int32, ms.float32)}  # where it is not one float32
GRADIENTS = {  # operator with a compiled gradient: the arguments that have one. The others are constants of a model
    "Linear": ("x", "weight"),
    "RmsNorm": ("x", "weight"),
    "Swiglu": ("gate", "up"),
    "Rotate": ("x",),
    "ShortConv": ("x", "past", "weight"),
    "HyperConnectionRead": ("streams", "gamma", "phi", "alpha", "beta"),
    "HyperConnectionWrite": ("y", "post", "mix", "streams"),
    "HyperConnectionMerge": ("streams", "gamma", "phi", "alpha", "beta"),
    "LatentRows": ("latent", "kv", "weight"),
    "MaskedSoftmax": ("score",),
    "ExpandedAttention": ("q", "sinks", "keys", "kv_b"),
    "Route": ("logits",),
    "Experts": ("x", "weights", "gate", "up", "down"),
    "CrossEntropy": ("hidden", "weight"),
    "FeedForward": ("x", "gate", "up", "down"),
}


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
    """The operator `function` of the library, with the arguments of `plain`, and its gradient or the compiled one."""
    arguments = list(inspect.signature(plain).parameters)
    outputs = OUTPUTS.get(function, (ms.float32,))
    if function in GRADIENTS:
        gradient = _compiled_gradient(function, arguments, len(outputs))
    else:
        gradient = ops.GradOperation(get_all=True, sens_param=True)(plain)     # leaves out what it knows as constant
    return _operator(function, arguments, outputs, _bprop(gradient, len(arguments)))


def _operator(function, inputs, outputs, bprop=None):
    info = CustomRegOp(function)
    for i, name in enumerate(inputs):
        info.input(i, name)
    for i in range(len(outputs)):
        info.output(i, f"y{i}")
    info = info.dtype_format(*[DataType.None_None] * (len(inputs) + len(outputs))).target("CPU").get_op_info()
    return ops.Custom(f"{_library()}:{function}", out_shape=None, out_dtype=outputs if outputs[1:] else outputs[0],
                      func_type="aot", bprop=bprop, reg_info=info)


def _compiled_gradient(function, arguments, outputs):
    """`function`Gradient: the arguments, then the gradient of each output -> gradients of GRADIENTS[function].

    Called like a gradient of the plain form: (arguments ..., the gradient of the output or a tuple of them) -> one
    gradient for each argument, zeros where there is none.
    """
    names = GRADIENTS[function]
    operator = _operator(f"{function}Gradient", arguments + [f"d{i}" for i in range(outputs)],
                         (ms.float32,) * len(names))
    place = [names.index(name) if name in names else None for name in arguments]
    several, single = outputs > 1, len(names) == 1

    def gradient(*given):
        given, dout = given[:-1], given[-1]
        found = operator(*given, *dout) if several else operator(*given, dout)
        found = (found,) if single else found
        gradients = ()
        for i, at in enumerate(place):
            gradients = gradients + ((zeros_like(given[i]) if at is None else found[at]),)
        return gradients

    return gradient


def _bprop(gradient, inputs):
    """The `bprop` of an operator with so many inputs. MindSpore counts its parameters, hence one for each number."""

    def two(a, b, out, dout):
        return gradient(a, b, dout)

    def three(a, b, c, out, dout):
        return gradient(a, b, c, dout)

    def four(a, b, c, d, out, dout):
        return gradient(a, b, c, d, dout)

    def five(a, b, c, d, e, out, dout):
        return gradient(a, b, c, d, e, dout)

    def six(a, b, c, d, e, f, out, dout):
        return gradient(a, b, c, d, e, f, dout)

    def seven(a, b, c, d, e, f, g, out, dout):
        return gradient(a, b, c, d, e, f, g, dout)

    return {2: two, 3: three, 4: four, 5: five, 6: six, 7: seven}[inputs]
