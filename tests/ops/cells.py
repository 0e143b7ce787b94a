"""A formula as a compiled graph, and its plain form op by op."""
import os
from contextlib import contextmanager

import mindspore as ms

from pangu_ms import device


class Call(ms.nn.Cell):
    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def construct(self, *arguments):
        return self.function(*arguments, *self.constants)


def op_by_op(function, *arguments):
    """function(*arguments) of formulas alone, without a graph: nothing to compile."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with plain_formulas():
            return function(*arguments)
    finally:
        device.start()


@contextmanager
def plain_formulas():
    """In here nothing compiled takes a formula's place."""
    before = os.environ.get("PANGU_MS_COMPILED_OPS")
    os.environ["PANGU_MS_COMPILED_OPS"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PANGU_MS_COMPILED_OPS"]
        else:
            os.environ["PANGU_MS_COMPILED_OPS"] = before
