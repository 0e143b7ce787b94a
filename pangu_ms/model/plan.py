"""What a network is built from: frozen records, in which no architecture's field names survive. Needs no MindSpore.

An architecture makes a `Plan` of its config.json; the cells of this package, the cache and the estimates read nothing
else. Sizes are those of the whole model, whatever one of several ranks holds.
"""
import functools
from dataclasses import dataclass
from typing import ClassVar

MTP_HIDDEN = ("merged", "final")
SCORING = ("sigmoid", "softmax")


@dataclass(frozen=True)
class CacheTensor:
    """What a layer remembers of each token, one row a token.

    Attributes:
        width: numbers in a row.
        rows: of a ring, which keeps the last so many tokens; None: all tokens are kept, the tensor grows.
        by_head: tensor parallel ranks share the width, as they share the heads.
    """

    width: int
    rows: int | None
    by_head: bool = False


@dataclass(frozen=True)
class Indexer:
    """DSA's choice of the `topk` rows that a query sees (section 6)."""

    num_heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (sections 4 and 5): full, in a sliding window, or sparse where it has an indexer.

    Attributes:
        window: keys that a query sees, its own included; None: all before it.
        sinks: learned keys that every query sees; 0: none.
        conv_width: of the short convolutions at the query's and the rows' latent vectors and at the heads' outputs. One
            over a row alone changes nothing: there is none.
        indexer: None: the layer sees all that its window lets it.
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    window: int | None
    sinks: int
    conv_width: int
    indexer: Indexer | None = None

    @property
    def kind(self) -> str:
        return "dsa" if self.indexer else "full" if self.window is None else "swa"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def row_width(self) -> int:
        """Of a latent row: the normed latent, then the rotated key part that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_tensors(self) -> dict[str, CacheTensor]:
        found, taps = {"latent": CacheTensor(self.row_width, self.window)}, self.conv_width - 1
        if taps:
            found |= {"q_taps": CacheTensor(self.q_lora_rank, taps), "kv_taps": CacheTensor(self.kv_lora_rank, taps),
                      "o_taps": CacheTensor(self.num_heads * self.v_head_dim, taps, by_head=True)}
        if self.indexer:
            found["index_keys"] = CacheTensor(self.indexer.head_dim, None)
        return found


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Each key-value head serves a group of query heads; a query sees all before it (sections 2 and 4 of the family).

    Of queries and keys the first channels are rotated, as many as the plan has angles for (`Plan.rope_dim`).

    Attributes:
        head_dim: width of a query and of a key.
        bias: the projections of queries, keys, values and output have one each.
        v_head_dim: width of a value; never None on a made record: that of a key.
        fused: one projection gives queries, keys and values.
        key_norm: each key head is normed, before its rotation.
        sinks: learned keys that every query sees; normed as the others, and not rotated.
        sink_values: these have learned values too; otherwise zeros.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    v_head_dim: int | None = None
    fused: bool = False
    key_norm: bool = False
    sinks: int = 0
    sink_values: bool = False

    kind: ClassVar[str] = "full"
    window: ClassVar[None] = None
    conv_width: ClassVar[int] = 1
    indexer: ClassVar[None] = None

    def __post_init__(self):
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim

    @property
    def cache_tensors(self) -> dict[str, CacheTensor]:
        return {"keys": CacheTensor(self.num_kv_heads * self.head_dim, None, by_head=True),
                "values": CacheTensor(self.num_kv_heads * self.v_head_dim, None, by_head=True)}


@dataclass(frozen=True)
class FeedForward:
    """A dense SwiGLU layer."""

    intermediate_size: int


@dataclass(frozen=True)
class MoE:
    """Routed experts beside a shared one (section 7).

    Attributes:
        num_experts, experts_per_token, intermediate_size: of the routed experts.
        shared_intermediate_size: width of the shared expert.
        normalise: the weights of a token's experts are divided by their sum.
        scale: factor of those weights.
        scoring: of an expert's logit by itself, or of all of them together (`SCORING`).
        selection_bias: a number by expert chooses with the score and does not weigh; it follows the experts' load.
        groups: a token takes the best expert of each of so many equal groups, as many as it takes experts, instead of
            the best of all (section 3 of the family).
        router_scale: a learned factor by expert, which the choice does not see.
        shared_name: of the shared expert, in the names of its tensors.
        balance_loss_coeff: weight of the balance loss where training sets none.
        decoding_experts_per_group: in decoding, the tokens of a step choose among that many experts of a group (see
            `router.most_voted`); None: among all.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    normalise: bool
    scale: float
    scoring: str = "sigmoid"
    selection_bias: bool = True
    groups: int | None = None
    router_scale: bool = False
    shared_name: str = "shared_experts"
    balance_loss_coeff: float = 0.0
    decoding_experts_per_group: int | None = None


@dataclass(frozen=True)
class HyperConnection:
    """mHC: a residual of several streams (section 3).

    Attributes:
        streams: N.
        rounds: of Sinkhorn, softmax included.
        eps: in the norm of the modules around attention and feed-forward; the merge has the plan's.
    """

    streams: int
    rounds: int
    eps: float


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        index: its number in the names of its tensors.
        residual: None: a plain one, x + f(x).
        block_norm: a norm over all streams ends the layer.
        mtp_depth: 0 in the trunk, 1, 2, ... for MTP layers.
        sandwich: each sublayer has a norm behind it too, before the residual takes what it gives.
    """

    index: int
    attention: LatentAttention | GroupedQueryAttention
    feed_forward: FeedForward | MoE
    residual: HyperConnection | None
    block_norm: bool = False
    mtp_depth: int = 0
    sandwich: bool = True

    @property
    def moe(self) -> bool:
        return isinstance(self.feed_forward, MoE)


@dataclass(frozen=True)
class Plan:
    """A network.

    Attributes:
        layers: the trunk's, then the MTP layers by depth.
        rope_theta, rope_dim, max_positions: of the rotary angles that all layers share.
        rope_interleaved: pairs are neighbours, otherwise the first half is paired with the second.
        initializer_range: standard deviation of parameters that nothing else sets.
        dtype: what the network computes in, "float32", "float16" or "bfloat16".
        mtp_hidden: what MTP depth 1 reads of the trunk: "merged", before the final norm, or "final", after it.
        tied_head: the head is the embedding, and no tensor of its own.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    max_positions: int
    initializer_range: float
    dtype: str
    mtp_hidden: str = "merged"
    tied_head: bool = False
    rope_interleaved: bool = False

    @functools.cached_property
    def trunk(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.mtp_depth == 0)

    @functools.cached_property
    def mtp_layers(self) -> tuple[Layer, ...]:
        return self.layers[len(self.trunk):]

    @property
    def residual(self) -> HyperConnection | None:
        """Of the trunk."""
        return self.trunk[0].residual

    @property
    def indexer(self) -> Indexer | None:
        """That of the layers that have one: it is the same in all of them."""
        return next((layer.attention.indexer for layer in self.layers if layer.attention.indexer), None)
