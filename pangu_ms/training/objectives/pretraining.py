"""The objective of pretraining and of supervised finetuning: all parts of the loss, and how the experts were loaded."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.architectures.adapters import is_adapter
from pangu_ms.architectures.tensors import has_gradient
from pangu_ms.errors import ConfigError
from pangu_ms.model.cross_entropy import LogShare, cross_entropy
from pangu_ms.model.linear import dense_weight
from pangu_ms.model.trace import tokens_ahead
from pangu_ms.parallel import collectives
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.objectives.balance import balance_loss, expert_load, z_loss
from pangu_ms.training.objectives.indexer import IndexerLoss
from pangu_ms.training.objectives.masks import mtp_mask, real_rows


class Pretraining(nn.Cell):
    """What is minimised, for a model and `TrainingSettings`.

    `construct(input_ids int32 [B, T], labels int32 [B, T], loss_mask float32 [B, T], position_ids int32 [B, T])`: row p
    predicts labels[p], the token behind it, and counts where loss_mask is one. Several documents may lie in a row:
    position_ids begin at 0 with each, and attention, convolutions and MTP labels stay inside. -> the total, a scalar;
    its parts [P], named by `part_names`, without their weights; load [M, E], tokens by MoE layer and expert; and where
    settings give a threshold for them, the largest logits of attention, float32 [L, heads], by layer of `layers`.

    Padding, documents of which no row counts, is in no loss and in no load.

    Where several ranks have sequences of their own, their totals and parts are to be averaged, and give what all the
    sequences would together.

    With the indexer's dense loss, the warm-up, nothing else is computed, and only the indexers are trained.

    Attributes:
        part_names (tuple[str, ...]):
        moe_layers (tuple[int, ...]): places in `plan.layers` of the rows of load.
        biased (bool): the routers of these layers have selection biases.
        layers (tuple[Layer, ...]): of the plan, those that are computed.
        qk_clip_threshold (float): of the settings.
    """

    def __init__(self, causal_lm, settings):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        plan, ranks = causal_lm.plan, causal_lm.ranks
        self.warm_up, self.trunk = settings.indexer_loss == "dense", len(plan.trunk)
        self.depths = 0 if self.warm_up else len(plan.mtp_layers)
        self.layers, self.qk_clip_threshold = plan.layers[:self.trunk + self.depths], settings.qk_clip_threshold
        self.largest_logits, layers = self.qk_clip_threshold > 0, list(enumerate(self.layers))
        self.moe_layers = tuple(place for place, layer in layers if layer.moe)
        self.indexed_layers = tuple(place for place, layer in layers if layer.attention.indexer)
        moes = [layer.feed_forward for _, layer in layers if layer.moe]         # all of one kind
        self.experts, self.scoring = (moes[0].num_experts, moes[0].scoring) if moes else (0, None)
        self.biased = bool(moes) and moes[0].selection_bias
        balance = settings.balance_loss_coeff
        if balance is None:
            balance = moes[0].balance_loss_coeff if moes else 0.0
        self.balanced, self.z = (coeff > 0 and len(moes) > 0 and not self.warm_up
                                 for coeff in (balance, settings.z_loss_coeff))
        if ByStep.of(settings.router_bias_update_rate).largest > 0 and moes and not self.biased:
            raise ConfigError(f"pangu_training.router_bias_update_rate: found {settings.router_bias_update_rate}, but "
                              "no router of the model has a selection bias; take 0")
        self.indexed = settings.indexer_loss != "off"
        if self.indexed and not self.indexed_layers:
            raise ConfigError(f"pangu_training.indexer_loss: found {settings.indexer_loss}, but no layer of the model "
                              "has an indexer; take \"off\"")
        if self.indexed:
            self.indexer_losses = nn.CellList([IndexerLoss(causal_lm.model.layers[i].self_attn, not self.warm_up)
                                               for i in self.indexed_layers], auto_prefix=False)
        self.shared_head = SharedHeadLoss(plan, ranks) if ranks.tensor > 1 else None
        self.ranks, self.sum = ranks.batch, collectives.reduce(ranks, "batch")
        self.part_names, self.weights = self._parts(settings, balance)
        self.head = causal_lm.head_matrix

    def _parts(self, settings, balance):
        parts = [] if self.warm_up else [("lm", 1.0)]
        parts += [(f"mtp_{depth}", settings.mtp_loss_weight / self.depths) for depth in range(1, self.depths + 1)]
        parts += [("indexer_kl", settings.indexer_loss_coeff)] * self.indexed
        parts += [("balance", balance)] * self.balanced
        parts += [("z", settings.z_loss_coeff)] * self.z
        names, weights = zip(*parts)
        return names, ms.Tensor(weights, ms.float32)

    def trained_parameters(self):
        """The parameters that have a gradient, in the model's order: the routers' biases follow counts instead.

        Of a model with an adapter those of the adapter.
        """
        if adapter := [parameter for parameter in self.causal_lm.get_parameters() if is_adapter(parameter.name)]:
            return adapter
        return [parameter for name, parameter in self.causal_lm.parameters_and_names()
                if (".indexer." in name if self.warm_up else has_gradient(name))]

    def construct(self, input_ids, labels, loss_mask, position_ids):
        step = self.causal_lm.whole(position_ids, not self.warm_up, self.largest_logits)
        merged, layers = self.causal_lm.model(input_ids, step, None)
        routings, largest = (), ()
        for i in self.moe_layers:
            if i < self.trunk:
                routings = routings + (layers[i][1]["routing"],)
        if self.largest_logits:
            for i in range(self.trunk):
                largest = largest + (layers[i][1]["largest_logits"],)
        real = real_rows(loss_mask, position_ids)
        weight = real * self._share(real)
        parts = ()
        if not self.warm_up:
            parts = parts + (self._cross_entropy(self.causal_lm.model.norm(merged), labels, loss_mask),)
        hidden = self.causal_lm.mtp_hidden(merged)
        for depth in range(1, self.depths + 1):
            hidden, normed, pieces = self.causal_lm.mtp(depth, tokens_ahead(input_ids, depth), hidden, step, None)
            routings, largest = routings + (pieces["routing"],), largest + (pieces["largest_logits"],)
            mask = mtp_mask(loss_mask, position_ids, depth)
            parts = parts + (self._cross_entropy(normed, tokens_ahead(labels, depth), mask),)
        if self.indexed:
            total = 0.0
            for i, layer in enumerate(self.indexed_layers):
                total = total + self.indexer_losses[i](layers[layer][1]["index"], step, weight)
            parts = parts + (total / len(self.indexed_layers),)
        loads, balance, z = (), 0.0, 0.0
        for routing in routings:
            load = expert_load(routing["ids"], self.experts, real)
            loads = loads + (ops.sum(load, 0),)
            balance = balance + balance_loss(load, routing["logits"], real, self.scoring)
            z = z + z_loss(routing["logits"], weight)
        if self.balanced:
            parts = parts + (balance / len(routings),)
        if self.z:
            parts = parts + (z / len(routings),)
        parts = ops.stack(parts)
        loads = ops.stack(loads) if self.moe_layers else ops.zeros((0, 1), ms.float32)
        total, parts, loads = ops.sum(parts * self.weights), ops.stop_gradient(parts), ops.stop_gradient(loads)
        if self.largest_logits:
            return total, parts, loads, ops.stack(largest)
        return total, parts, loads

    def _cross_entropy(self, normed, labels, mask):
        """The mean over the rows of all ranks where mask is one, 0 if it never is; `ranks` times the own share."""
        if self.shared_head is None:
            each = cross_entropy(normed, self.head, labels, mask)
        else:
            each = self.shared_head(normed, self.head, labels, mask)
        return ops.sum(each) * self._share(mask)

    def _share(self, mask):
        """Of a row in the mean over the rows of all ranks where mask is one; `ranks` times that."""
        counted = self.sum(ops.reshape(ops.sum(mask), (1,)))[0]                 # a scalar is no message
        return self.ranks / ops.maximum(counted, 1.0)


class SharedHeadLoss(nn.Cell):
    """`cross_entropy` where each tensor parallel rank has the head of its range of the vocabulary."""

    def __init__(self, plan, ranks):
        super().__init__()
        first = ranks.tensor_rank * (plan.vocab_size // ranks.tensor)
        self.copy = collectives.copy(ranks, "tensor")
        largest = _Largest(collectives.gather_columns(ranks))
        self.log_share = LogShare(first, collectives.reduce(ranks, "tensor"), largest)

    def construct(self, hidden, head, labels, mask):
        """hidden [B, T, H], normed, head [V / ranks, H], labels int32 [B, T], mask float32 [B, T] -> [B, T]."""
        flat = ops.reshape(self.copy(hidden), (-1, hidden.shape[-1]))
        share = self.log_share(flat, dense_weight(head), ops.reshape(labels, (-1,)))[0]
        return ops.reshape(share, labels.shape) * mask


class _Largest(nn.Cell):
    """x [N] -> the largest of each place over the ranks that `gather` asks."""

    def __init__(self, gather):
        super().__init__()
        self.gather = gather

    def construct(self, x):
        return ops.ReduceMax()(self.gather(ops.reshape(x, (1, -1, 1))), -1)[0]
