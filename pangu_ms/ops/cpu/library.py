"""The compiled operators for the CPU, C++ of this folder: float32 alone, there when the library was built at install.

PANGU_MS_COMPILED_OPS=0 in the environment turns them off.
"""
import ctypes
import functools
import os
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType
from mindspore.ops.primitive import constexpr

from pangu_ms.ops.cpu.gradients import BPROPS

# Operator of the library: its inputs. Numbers that are no tensors come last.
INPUTS = {
    "Linear": "x weight",
    "LinearBias": "x weight bias",
    "RmsNorm": "x weight eps",
    "Swiglu": "gate up",
    "MaskedSoftmax": "score visible scale",
    "Rotate": "x cos sin start interleaved",
    "RotaryAngles": "position coarse fine",
    "ShortConv": "x past weight mask",
    "Remember": "ring new read write decode",
    "HyperConnectionRead": "streams gamma phi alpha beta eps rounds",
    "HyperConnectionWrite": "y post mix streams",
    "HyperConnectionMerge": "streams gamma phi alpha beta eps",
    "LatentRows": "latent kv norm cos sin eps interleaved",
    "ExpandedAttention": "q sinks keys visible kv_b scale",
    "ExpandedAttentionLargest": "q sinks keys visible kv_b scale",
    "AbsorbedAttention": "q sinks keys visible kv_b scale",
    "GroupedAttention": "q keys values sink_keys sink_values visible scale",
    "GroupedAttentionLargest": "q keys values sink_keys sink_values visible scale",
    "Route": "logits bias scale softmax grouped normalise",
    "Experts": "x ids weights gate up down",
    "FeedForward": "x gate up down",
    "CrossEntropy": "hidden weight labels mask",
    "DecodingQuery": "x down taps conv norm up position cos sin nope eps interleaved",
    "DecodingRow": "x down taps conv norm kept position cos sin eps interleaved",
    "DecodingAttention": "q latent k_pe norm kept kv_b taps conv out position window scale eps",
    "DecodingChosen": "q latent k_pe norm kept kv_b taps conv out position indices scale eps",
    "DecodingIndexRow": "x key norm kept position cos sin eps",
    "DecodingSelect": "x key norm kept position cos sin q_latent query head_weights places eps",
    "DecodingRead": "streams norm gamma phi alpha beta eps rounds norm_eps",
    "DecodingWrite": "y norm post mix streams eps",
    "DecodingTurn": "y norm post mix streams next_norm gamma phi alpha beta eps rounds norm_eps",
    "DecodingAdd": "y norm x eps",
    "DecodingResidual": "x y norm next_norm eps",
    "DecodingGroupedRows": "x query query_bias key key_bias value value_bias norm keys values position cos sin width "
                           "eps interleaved",
    "DecodingJoin": "embedding embedding_norm hidden hidden_norm projection eps",
    "DecodingExperts": "x gate bias scale factor gates ups downs shared_gate shared_up shared_down softmax grouped "
                       "normalise",
}
OUTPUTS = {  # where it is not one float32
    "RotaryAngles": (ms.float32,) * 2, "HyperConnectionRead": (ms.float32,) * 3, "Route": (ms.int32, ms.float32),
    "ExpandedAttentionLargest": (ms.float32,) * 2, "GroupedAttentionLargest": (ms.float32,) * 2,
    "DecodingQuery": (ms.float32,) * 2, "DecodingRead": (ms.float32,) * 3, "DecodingTurn": (ms.float32,) * 4,
    "DecodingSelect": (ms.int32,), "DecodingResidual": (ms.float32,) * 2,
    "DecodingExperts": (ms.float32, ms.int32, ms.float32),
}


def available(dtype):
    """Whether the library is built for a machine like this one, takes this dtype, and is not turned off.

    An integer dtype says nothing of what is computed with: it is taken.
    """
    wanted = dtype not in (ms.float16, ms.bfloat16, ms.float64)
    return wanted and os.environ.get("PANGU_MS_COMPILED_OPS") != "0" and _library() is not None


@functools.cache
def _library():
    for path in Path(__file__).parents[1].glob("_cpu*.so"):
        if ctypes.CDLL(str(path)).machine_supported():
            return path
    return None


@constexpr
def absent(*shape):
    """What an operator is given in place of a tensor that a layer does not have: it holds no number."""
    return ms.Tensor(np.zeros(shape or (0,), np.float32))


@constexpr
def operator(name):
    """The operator of the library, with its gradient where one is compiled."""
    return _operator(name)


@functools.cache
def _operator(name):
    inputs, outputs, bprop = INPUTS[name].split(), OUTPUTS.get(name, (ms.float32,)), None
    if name in BPROPS:
        make, gradients = BPROPS[name]
        # What gives the largest logits too has the gradient operator of what does not.
        given = [f"d{i}" for i in range(1 if name.endswith("Largest") else len(outputs))]
        bprop = make(_custom(f"{name.removesuffix('Largest')}Gradient", inputs + given, (ms.float32,) * gradients))
    return _custom(name, inputs, outputs, bprop)


def _custom(name, inputs, outputs, bprop=None):
    info = CustomRegOp(name)
    for i, each in enumerate(inputs):
        info.input(i, each)
    for i in range(len(outputs)):
        info.output(i, f"y{i}")
    info = info.dtype_format(*[DataType.None_None] * (len(inputs) + len(outputs))).target("CPU").get_op_info()
    return ops.Custom(f"{_library()}:{name}", out_shape=None, out_dtype=outputs if outputs[1:] else outputs[0],
                      func_type="aot", bprop=bprop, reg_info=info)
