"""The compiled forms for the CPU: C++ operators of `cpu/`, float32 alone, there when the library was built at install.

Each stands in for a plain form: same arguments, same result up to rounding, and the plain form's gradient.
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

OUTPUTS = {"HyperConnectionRead": (ms.float32,) * 3, "Route": (ms.int32, ms.float32)}  # where it is not one float32


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
    """The operator `function` of the library, with the arguments and the gradient of `plain`."""
    inputs, outputs = list(inspect.signature(plain).parameters), OUTPUTS.get(function, (ms.float32,))
    info = CustomRegOp(function)
    for i, name in enumerate(inputs):
        info.input(i, name)
    for i in range(len(outputs)):
        info.output(i, f"y{i}")
    info = info.dtype_format(*[DataType.None_None] * (len(inputs) + len(outputs))).target("CPU").get_op_info()
    return ops.Custom(f"{_library()}:{function}", out_shape=None, out_dtype=outputs if outputs[1:] else outputs[0],
                      func_type="aot", bprop=_gradient(plain, len(inputs)), reg_info=info)


def _gradient(plain, inputs):
    """The `bprop` of an operator with so many inputs. MindSpore counts its parameters, hence one for each number."""
    gradient = ops.GradOperation(get_all=True, sens_param=True)(plain)

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
