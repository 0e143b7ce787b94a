"""openPangu R-72B-2512, Pro MoE V2: the fields of the released config.json, the plan of the network, its tensors.

Grouped-query attention with one projection for queries, keys and values, normed keys and learned sinks; norms on both
sides of each sublayer; experts chosen with a bias; one MTP layer (section 4 of the family). Needs no MindSpore.
"""
import dataclasses
import functools
import typing
from dataclasses import dataclass

from pangu_ms.architectures.chat import PRO_MOE_V2, Chat
from pangu_ms.architectures.fields import (
    COMPUTE_DTYPES, Config, choice_problems, listed, order_problems, size_problems,
)
from pangu_ms.architectures.openpangu_v2 import COPIES, DENSE, EMBEDDINGS, HEAD, MOE, MTP
from pangu_ms.architectures.pangu_embedded import group_problems
from pangu_ms.architectures.tensors import (
    HEAD_COLUMNS, KV_HEAD_COLUMNS, KV_HEAD_ROWS, NORMAL, ONE, OUTPUT, POST_ATTENTION_NORM, POST_MLP_NORM, WHOLE,
    Table,
)
from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import FeedForward, GroupedQueryAttention, Layer, MoE, Plan

CHOICES = {  # values that are implemented: no released model has another
    "compute_dtype": COMPUTE_DTYPES, "hidden_act": ("silu",), "attention_dropout": (0,), "sandwich_norm": (True,),
    "tie_word_embeddings": (False,), "router_enable_expert_bias": (True,),
}
# Switches that public code reads and no release sets.
OF_ANOTHER_NETWORK = ("interleaved_sliding_window", "param_sink_scalar", "param_sink_of_head_num",
                      "param_sink_of_head_dim", "qkv_bias", "attention_bias", "bias")
MAY_BE_ZERO = ("num_mtp_layers", "param_sink_number", "bos_token_id", "pad_token_id", "eos_token_id")
LARGEST = {"num_hidden_layers": 1000, "num_mtp_layers": 100, "num_experts": 10_000}

