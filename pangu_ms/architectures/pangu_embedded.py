"""openPangu Embedded 1B and 7B: the fields of the released config.json, the plan of the network, its tensors.

A dense network: grouped-query attention with biases, a norm before each sublayer, a plain residual (section 2 of the
family). Needs no MindSpore.
"""
import dataclasses
import functools
import typing
from dataclasses import dataclass

from pangu_ms.architectures.chat import EMBEDDED_1B, EMBEDDED_7B, Chat
from pangu_ms.architectures.fields import (
    COMPUTE_DTYPES, Config, choice_problems, size_problems,
)
from pangu_ms.architectures.tensors import (
    COLUMNS, EMBEDDING, HEAD_COLUMNS, HEAD_ROWS, KV_HEAD_ROWS, NORMAL, ONE, OUTPUT, ROWS, WHOLE, ZERO, Table,
)
from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import FeedForward, GroupedQueryAttention, Layer, MoE, Plan

CHOICES = {  # values that are implemented: no released model has another
    "compute_dtype": COMPUTE_DTYPES, "hidden_act": ("silu",), "attention_dropout": (0,),
}
OF_ANOTHER_NETWORK = ("layer_types", "param_sink_number")  # fields of openPangu-R-7B, which has the same names else
MAY_BE_ZERO = ("bos_token_id", "pad_token_id", "eos_token_id")
LARGEST = {"num_hidden_layers": 1000}

