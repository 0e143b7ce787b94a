"""A function, an operator's form for example, as a compiled graph."""
import mindspore as ms


class Call(ms.nn.Cell):
    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def construct(self, *arguments):
        return self.function(*arguments, *self.constants)


def op_by_op(function, *arguments):
    """function(*arguments) without a graph: nothing to compile."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        return function(*arguments)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
