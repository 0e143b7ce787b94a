"""A function, an operator's form for example, as a compiled graph."""
import mindspore as ms


class Call(ms.nn.Cell):
    def __init__(self, function, *constants):
        super().__init__()
        self.function, self.constants = function, constants

    def construct(self, *arguments):
        return self.function(*arguments, *self.constants)