# name, shape in the words of `GroupedQueryConfig.sizes`, how it is cut, component, storage note, initial values
ATTENTION = (
    ("input_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
    ("self_attn.q_proj.weight", "heads*head hidden", (HEAD_ROWS,), "attention", None, NORMAL),
    ("self_attn.k_proj.weight", "kv_heads*head hidden", (KV_HEAD_ROWS,), "attention", None, NORMAL),
    ("self_attn.v_proj.weight", "kv_heads*head hidden", (KV_HEAD_ROWS,), "attention", None, NORMAL),
    ("self_attn.o_proj.weight", "hidden heads*head", (HEAD_COLUMNS,), "attention", None, OUTPUT),
    ("post_attention_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
)
DENSE = (
    ("mlp.gate_proj.weight", "dense hidden", (ROWS,), "dense_mlp", None, NORMAL),
    ("mlp.up_proj.weight", "dense hidden", (ROWS,), "dense_mlp", None, NORMAL),
    ("mlp.down_proj.weight", "hidden dense", (COLUMNS,), "dense_mlp", None, OUTPUT),
)
BIASES = (
    ("self_attn.q_proj.bias", "heads*head", (HEAD_ROWS,), "attention", None, ZERO),
    ("self_attn.k_proj.bias", "kv_heads*head", (KV_HEAD_ROWS,), "attention", None, ZERO),
    ("self_attn.v_proj.bias", "kv_heads*head", (KV_HEAD_ROWS,), "attention", None, ZERO),
    ("self_attn.o_proj.bias", "hidden", WHOLE, "attention", None, ZERO),
)
HEAD = ("lm_head.weight", "vocab hidden", (ROWS,), "head", None, NORMAL)
TIED = Table(
    first=(
        ("model.embed_tokens.weight", "vocab hidden", (ROWS,), "embedding", None, EMBEDDING),
    ),
    layers=(
        (lambda layer: True, ATTENTION),
        (lambda layer: not layer.moe, DENSE),
        (lambda layer: layer.attention.bias, BIASES),
    ),
    last=(
        ("model.norm.weight", "hidden", WHOLE, "norm", None, ONE),
    ),
    copies={},
    computed=("self_attn.rotary_emb.inv_freq",),
)
UNTIED = dataclasses.replace(TIED, last=(*TIED.last, HEAD))


def group_problems(config: Config) -> list[str]:
    """Query heads that their key-value heads cannot share."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return [f"num_attention_heads: found {heads}, wanted a multiple of num_key_value_heads = {groups}: each serves as "
            "many"] if heads % groups else []


class GroupedQueryConfig(Config):
    """What the members have in common whose blocks are pre-norm ones of grouped-query attention (section 1 of the
    family). A subclass says of each layer what `feed_forward(index)` it has."""

    def feed_forward(self, index: int) -> FeedForward | MoE:
        raise NotImplementedError

    def head_problems(self) -> list[str]:
        hidden, heads = self.hidden_size, self.num_attention_heads
        if problems := group_problems(self):
            return problems
        if self.head_dim is None and hidden % heads:
            return [f"hidden_size: found {hidden}, wanted a multiple of num_attention_heads = {heads}, or head_dim "
                    "beside it"]
        if self.head_width % 2:
            return [f"head_dim: found {self.head_width}, wanted an even number (pairs are rotated)"]
        return []

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @functools.cached_property
    def plan(self) -> Plan:
        attention = GroupedQueryAttention(self.num_attention_heads, self.num_key_value_heads, self.head_width,
                                          self.bias)
        layers = tuple(Layer(index, attention, self.feed_forward(index), None, sandwich=False)
                       for index in range(self.num_hidden_layers))
        return Plan(self.vocab_size, self.hidden_size, layers, self.rms_norm_eps, self.rope_theta, self.head_width,
                    self.max_position_embeddings, self.initializer_range, self.compute_dtype,
                    tied_head=self.tie_word_embeddings)

    @property
    def tensors(self) -> Table:
        return TIED if self.tie_word_embeddings else UNTIED

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The words of the table's shapes."""
        return {"vocab": self.vocab_size, "hidden": self.hidden_size, "dense": self.intermediate_size,
                "heads": self.num_attention_heads, "kv_heads": self.num_key_value_heads,
                "heads*head": self.num_attention_heads * self.head_width,
                "kv_heads*head": self.num_key_value_heads * self.head_width}

    @property
    def row_patterns(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Every projection is one linear map."""
        return {}


@dataclass(frozen=True)
class PanguEmbeddedConfig(GroupedQueryConfig):
    """All fields of config.json (defaults: openPangu-Embedded-7B) and one choice of ours."""

    architectures: tuple[str, ...] = ("PanguEmbeddedForCausalLM",)
    model_type: str = "PanguEmbedded"
    vocab_size: int = 153376
    hidden_size: int = 4096
    intermediate_size: int = 12800
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # hidden_size / num_attention_heads
    bias: bool = True  # of the four projections of attention
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
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

    REQUIRED: typing.ClassVar = frozenset((
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"))

    @classmethod
    def from_dict(cls, fields):
        if found := [name for name in OF_ANOTHER_NETWORK if fields.get(name) is not None]:
            raise ConfigError(f"{', '.join(found)}: found in a config.json of PanguEmbeddedForCausalLM, which is then "
                              "openPangu-R-7B, another network that no public source describes; wanted openPangu "
                              "Embedded 1B or 7B")
        return super().from_dict(fields)

    def problems(self):
        problems = self.resolve_rope(16e6) + choice_problems(self, CHOICES) + size_problems(
            self, MAY_BE_ZERO, LARGEST, ("attention_dropout", "rope_theta"))
        return problems or self.head_problems()

    # ---- what follows from the fields

    @property
    def chat(self) -> Chat:
        """1B, which alone of the two ties its head, has no slow thinking."""
        return EMBEDDED_1B if self.tie_word_embeddings else EMBEDDED_7B

    def feed_forward(self, index: int) -> FeedForward:
        return FeedForward(self.intermediate_size)

    def cut(self, first: int, last: int, mtp: bool) -> "PanguEmbeddedConfig":
        """Of layers `first` to `last` alone, renumbered from 0; there are no MTP layers."""
        return dataclasses.replace(self, num_hidden_layers=last + 1 - first)

    # ---- the released models

    @classmethod
    def embedded_7b(cls, **fields) -> "PanguEmbeddedConfig":
        """openPangu-Embedded-7B. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)

    @classmethod
    def embedded_1b(cls, **fields) -> "PanguEmbeddedConfig":
        """openPangu-Embedded-1B, whose head is the embedding. `fields` replace single values."""
        return cls(**{"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 26,
                      "num_attention_heads": 12, "num_key_value_heads": 6, "rope_theta": 4e6,
                      "tie_word_embeddings": True, "dtype": "bfloat16"} | fields)
