"""The forward of a training step: all parts of the loss, and how the experts were loaded."""
import mindspore as ms
from mindspore import nn, ops

from pangu_ms.errors import ConfigError
from pangu_ms.ops import operator
from pangu_ms.training.losses import IndexerLoss, ahead, balance_loss, expert_load, mtp_mask, real_rows, z_loss
from pangu_ms.training.parallel import SharedCrossEntropy


class TrainingForward(nn.Cell):
    """What is minimised, for a model and `TrainingSettings`.

    `construct(input_ids int32 [B, T], labels int32 [B, T], loss_mask float32 [B, T], position_ids int32 [B, T])`: row p
    predicts labels[p], the token behind it, and counts where loss_mask is one. Several documents may lie in a row:
    position_ids begin at 0 with each, and attention, convolutions and MTP labels stay inside. -> the total, a scalar;
    its parts [P], named by `part_names`, without their weights; load [M, E], tokens by MoE layer and expert.

    Padding, documents of which no row counts, is in no loss and in no load.

    Where several ranks have sequences of their own, their totals and parts are to be averaged, and give what all the
    sequences would together.

    With the indexer's dense loss, the warm-up, nothing else is computed, and only the indexers are trainable.
    """

    def __init__(self, causal_lm, settings):
        super().__init__(auto_prefix=False)  # the parameters keep the names they have in the model
        self.causal_lm = causal_lm
        config = causal_lm.config
        plans = config.layers
        self.warm_up = settings.indexer_loss == "dense"
        self.experts, self.trunk = config.n_routed_experts, config.num_hidden_layers
        self.moe_layers = [plan.index for plan in plans[:self.trunk] if plan.moe]
        self.depths = 0 if self.warm_up else config.num_nextn_predict_layers
        self.moe_count = len(self.moe_layers) + self.depths
        self.dsa_layers = [plan.index for plan in plans if plan.kind == "dsa"]
        self.balanced, self.z = (coeff > 0 and self.moe_count > 0 and not self.warm_up
                                 for coeff in (settings.balance_loss_coeff, settings.z_loss_coeff))
        self.indexed = settings.indexer_loss != "off"
        if self.indexed and not self.dsa_layers:
            raise ConfigError(f"pangu_training.indexer_loss: found {settings.indexer_loss}, but dsa_layers is empty: "
                              "the model has no indexer; take \"off\"")
        if self.indexed:
            self.indexer_losses = nn.CellList([IndexerLoss(causal_lm.model.layers[i].self_attn, not self.warm_up)
                                               for i in self.dsa_layers], auto_prefix=False)
        self.cross_entropy = operator("cross_entropy", config.compute_dtype)
        if causal_lm.parallel.tensor > 1:
            self.cross_entropy = SharedCrossEntropy(config, causal_lm.parallel)
        self.ranks, self.sum = causal_lm.parallel.batch, causal_lm.parallel.reduce("batch")
        self.part_names, self.weights = self._plan(settings)
        for name, parameter in causal_lm.parameters_and_names():
            routed_by_count = name.endswith("e_score_correction_bias")          # moved by counts, never by gradient
            parameter.requires_grad = not routed_by_count and (not self.warm_up or ".indexer." in name)

    def _plan(self, settings):
        parts = [] if self.warm_up else [("lm", 1.0)]
        parts += [(f"mtp_{depth}", settings.mtp_loss_weight / self.depths) for depth in range(1, self.depths + 1)]
        parts += [("indexer_kl", settings.indexer_loss_coeff)] * self.indexed
        parts += [("balance", settings.balance_loss_coeff)] * self.balanced
        parts += [("z", settings.z_loss_coeff)] * self.z
        names, weights = zip(*parts)
        return names, ms.Tensor(weights, ms.float32)

    def construct(self, input_ids, labels, loss_mask, position_ids):
        rows = self.causal_lm.rows(position_ids, None, False, not self.warm_up)
        merged, layers = self.causal_lm.model(input_ids, rows, None)
        routings = ()
        for i in self.moe_layers:
            routings = routings + (layers[i][-1],)
        real = real_rows(loss_mask, position_ids)
        weight = real * self._share(real)
        parts = ()
        if not self.warm_up:
            parts = parts + (self._cross_entropy(self.causal_lm.model.norm(merged), labels, loss_mask),)
        hidden = self.causal_lm.mtp_hidden(merged)
        for depth in range(1, self.depths + 1):
            hidden, routing = self.causal_lm.mtp(depth, ahead(input_ids, depth), hidden, rows, None)
            routings = routings + (routing,)
            normed = self.causal_lm.model.layers[self.trunk + depth - 1].shared_head(hidden)
            mask = mtp_mask(loss_mask, position_ids, depth)
            parts = parts + (self._cross_entropy(normed, ahead(labels, depth), mask),)
        if self.indexed:
            total = 0.0
            for i, layer in enumerate(self.dsa_layers):
                total = total + self.indexer_losses[i](layers[layer][2], rows, weight)
            parts = parts + (total / len(self.dsa_layers),)
        loads, balance, z = (), 0.0, 0.0
        for ids, _, logits in routings:
            load = expert_load(ids, self.experts, real)
            loads = loads + (ops.sum(load, 0),)
            balance, z = balance + balance_loss(load, logits, real), z + z_loss(logits, weight)
        if self.balanced:
            parts = parts + (balance / len(routings),)
        if self.z:
            parts = parts + (z / len(routings),)
        parts = ops.stack(parts)
        loads = ops.stack(loads) if self.moe_count else ops.zeros((0, self.experts), ms.float32)
        return ops.sum(parts * self.weights), ops.stop_gradient(parts), ops.stop_gradient(loads)

    def _cross_entropy(self, normed, labels, mask):
        """The mean over the rows of all ranks where mask is one, 0 if it never is; `ranks` times the own share."""
        return ops.sum(self.cross_entropy(normed, self.causal_lm.lm_head.weight, labels, mask)) * self._share(mask)

    def _share(self, mask):
        """Of a row in the mean over the rows of all ranks where mask is one; `ranks` times that."""
        counted = self.sum(ops.reshape(ops.sum(mask), (1,)))[0]                 # a scalar is no message
        return self.ranks / ops.maximum(counted, 1.0)
