"""What a run trains besides the language model: the `pangu_training` section of a YAML file."""
import dataclasses
from dataclasses import dataclass

from pangu_ms.errors import ConfigError
from pangu_ms.training.by_step import ByStep
from pangu_ms.yaml_file import check_section

INDEXER_LOSS = ("off", "dense", "sparse")
DEPTH_SCALED = "depth_scaled"
NORMAL, TINY = INITIALIZERS = ("normal", "tiny")


@dataclass(frozen=True)
class TrainingSettings:
    """Weights of the losses, and rates. The defaults are those of public training code (section 11).

    Attributes:
        mtp_loss_weight: weight of the MTP losses' mean over depths.
        indexer_loss: "off"; "dense" is the warm-up: DSA layers see everything, the indexer learns where they look, and
            all else is frozen; "sparse": DSA layers see what the indexer selects, and it learns among that.
        indexer_loss_coeff: weight of the indexer loss's mean over DSA layers. "dense" has no other loss.
        balance_loss_coeff: weight of the sequence-wise balance loss's mean over MoE layers. 0: it is not computed.
            None: what config.json says of the model, or 0.
        z_loss_coeff: weight of the router z loss's mean over MoE layers. 0: it is not computed.
        router_bias_update_rate: how far each optimizer step moves the selection bias of an expert towards an even load.
            [[step, rate], ...], a `ByStep` here: by the number of steps before; 0 leaves the biases as they are.
        moe_init_std: standard deviation of a new model's experts and routers.
        post_norm_init: weight of the norms behind attention and feed-forward in a new model. With 1, as in public code,
            the first sublayer drowns the embedding, and routers send all tokens the same way until these weights have
            come down. "depth_scaled": the weights of Pangu Ultra 135B, which fall with the number of layers.
        initializer: "normal": projections have the model's initializer_range, experts moe_init_std. "tiny": all linear
            maps have the standard deviation of Pangu Ultra 135B, which falls with width and number of layers.
        batch_ramp: [[step, sequences], ...], a `ByStep` here: how many sequences a step has on all devices. None: those
            of runner_config.
        skip_nonfinite: how many steps in a row may change nothing because their loss or gradient norm is not finite.
        qk_clip_threshold: heads with a larger attention logit get smaller query and key weights. 0: logits are not
            looked at.

    Raises:
        ConfigError: a value that is out of its range.
    """

    mtp_loss_weight: float = 1.0
    indexer_loss: str = "off"
    indexer_loss_coeff: float = 1.0
    balance_loss_coeff: float | None = None
    z_loss_coeff: float = 0.0
    router_bias_update_rate: float | ByStep = 0.0
    moe_init_std: float = 0.00206
    post_norm_init: float | str = 1.0
    initializer: str = NORMAL
    batch_ramp: ByStep | None = None
    skip_nonfinite: int = 0
    qk_clip_threshold: float = 0.0

    def __post_init__(self):
        if isinstance(self.router_bias_update_rate, list):
            rates = ByStep.read("pangu_training.router_bias_update_rate", self.router_bias_update_rate, 0)
            object.__setattr__(self, "router_bias_update_rate", rates)
        if not isinstance(self.batch_ramp, ByStep | None):
            object.__setattr__(self, "batch_ramp", ByStep.read("pangu_training.batch_ramp", self.batch_ramp, 1, (int,)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float or field.type == float | None and value is not None \
                    or field.type == float | ByStep and not isinstance(value, ByStep):
                if type(value) not in (int, float) or not 0 <= value < float("inf"):
                    raise ConfigError(f"pangu_training.{field.name}: found {value!r}, wanted a number of at least 0")
                object.__setattr__(self, field.name, float(value))
        if self.post_norm_init != DEPTH_SCALED:
            if type(self.post_norm_init) not in (int, float) or not 0 < self.post_norm_init < float("inf"):
                raise ConfigError(f"pangu_training.post_norm_init: found {self.post_norm_init!r}, wanted a positive "
                                  f"number or {DEPTH_SCALED}")
            object.__setattr__(self, "post_norm_init", float(self.post_norm_init))
        if self.initializer not in INITIALIZERS:
            raise ConfigError(f"pangu_training.initializer: found {self.initializer!r}, wanted one of "
                              f"{', '.join(INITIALIZERS)}")
        if self.initializer == TINY and self.moe_init_std != type(self).moe_init_std:
            raise ConfigError(f"pangu_training.moe_init_std: found {self.moe_init_std} with initializer {TINY}, wanted "
                              "one of the two: it draws experts and routers as all other linear maps")
        if self.indexer_loss not in INDEXER_LOSS:
            raise ConfigError(f"pangu_training.indexer_loss: found {self.indexer_loss!r}, wanted one of "
                              f"{', '.join(INDEXER_LOSS)} (in YAML off is false: put it in quotes)")
        if type(self.skip_nonfinite) is not int or self.skip_nonfinite < 0:
            raise ConfigError(f"pangu_training.skip_nonfinite: found {self.skip_nonfinite!r}, wanted a whole number of "
                              "at least 0")

    @classmethod
    def from_dict(cls, fields):
        """The settings of a YAML section; `ConfigError` names an unknown key and the nearest known one."""
        check_section("pangu_training", fields, [field.name for field in dataclasses.fields(cls)])
        return cls(**fields)
