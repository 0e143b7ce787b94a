"""Optimizer states divided among ranks that hold the same parameters (the first stage of ZeRO, arXiv:1910.02054).

Each rank keeps the states of a part of them, float32 master copies included, and updates that part; then all gather the
parts. As their gradients are equal, the result is that of undivided states. All ranks have the same graph but for the
number at which their part begins: where graphs differ, MindSpore may start collectives in different orders.
"""
import mindspore as ms
import numpy as np
from mindspore import nn, ops

from pangu_ms.training.parallel import filled


class DividedMuon(nn.Cell):
    """`Muon` for equal parameters, of which each rank has as many; what is missing for that is zero and stays so.

    Args:
        params: of all ranks.
        make: from float32 parameters to their `Muon`.
        parallel, dimension: the ranks that hold `params` alike.
    """

    def __init__(self, params, make, parallel, dimension):
        super().__init__(auto_prefix=False)
        ranks = parallel.size(dimension)
        self.params, self.places = ms.ParameterTuple(params), tuple(range(len(params)))
        count = -(-len(params) // ranks)                                        # of one rank
        self.length, self.first, self.own_places = ranks * count, parallel.index(dimension) * count, tuple(range(count))
        self.muon = make([_part(params, place, params[0].shape) for place in self.own_places])
        self.all_rows, self.each = parallel.all_rows(dimension), ops.Map()
        self.set_states({})

    def construct(self, gradients, rate, powers):
        rows = ops.narrow(filled(ops.stack(gradients), self.length), 0, self.first, len(self.own_places))
        own = self.muon(self.each(ops.partial(_row, rows), self.own_places), rate, powers)
        rows = self.all_rows(ops.cast(ops.stack(own), self.params[0].dtype))    # [length, ...]
        return self.each(ops.partial(_take_row, rows), self.params, self.places)

    def state_names(self):
        """Those of an undivided `Muon`."""
        return {f"{kind}.{parameter.name}" for kind in self._kinds() for parameter in self.params}

    def states(self):
        """Name -> float32 array of the whole states; on all ranks at once."""
        found = {}
        for kind, parts in self._kinds().items():
            rows = self.all_rows(ms.Tensor(np.stack([part.asnumpy() for part in parts]))).asnumpy()
            found |= {f"{kind}.{parameter.name}": row for parameter, row in zip(self.params, rows)}
        return found

    def set_states(self, arrays):
        """What `states` gave; masters that it does not have become the parameters' present values."""
        for kind, parts in ({"master": self.muon.params} | self._kinds()).items():
            own = self.params[self.first:self.first + len(parts)]
            for part, parameter in zip(parts, own):
                part.set_data(ms.Tensor(_values(arrays, kind, parameter)))

    def _kinds(self):
        masters = {"master": self.muon.params} if self.params[0].dtype != ms.float32 else {}
        return {"muon": self.muon.moments} | masters


class DividedAdamW(nn.Cell):
    """`AdamW` for parameters of one dtype, of each of which every rank has as many values, one behind the other.

    Args: as of `DividedMuon`.
    """

    def __init__(self, params, make, parallel, dimension):
        super().__init__(auto_prefix=False)
        ranks, self.index = parallel.size(dimension), parallel.index(dimension)
        self.params = ms.ParameterTuple(params)
        self.sizes = tuple(-(-parameter.size // ranks) for parameter in params)
        self.starts = tuple(sum(self.sizes[:i]) for i in range(len(params)))
        self.lengths = tuple(ranks * size for size in self.sizes)
        self.adamw = make([_part([parameter], 0, (size,)) for parameter, size in zip(params, self.sizes)])
        self.all_rows, self.each = parallel.all_rows(dimension), ops.Map()
        self.set_states({})

    def construct(self, gradients, rate, powers):
        parts = self.each(ops.partial(_own_values, self.index), gradients, self.sizes, self.lengths)
        own = ops.cast(ops.cat(self.adamw(parts, rate, powers)), self.params[0].dtype)
        rows = self.all_rows(ops.expand_dims(own, 0))                           # [ranks, all sizes]
        return self.each(ops.partial(_take_values, rows), self.params, self.starts, self.sizes)

    def state_names(self):
        return {f"{kind}.{parameter.name}" for kind in self._kinds() for parameter in self.params}

    def states(self):
        found = {}
        for kind, parts in self._kinds().items():
            own = np.concatenate([part.asnumpy() for part in parts])
            rows = self.all_rows(ms.Tensor(own[None])).asnumpy()
            for parameter, start, size in zip(self.params, self.starts, self.sizes):
                values = rows[:, start:start + size].reshape(-1)[:parameter.size]
                found[f"{kind}.{parameter.name}"] = values.reshape(parameter.shape)
        return found

    def set_states(self, arrays):
        for kind, parts in ({"master": self.adamw.params} | self._kinds()).items():
            for part, parameter, size, length in zip(parts, self.params, self.sizes, self.lengths):
                whole = np.zeros(length, np.float32)
                whole[:parameter.size] = _values(arrays, kind, parameter).reshape(-1)
                part.set_data(ms.Tensor(whole[self.index * size:(self.index + 1) * size]))

    def _kinds(self):
        masters = {"master": self.adamw.params} if self.params[0].dtype != ms.float32 else {}
        return {"adam_m": self.adamw.first, "adam_v": self.adamw.second} | masters


def _part(params, place, shape):
    """Of a rank; under a name that is the same on all ranks."""
    return ms.Parameter(ops.zeros(shape, ms.float32), f"part_{place}.{params[0].name}", requires_grad=False)


def _values(arrays, kind, parameter):
    """Of a state, as float32; zeros or the parameter itself where there is none."""
    name = f"{kind}.{parameter.name}"
    if name in arrays:
        return arrays[name]
    return parameter.astype(ms.float32).asnumpy() if kind == "master" else np.zeros(parameter.shape, np.float32)


def _row(rows, place):
    return ops.reshape(ops.narrow(rows, 0, place, 1), rows.shape[1:])


def _take_row(rows, parameter, place):
    return ops.assign(parameter, _row(rows, place))


def _own_values(index, gradient, size, length):
    flat = filled(ops.reshape(ops.cast(gradient, ms.float32), (-1,)), length)
    return ops.narrow(flat, 0, index * size, size)


def _take_values(rows, parameter, start, size):
    flat = ops.narrow(ops.reshape(ops.narrow(rows, 1, start, size), (-1,)), 0, 0, parameter.size)
    return ops.assign(parameter, ops.reshape(flat, parameter.shape))