# name, shape in the words of `PanguProMoEV2Config.sizes`, how it is cut, component, storage note, initial values
EVERY_LAYER = (
    ("input_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
    ("self_attn.qkv_proj.weight", "qkv hidden", (KV_HEAD_ROWS,), "attention", None, NORMAL),
    ("self_attn.k_layernorm.weight", "qk", WHOLE, "attention", None, ONE),
    ("self_attn.o_proj.weight", "hidden heads*v", (HEAD_COLUMNS,), "attention", None, OUTPUT),
    ("post_attention_layernorm.weight", "hidden", WHOLE, "norm", None, POST_ATTENTION_NORM),
    ("pre_mlp_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
    ("post_mlp_layernorm.weight", "hidden", WHOLE, "norm", None, POST_MLP_NORM),
)
SINK_KEYS = (
    ("self_attn.param_sink_key", "sinks kv_heads qk", (KV_HEAD_COLUMNS,), "sink", None, NORMAL),
)
SINK_VALUES = (
    ("self_attn.param_sink_value", "sinks kv_heads v", (KV_HEAD_COLUMNS,), "sink", None, NORMAL),
)
TENSORS = Table(
    first=EMBEDDINGS,
    layers=(
        (lambda layer: True, EVERY_LAYER),
        (lambda layer: layer.attention.sinks, SINK_KEYS),
        (lambda layer: layer.attention.sinks and layer.attention.sink_values, SINK_VALUES),
        (lambda layer: not layer.moe, DENSE),
        (lambda layer: layer.moe, MOE),
        (lambda layer: layer.mtp_depth > 0, MTP),
    ),
    last=HEAD,
    copies=COPIES,
    spellings={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
)


@dataclass(frozen=True)
class PanguProMoEV2Config(Config):
    """All fields of config.json (defaults: openPangu-R-72B-2512) and one choice of ours."""

    architectures: tuple[str, ...] = ("PanguProMoEV2ForCausalLM",)
    model_type: str = "PanguProMoE"  # which Pro MoE, an older network, has too
    vocab_size: int = 153600
    hidden_size: int = 4608
    intermediate_size: int = 10240  # of the dense layers
    num_hidden_layers: int = 50
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    qk_nope_dim: int = 128
    qk_rope_dim: int = 64
    v_channels: int = 128
    param_sink_number: int = 128
    param_sink_with_value: bool = True
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    sandwich_norm: bool = True
    max_position_embeddings: int = 131072
    rope_theta: float | None = None  # never None on a made config: resolved from rope_parameters, else 25.6e6
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    mlp_only_layers: tuple[int, ...] = (0, 1, 2, 3)  # dense ones
    num_experts: int = 80
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 1280
    shared_expert_intermediate_size: int = 2560
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    router_enable_expert_bias: bool = True
    num_mtp_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 45892
    pad_token_id: int | None = 0
    torch_dtype: str | None = None
    dtype: str | None = None

    compute_dtype: str = "float32"

    REQUIRED: typing.ClassVar = frozenset((
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "qk_nope_dim", "qk_rope_dim", "v_channels", "param_sink_number", "rms_norm_eps",
        "sandwich_norm", "max_position_embeddings", "tie_word_embeddings", "mlp_only_layers", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
        "routed_scaling_factor", "router_enable_expert_bias", "num_mtp_layers"))
    chat: typing.ClassVar[Chat] = PRO_MOE_V2
    SPELLINGS: typing.ClassVar = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_experts"}
    MTP_FIELD: typing.ClassVar = "num_mtp_layers"

    @classmethod
    def from_dict(cls, fields):
        if found := [name for name in OF_ANOTHER_NETWORK if fields.get(name) not in (None, False)]:
            raise ConfigError(f"{', '.join(found)}: found in a config.json of PanguProMoEV2ForCausalLM, whose release "
                              "has none of it; wanted null or no such field: it is not implemented")
        return super().from_dict({"param_sink_with_value": False} | fields)

    def problems(self):
        problems = self.resolve_rope(25.6e6) + choice_problems(self, CHOICES) + size_problems(
            self, MAY_BE_ZERO, LARGEST, ("attention_dropout", "rope_theta"))
        return problems or self._order_problems()

    def _order_problems(self):
        problems = group_problems(self)
        if self.qk_rope_dim % 2:
            problems.append(f"qk_rope_dim: found {self.qk_rope_dim}, wanted an even number (pairs are rotated)")
        problems += order_problems(self, (("num_experts", "num_experts_per_tok", "the router picks distinct experts"),))
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            problems.append(f"mlp_only_layers: found {listed(outside)}, wanted 0 to {self.num_hidden_layers - 1}: "
                            "they are layers of the trunk")
        # Serving code wants these beside the release's own fields, and counts dense layers from the first.
        for name, wanted in (("n_shared_experts", self.shared_expert_intermediate_size / self.moe_intermediate_size),
                             ("first_k_dense_replace", len(self.mlp_only_layers))):
            if self.extra.get(name) not in (None, wanted):
                problems.append(f"{name}: found {self.extra[name]!r}, wanted {wanted:g} by the release's own fields, "
                                "or no such field")
        return problems

    # ---- what follows from the fields

    @functools.cached_property
    def plan(self) -> Plan:
        attention = GroupedQueryAttention(
            self.num_attention_heads, self.num_key_value_heads, self.qk_nope_dim + self.qk_rope_dim, bias=False,
            v_head_dim=self.v_channels, fused=True, key_norm=True, sinks=self.param_sink_number,
            sink_values=self.param_sink_with_value)
        dense = FeedForward(self.intermediate_size)
        moe = MoE(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size,
                  self.shared_expert_intermediate_size, self.norm_topk_prob, self.routed_scaling_factor)
        layers = [Layer(index, attention, dense if index in self.mlp_only_layers else moe, None)
                  for index in range(self.num_hidden_layers)]
        layers += [Layer(self.num_hidden_layers + depth - 1, attention, moe, None, mtp_depth=depth)
                   for depth in range(1, self.num_mtp_layers + 1)]
        return Plan(self.vocab_size, self.hidden_size, tuple(layers), self.rms_norm_eps, self.rope_theta,
                    self.qk_rope_dim, self.max_position_embeddings, self.initializer_range, self.compute_dtype,
                    mtp_hidden="final", rope_interleaved=True)

    @property
    def tensors(self) -> Table:
        return TENSORS

    @property
    def _projections(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in the fused projection."""
        width = self.qk_nope_dim + self.qk_rope_dim
        return (self.num_attention_heads * width, self.num_key_value_heads * width,
                self.num_key_value_heads * self.v_channels)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The words of the table's shapes."""
        return {"vocab": self.vocab_size, "hidden": self.hidden_size, "2*hidden": 2 * self.hidden_size,
                "heads": self.num_attention_heads, "kv_heads": self.num_key_value_heads,
                "qkv": sum(self._projections), "qk": self.qk_nope_dim + self.qk_rope_dim, "v": self.v_channels,
                "heads*v": self.num_attention_heads * self.v_channels, "sinks": self.param_sink_number,
                "dense": self.intermediate_size, "experts": self.num_experts, "expert": self.moe_intermediate_size,
                "shared": self.shared_expert_intermediate_size}

    @property
    def row_patterns(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Word of a number of rows -> how they are made up, see `Parameter.row_pattern`."""
        return {"qkv": (1, self._projections)}

    def cut(self, first: int, last: int, mtp: bool) -> "PanguProMoEV2Config":
        """Of trunk layers `first` to `last` alone, renumbered from 0, with or without the MTP layers."""
        dense = tuple(i - first for i in self.mlp_only_layers if first <= i <= last)
        return dataclasses.replace(self, num_hidden_layers=last + 1 - first, mlp_only_layers=dense,
                                   num_mtp_layers=self.num_mtp_layers if mtp else 0,
                                   extra={name: value for name, value in self.extra.items()
                                          if name != "first_k_dense_replace"})

    # ---- the released model

    @classmethod
    def r_72b(cls, **fields) -> "PanguProMoEV2Config":
        """openPangu-R-72B-2512, 74B with 15B active. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)
