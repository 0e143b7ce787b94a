"""openPangu Pro MoE 72B: the fields of the released config.json, the plan of the network, its tensors.

The blocks of openPangu Embedded with a mixture of grouped experts: a token takes the best expert of each of as many
equal groups as it takes experts (section 3 of the family). Needs no MindSpore.
"""
import dataclasses
import functools
import typing
from dataclasses import dataclass

from pangu_ms.architectures.chat import PRO_MOE, Chat
from pangu_ms.architectures.fields import (
    COMPUTE_DTYPES, choice_problems, listed, size_problems,
)
from pangu_ms.architectures.pangu_embedded import LARGEST, MAY_BE_ZERO, UNTIED, GroupedQueryConfig
from pangu_ms.architectures.tensors import COLUMNS, NORMAL, ONE, OUTPUT, ROUTED, ROUTED_OUTPUT, ROWS, WHOLE, Table
from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import FeedForward, MoE

CHOICES = {  # values that are implemented: no released model has another
    "compute_dtype": COMPUTE_DTYPES, "hidden_act": ("silu",), "attention_dropout": (0,), "bias": (True,),
    "tie_word_embeddings": (False,),
}
# Fields of PanguProMoEV2ForCausalLM, whose `model_type` is the same.
OF_ANOTHER_NETWORK = ("param_sink_number", "qk_nope_dim", "qk_rope_dim", "v_channels", "sandwich_norm",
                      "norm_topk_prob", "routed_scaling_factor", "router_enable_expert_bias", "num_mtp_layers")

GROUP = ("members", "expert", "groups")  # expert parallel ranks have whole groups

# name, shape in the words of `PanguProMoEConfig.sizes`, how it is cut, component, storage note, initial values
EXPERTS = (
    ("mlp.gate.weight", "experts hidden", WHOLE, "router", None, ROUTED),
    ("mlp.router_scale", "1 experts", WHOLE, "router", None, ONE),
    ("mlp.shared_expert.gate_proj.weight", "shared hidden", (ROWS,), "shared_expert", None, NORMAL),
    ("mlp.shared_expert.up_proj.weight", "shared hidden", (ROWS,), "shared_expert", None, NORMAL),
    ("mlp.shared_expert.down_proj.weight", "hidden shared", (COLUMNS,), "shared_expert", None, OUTPUT),
    ("mlp.experts.gate_proj.weight", "experts expert hidden", (GROUP, ROWS), "expert", None, ROUTED),
    ("mlp.experts.up_proj.weight", "experts expert hidden", (GROUP, ROWS), "expert", None, ROUTED),
    ("mlp.experts.down_proj.weight", "experts hidden expert", (GROUP, COLUMNS), "expert", None, ROUTED_OUTPUT),
)
TENSORS = dataclasses.replace(
    UNTIED, layers=(*UNTIED.layers, (lambda layer: layer.moe, EXPERTS)),
    # Scales of 8-bit keys and values: they come with 8-bit weights, and a network without them is another one.
    quantised=("k_proj.kv_cache_scale", "k_proj.kv_cache_offset", "v_proj.kv_cache_scale", "v_proj.kv_cache_offset"))


