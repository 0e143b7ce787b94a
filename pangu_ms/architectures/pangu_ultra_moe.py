"""openPangu Ultra MoE 718B: the fields of the released config.json, the plan of the network, its tensors.

Latent attention without sinks, convolutions, windows or an indexer, rotated in interleaved pairs; norms around each
sublayer, a plain residual, routers without a selection bias (section 5 of the family). Needs no MindSpore.
"""
import dataclasses
import functools
import typing
from dataclasses import dataclass

from pangu_ms.architectures.chat import ULTRA_MOE, Chat
from pangu_ms.architectures.fields import (
    COMPUTE_DTYPES, Config, choice_problems, order_problems, size_problems,
)
from pangu_ms.architectures.openpangu_v2 import COPIES, DENSE, EMBEDDINGS, EVERY_LAYER, HEAD, MOE, MTP
from pangu_ms.architectures.tensors import Table
from pangu_ms.model.plan import MTP_HIDDEN, FeedForward, LatentAttention, Layer, MoE, Plan

CHOICES = {  # values that are implemented: no released model has another
    "mtp_hidden": MTP_HIDDEN, "compute_dtype": COMPUTE_DTYPES, "hidden_act": ("silu",), "attention_dropout": (0,),
    "attention_bias": (False,), "tie_word_embeddings": (False,), "sandwich_norm": (True,), "rope_interleave": (True,),
    "router_enable_expert_bias": (False,), "n_group": (1,), "topk_group": (1,), "param_sink_number": (0,),
}
SPELLINGS = {  # what other code calls the fields: a file that has both must say the same in both
    "q_lora_rank": "attention_q_lora_dim", "kv_lora_rank": "attention_kv_lora_dim",
    "qk_nope_head_dim": "attention_qk_dim", "qk_rope_head_dim": "attention_qk_rope_dim",
    "v_head_dim": "attention_v_dim", "n_routed_experts": "num_routed_experts", "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "num_dense_layers", "num_nextn_predict_layers": "num_mtp_layers",
}
MAY_BE_ZERO = ("num_mtp_layers", "num_dense_layers", "param_sink_number", "bos_token_id", "pad_token_id",
               "eos_token_id")
# Bounds against absurd files: everything that is built per layer or per expert stays small.
LARGEST = {"num_hidden_layers": 1000, "num_mtp_layers": 100, "num_routed_experts": 10_000}

# The rows of openPangu-2.0 that are left without what this network has not.
TENSORS = Table(
    first=EMBEDDINGS,
    layers=(
        (lambda layer: True, tuple(row for row in EVERY_LAYER if row[3] not in ("convolution", "sink"))),
        (lambda layer: not layer.moe, DENSE),
        (lambda layer: layer.moe, tuple(row for row in MOE if row[0] != "mlp.e_score_correction_bias")),
        (lambda layer: layer.mtp_depth > 0, MTP),
    ),
    last=HEAD,
    copies=COPIES,
    copies_known=False,
)


