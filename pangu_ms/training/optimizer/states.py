"""Float32 states beside parameters: moments, and master copies of parameters of another dtype."""
import mindspore as ms
from mindspore import ops


def write_back(parameter, master):
    """Nothing to do where the parameter is its own master."""
    return master if parameter.dtype == ms.float32 else ops.assign(parameter, ops.cast(master, parameter.dtype))


def master_copies(params):
    return ms.ParameterTuple([p if p.dtype == ms.float32 else new_state("master", p, p.astype(ms.float32))
                              for p in params])


def new_state(kind, parameter, values=None):
    values = ops.zeros(parameter.shape, ms.float32) if values is None else values
    return ms.Parameter(values, f"{kind}.{parameter.name}", requires_grad=False)