@dataclass(frozen=True)
class PanguProMoEConfig(GroupedQueryConfig):
    """All fields of config.json (defaults: openPangu-Pro-MoE-72B) and two choices of ours."""

    architectures: tuple[str, ...] = ("PanguProMoEForCausalLM",)
    model_type: str = "PanguProMoE"
    vocab_size: int = 153376
    hidden_size: int = 5120
    intermediate_size: int | None = None  # of the dense layers of mlp_only_layers
    num_hidden_layers: int = 48
    mlp_only_layers: tuple[int, ...] | None = None
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int | None = None  # hidden_size / num_attention_heads
    bias: bool = True  # of the four projections of attention
    attention_dropout: float = 0.0
    num_experts: int = 64
    num_experts_per_tok: int = 8  # the number of groups too
    moe_intermediate_size: int = 1344
    shared_expert_intermediate_size: int = 5376
    router_aux_loss_coef: float = 0.001
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    rope_theta: float | None = None  # never None on a made config: resolved from rope_parameters, else 16e6
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 45892
    pad_token_id: int | None = 0
    torch_dtype: str | None = None
    dtype: str | None = None

    compute_dtype: str = "float32"  # our choice
    # Our choice: experts of a group that a decoding step may use, those which most of its tokens choose; None: all.
    decoding_experts_per_group: int | None = None

    REQUIRED: typing.ClassVar = frozenset((
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "rms_norm_eps",
        "max_position_embeddings"))
    OUR_CHOICES: typing.ClassVar = ("compute_dtype", "bias", "decoding_experts_per_group")
    chat: typing.ClassVar[Chat] = PRO_MOE

    @classmethod
    def from_dict(cls, fields):
        if found := [name for name in OF_ANOTHER_NETWORK if fields.get(name)]:
            raise ConfigError(f"{', '.join(found)}: found in a config.json of PanguProMoEForCausalLM, but of "
                              "PanguProMoEV2ForCausalLM, another network; take them out, or name that in architectures")
        return super().from_dict(fields)

    def problems(self):
        problems = self.resolve_rope(16e6) + choice_problems(self, CHOICES) + size_problems(
            self, (*MAY_BE_ZERO, "router_aux_loss_coef"), LARGEST | {"num_experts": 10_000},
            ("attention_dropout", "rope_theta"))
        return problems or self.head_problems() + self._layer_problems()

    def _layer_problems(self):
        problems, dense = [], self.mlp_only_layers or ()
        if self.num_experts % self.num_experts_per_tok:
            problems.append(f"num_experts: found {self.num_experts}, wanted a multiple of num_experts_per_tok = "
                            f"{self.num_experts_per_tok}: a token takes one expert of each of so many equal groups")
        group, kept = self.num_experts // self.num_experts_per_tok, self.decoding_experts_per_group
        if kept is not None and kept > group:
            problems.append(f"decoding_experts_per_group: found {kept}, wanted 1 to {group}, as many as a group has")
        if outside := [i for i in dense if not 0 <= i < self.num_hidden_layers]:
            problems.append(f"mlp_only_layers: found {listed(outside)}, wanted 0 to {self.num_hidden_layers - 1}")
        if dense and self.intermediate_size is None:
            problems.append("intermediate_size: found None, wanted the width of the dense layers of mlp_only_layers")
        return problems

    # ---- what follows from the fields

    def feed_forward(self, index: int) -> FeedForward | MoE:
        if index in (self.mlp_only_layers or ()):
            return FeedForward(self.intermediate_size)
        return MoE(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size,
                   self.shared_expert_intermediate_size, normalise=False, scale=1.0, scoring="softmax",
                   selection_bias=False, groups=self.num_experts_per_tok, router_scale=True,
                   shared_name="shared_expert", balance_loss_coeff=self.router_aux_loss_coef,
                   decoding_experts_per_group=self.decoding_experts_per_group)

    @property
    def tensors(self) -> Table:
        return TENSORS

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The words of the table's shapes, and the groups of experts."""
        return super().sizes | {
            "1": 1, "experts": self.num_experts, "groups": self.num_experts_per_tok,
            "expert": self.moe_intermediate_size, "shared": self.shared_expert_intermediate_size}

    def cut(self, first: int, last: int, mtp: bool) -> "PanguProMoEConfig":
        """Of layers `first` to `last` alone, renumbered from 0; there are no MTP layers."""
        dense = self.mlp_only_layers and tuple(i - first for i in self.mlp_only_layers if first <= i <= last)
        return dataclasses.replace(self, num_hidden_layers=last + 1 - first, mlp_only_layers=dense)

    # ---- the released model

    @classmethod
    def pro_moe_72b(cls, **fields) -> "PanguProMoEConfig":
        """openPangu-Pro-MoE-72B, 16B active. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)
