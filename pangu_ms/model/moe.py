"""Sigmoid-routed experts with a selection bias, and the shared expert (section 7)."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.model.feed_forward import FeedForward
from pangu_ms.model.linear import Linear, parameter
from pangu_ms.ops import operator


class Stack(nn.Cell):
    """One matrix for each expert, stacked: weight [E, O, I]."""

    def __init__(self, experts, in_features, out_features, config):
        super().__init__()
        self.weight = parameter((experts, out_features, in_features), config)


class Experts(nn.Cell):
    """The experts of this rank: what a token has chosen elsewhere comes from there, in the sum over the ranks."""

    def __init__(self, config, parallel):
        super().__init__()
        count, hidden = config.n_routed_experts // parallel.expert, config.hidden_size
        width = config.moe_intermediate_size // parallel.tensor
        self.first = parallel.expert_rank * count
        self.see, self.give_back = parallel.to_experts()
        self.divided = parallel.expert > 1
        self.gate_proj = Stack(count, hidden, width, config)
        self.up_proj = Stack(count, hidden, width, config)
        self.down_proj = Stack(count, width, hidden, config)
        self.many_tokens = operator("many_tokens", config.compute_dtype)

    def construct(self, x, ids, weights):
        if self.divided:
            x, weights = self.see(x), self.see(weights)
            ids = ops.cast(self.see(ops.cast(ids, ms.float32)), ms.int32) - self.first      # a message is float
        return self.give_back(self.many_tokens(x, ids, weights, self.gate_proj.weight, self.up_proj.weight,
                                               self.down_proj.weight))


class MoE(nn.Cell):
    def __init__(self, config, parallel):
        super().__init__()
        self.normalise = config.norm_topk_prob
        self.scale = ms.Tensor([config.routed_scaling_factor] * config.num_experts_per_tok, ms.float32)  # by choice
        self.gate = Linear(config.hidden_size, config.n_routed_experts, config, ms.float32)
        self.e_score_correction_bias = parameter((config.n_routed_experts,), config, ms.float32, "zeros")
        self.experts = Experts(config, parallel)
        self.shared_experts = FeedForward(config.moe_intermediate_size * config.n_shared_experts, config, parallel)
        self.copy, self.reduce = parallel.copy("tensor"), parallel.reduce("tensor")
        self.route = operator("route", ms.float32)
        self.together = parallel.expert == 1  # routed and shared experts of a token are on one rank
        self.decoding = operator("decoding_experts", config.compute_dtype)

    def construct(self, x, decode):
        """x [B, T, H] -> y [B, T, H], and the routing: expert ids int32 and weights [B, T, K], logits [B, T, E].

        Decoding hands out no logits.
        """
        if decode and self.together:
            experts, shared = self.experts, self.shared_experts
            y, ids, weights = self.decoding(
                x, self.gate.weight, self.e_score_correction_bias, self.scale, self.normalise,
                experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight,
                shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
            return self.reduce(y), (ids, weights)
        logits = self.gate(ops.cast(x, ms.float32))                             # [B, T, E]
        ids, weights = self.route(logits, self.e_score_correction_bias, self.scale, self.normalise)
        seen = self.copy(x)
        y = self.reduce(self.experts(seen, ids, self.copy(weights)) + self.shared_experts(seen))
        return y, (ids, weights, logits)