@dataclass(frozen=True)
class PanguUltraMoEConfig(Config):
    """All fields of config.json (defaults: openPangu Ultra MoE 718B) and two choices of ours."""

    architectures: tuple[str, ...] = ("PanguUltraMoEForCausalLM",)
    model_type: str = "pangu_ultra_moe"
    vocab_size: int = 153600
    hidden_size: int = 7680
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_mtp_layers: int = 1
    num_dense_layers: int = 3
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # without effect: latent attention has no key-value heads
    attention_q_lora_dim: int = 1536
    attention_kv_lora_dim: int = 512
    attention_qk_dim: int = 128
    attention_qk_rope_dim: int = 64
    attention_v_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    param_sink_number: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5  # of the latent norms too
    max_position_embeddings: int = 131072
    rope_theta: float | None = None  # never None on a made config: resolved from rope_parameters, else 25.6e6
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    num_routed_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    router_enable_expert_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    sandwich_norm: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None  # sources differ on the release's: only its files can say
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    torch_dtype: str | None = None
    dtype: str | None = None

    mtp_hidden: str = "final"  # what the MTP layer reads: the trunk's hidden rows after ("final") or before its norm
    compute_dtype: str = "float32"

    REQUIRED: typing.ClassVar = frozenset((
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "rms_norm_eps", "max_position_embeddings", "num_experts_per_tok",
        "routed_scaling_factor", "sandwich_norm", *SPELLINGS.values()))
    SPELLINGS: typing.ClassVar = SPELLINGS | {"rope_interleaved": "rope_interleave"}
    OUR_CHOICES: typing.ClassVar = ("mtp_hidden", "compute_dtype")
    chat: typing.ClassVar[Chat] = ULTRA_MOE
    MTP_FIELD: typing.ClassVar = "num_mtp_layers"

    def problems(self):
        problems = self.resolve_rope(25.6e6) + choice_problems(self, CHOICES) + size_problems(
            self, MAY_BE_ZERO, LARGEST, ("attention_dropout", "rope_theta"))
        if self.attention_qk_rope_dim % 2:
            problems.append(f"attention_qk_rope_dim: found {self.attention_qk_rope_dim}, wanted an even number (pairs "
                            "are rotated)")
        problems += order_problems(self, (
            ("num_routed_experts", "num_experts_per_tok", "the router picks distinct experts"),
            ("num_hidden_layers", "num_dense_layers", "they are the first of the trunk's layers"),
        ))
        return problems

    # ---- what follows from the fields

    @functools.cached_property
    def plan(self) -> Plan:
        attention = LatentAttention(
            self.num_attention_heads, self.attention_q_lora_dim, self.attention_kv_lora_dim, self.attention_qk_dim,
            self.attention_qk_rope_dim, self.attention_v_dim, window=None, sinks=0, conv_width=1)
        dense = FeedForward(self.intermediate_size)
        moe = MoE(self.num_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size,
                  self.num_shared_experts * self.moe_intermediate_size, self.norm_topk_prob,
                  self.routed_scaling_factor, selection_bias=False)
        trunk = self.num_hidden_layers
        layers = tuple(Layer(index, attention, dense if index < self.num_dense_layers else moe, None,
                             mtp_depth=max(index - trunk + 1, 0)) for index in range(trunk + self.num_mtp_layers))
        return Plan(self.vocab_size, self.hidden_size, layers, self.rms_norm_eps, self.rope_theta,
                    self.attention_qk_rope_dim, self.max_position_embeddings, self.initializer_range,
                    self.compute_dtype, self.mtp_hidden, rope_interleaved=True)

    @property
    def tensors(self) -> Table:
        return TENSORS

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The words of the table's shapes."""
        heads = self.num_attention_heads
        return {
            "vocab": self.vocab_size, "hidden": self.hidden_size, "2*hidden": 2 * self.hidden_size, "heads": heads,
            "q_rank": self.attention_q_lora_dim, "kv_rank": self.attention_kv_lora_dim,
            "kv_rank+rope": self.attention_kv_lora_dim + self.attention_qk_rope_dim,
            "heads*qk": heads * (self.attention_qk_dim + self.attention_qk_rope_dim),
            "heads*kv": heads * (self.attention_qk_dim + self.attention_v_dim), "heads*v": heads * self.attention_v_dim,
            "dense": self.intermediate_size, "experts": self.num_routed_experts, "expert": self.moe_intermediate_size,
            "shared": self.num_shared_experts * self.moe_intermediate_size,
        }

    @property
    def row_patterns(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Word of a number of rows -> how they are made up, see `Parameter.row_pattern`."""
        return {"heads*qk": (self.num_attention_heads, (self.attention_qk_dim, self.attention_qk_rope_dim)),
                "kv_rank+rope": (1, (self.attention_kv_lora_dim, self.attention_qk_rope_dim)),
                "heads*kv": (self.num_attention_heads, (self.attention_qk_dim, self.attention_v_dim))}

    def cut(self, first: int, last: int, mtp: bool) -> "PanguUltraMoEConfig":
        """Of trunk layers `first` to `last` alone, renumbered from 0, with or without the MTP layers."""
        trunk = last + 1 - first
        return dataclasses.replace(self, num_hidden_layers=trunk, num_mtp_layers=self.num_mtp_layers if mtp else 0,
                                   num_dense_layers=min(max(self.num_dense_layers - first, 0), trunk))

    # ---- the released model

    @classmethod
    def ultra_moe_718b(cls, **fields) -> "PanguUltraMoEConfig":
        """openPangu Ultra MoE, 718B with 40B active. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)
