"""Cells that bench_train.py times. A file of their own, as importing MindSpore takes seconds."""
import mindspore as ms
from mindspore import nn


class Routing(nn.Cell):
    """ids, position int32 [B, T] -> for each of some layers of the trunk (expert ids, weights), [B, T, K] each."""

    def __init__(self, causal_lm, moe_layers):
        super().__init__(auto_prefix=False)
        self.causal_lm, self.moe_layers = causal_lm, tuple(moe_layers)

    def construct(self, ids, position):
        _, layers = self.causal_lm.model(ids, self.causal_lm.whole(position, True), None)
        found = ()
        for i in self.moe_layers:
            routing = layers[i][1]["routing"]
            found = found + ((routing["ids"], routing["weights"]),)
        return found


class ExpertsGradient(nn.Cell):
    """The product of one layer's routed experts and its gradients, called like `Experts`."""

    def __init__(self, experts):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ms.value_and_grad(experts, (0, 2), ms.ParameterTuple(experts.trainable_params()))

    def construct(self, x, ids, weights):
        return self.value_and_grad(x, ids, weights)
