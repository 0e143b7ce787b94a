"""openPangu-2.0: the fields of the released config.json, the plan of its network, its tensors. Needs no MindSpore."""
import dataclasses
import functools
import typing
from dataclasses import dataclass

from pangu_ms.architectures.chat import OPENPANGU_V2, Chat
from pangu_ms.architectures.fields import (
    COMPUTE_DTYPES, Config, choice_problems, listed, order_problems, size_problems,
)
from pangu_ms.architectures.tensors import (
    ALPHA, COLUMNS, EMBEDDING, EXPERT, FLOAT32, HEAD_COLUMNS, HEAD_ROWS, INT8, NORMAL, ONE, OUTPUT,
    POST_ATTENTION_NORM, POST_MLP_NORM, ROUTED, ROUTED_OUTPUT, ROWS, STREAM_GATES, WHOLE, ZERO, Table,
)
from pangu_ms.errors import ConfigError
from pangu_ms.model.plan import MTP_HIDDEN, FeedForward, HyperConnection, Indexer, LatentAttention, Layer, MoE, Plan

# What public sources give for Flash alone among the released models.
UNPUBLISHED = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts_per_tok",
    "first_k_dense_replace", "routed_scaling_factor", "router_sliding_window", "mhc_num_stream", "mhc_recur_norm",
    "block_post_layernorm_idx", "param_sink_number", "dsa_layers", "swa_layers", "sliding_window_list",
    "index_n_heads", "index_head_dim", "index_topk", "rms_norm_eps", "rope_theta",
)

NULL_WHEN_ABSENT = ("block_post_layernorm_idx", "sliding_window_list", "bos_token_id", "eos_token_id", "pad_token_id")
CHOICES = {  # values that are implemented: no released model has another
    "model_type": ("openpangu_v2", "pangu_v2_moe"), "mtp_hidden": MTP_HIDDEN, "compute_dtype": COMPUTE_DTYPES,
    "hidden_act": ("silu",), "rope_interleave": (False,), "tie_word_embeddings": (False,), "attention_bias": (False,),
    "attention_dropout": (0,), "n_group": (1,), "topk_group": (1,), "router_enable_expert_bias": (True,),
    "use_mome": (True,), "use_mhc": (True,), "mhc_use_gamma": (True,), "sandwich_norm": (True,),
    "param_sink_with_value": (True,),
}
MAY_BE_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace", "bos_token_id", "pad_token_id", "eos_token_id")
# Bounds against absurd files: everything that is built per layer or per expert stays small.
LARGEST = {"num_hidden_layers": 1000, "num_nextn_predict_layers": 100, "n_routed_experts": 10_000}
MTP_HINT = "an MTP layer has the index num_hidden_layers + depth - 1"


# name, shape in the words of `PanguConfig.sizes`, how it is cut, component, storage note, initial values
EVERY_LAYER = (
    ("input_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
    ("self_attn.q_a_proj.weight", "q_rank hidden", WHOLE, "attention", None, NORMAL),
    ("self_attn.qa_conv.weight", "q_rank 1 taps", WHOLE, "convolution", None, ZERO),
    ("self_attn.q_a_layernorm.weight", "q_rank", WHOLE, "attention", None, ONE),
    ("self_attn.q_b_proj.weight", "heads*qk q_rank", (HEAD_ROWS,), "attention", INT8, NORMAL),
    ("self_attn.kv_a_proj_with_mqa.weight", "kv_rank+rope hidden", WHOLE, "attention", None, NORMAL),
    ("self_attn.compresskv_conv.weight", "kv_rank 1 taps", WHOLE, "convolution", None, ZERO),
    ("self_attn.kv_a_layernorm.weight", "kv_rank", WHOLE, "attention", None, ONE),
    ("self_attn.kv_b_proj.weight", "heads*kv kv_rank", (HEAD_ROWS,), "attention", None, NORMAL),
    ("self_attn.param_sink_compressed_kv", "sinks kv_rank", WHOLE, "sink", None, NORMAL),
    ("self_attn.param_sink_k_pe", "sinks rope", WHOLE, "sink", None, NORMAL),
    ("self_attn.o_conv.weight", "heads*v 1 taps", (HEAD_ROWS,), "convolution", None, ZERO),
    ("self_attn.o_proj.weight", "hidden heads*v", (HEAD_COLUMNS,), "attention", INT8, OUTPUT),
    ("post_attention_layernorm.weight", "hidden", WHOLE, "norm", None, POST_ATTENTION_NORM),
    ("pre_mlp_layernorm.weight", "hidden", WHOLE, "norm", None, ONE),
    ("post_mlp_layernorm.weight", "hidden", WHOLE, "norm", None, POST_MLP_NORM),
)
DSA = (
    ("self_attn.indexer.wq_b.weight", "index_heads*index q_rank", WHOLE, "indexer", None, NORMAL),
    ("self_attn.indexer.wk.weight", "index hidden", WHOLE, "indexer", None, NORMAL),
    ("self_attn.indexer.k_norm.weight", "index", WHOLE, "indexer", None, ONE),
    ("self_attn.indexer.weights_proj.weight", "index_heads hidden", WHOLE, "indexer", None, NORMAL),
)
TRUNK = tuple(row for module in ("attn_mhc_module", "mlp_mhc_module") for row in (
    (f"{module}.phi.weight", "gates streams*hidden", WHOLE, "mhc", None, NORMAL),
    (f"{module}.norm_gamma", "streams*hidden", WHOLE, "mhc", None, ONE),
    (f"{module}.branch_alpha", "3", WHOLE, "mhc", None, ALPHA),
    (f"{module}.branch_beta", "gates", WHOLE, "mhc", None, STREAM_GATES),
))
BLOCK_POST = (
    ("block_post_layernorm.weight", "streams*hidden", WHOLE, "norm", None, ONE),
)
DENSE = (
    ("mlp.gate_proj.weight", "dense hidden", (ROWS,), "dense_mlp", INT8, NORMAL),
    ("mlp.up_proj.weight", "dense hidden", (ROWS,), "dense_mlp", INT8, NORMAL),
    ("mlp.down_proj.weight", "hidden dense", (COLUMNS,), "dense_mlp", INT8, OUTPUT),
)
MOE = (
    ("mlp.gate.weight", "experts hidden", WHOLE, "router", None, ROUTED),
    ("mlp.e_score_correction_bias", "experts", WHOLE, "router", FLOAT32, ZERO),
    ("mlp.shared_experts.gate_proj.weight", "shared hidden", (ROWS,), "shared_expert", None, NORMAL),
    ("mlp.shared_experts.up_proj.weight", "shared hidden", (ROWS,), "shared_expert", None, NORMAL),
    ("mlp.shared_experts.down_proj.weight", "hidden shared", (COLUMNS,), "shared_expert", None, OUTPUT),
    ("mlp.experts.gate_proj.weight", "experts expert hidden", (EXPERT, ROWS), "expert", INT8, ROUTED),
    ("mlp.experts.up_proj.weight", "experts expert hidden", (EXPERT, ROWS), "expert", INT8, ROUTED),
    ("mlp.experts.down_proj.weight", "experts hidden expert", (EXPERT, COLUMNS), "expert", INT8, ROUTED_OUTPUT),
)
MTP = (
    ("enorm.weight", "hidden", WHOLE, "mtp_input", None, ONE),
    ("hnorm.weight", "hidden", WHOLE, "mtp_input", None, ONE),
    ("eh_proj.weight", "hidden 2*hidden", WHOLE, "mtp_input", INT8, NORMAL),
    ("shared_head.norm.weight", "hidden", WHOLE, "mtp_input", None, ONE),
)
EMBEDDINGS = (
    ("model.embed_tokens.weight", "vocab hidden", (ROWS,), "embedding", None, EMBEDDING),
)
HEAD = (
    ("lm_head.weight", "vocab hidden", (ROWS,), "head", None, NORMAL),
    ("model.norm.weight", "hidden", WHOLE, "norm", None, ONE),
)
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
TENSORS = Table(
    first=EMBEDDINGS,
    layers=(
        (lambda layer: True, EVERY_LAYER),
        (lambda layer: layer.attention.kind == "dsa", DSA),
        (lambda layer: layer.mtp_depth == 0, TRUNK),
        (lambda layer: layer.block_norm, BLOCK_POST),
        (lambda layer: not layer.moe, DENSE),
        (lambda layer: layer.moe, MOE),
        (lambda layer: layer.mtp_depth > 0, MTP),
    ),
    last=(
        *HEAD,
        ("model.merge_mhc_module.phi.weight", "streams streams*hidden", WHOLE, "merge", None, NORMAL),
        ("model.merge_mhc_module.norm_gamma", "streams*hidden", WHOLE, "merge", None, ONE),
        ("model.merge_mhc_module.branch_alpha_pre", "1", WHOLE, "merge", None, ALPHA),
        ("model.merge_mhc_module.branch_beta_pre", "streams", WHOLE, "merge", None, ZERO),
    ),
    copies=COPIES,
)


@dataclass(frozen=True)
class PanguConfig(Config):
    """All fields of config.json (defaults: openPangu-2.0-Flash, 92B) and four choices of ours."""

    architectures: tuple[str, ...] = ("OpenPanguV2ForCausalLM",)
    model_type: str = "openpangu_v2"
    vocab_size: int = 151552
    hidden_size: int = 2560
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 46
    num_nextn_predict_layers: int = 3
    num_attention_heads: int = 48
    num_key_value_heads: int | None = None  # without effect: latent attention has no key-value heads
    q_lora_rank: int = 1024
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 524288
    rope_theta: float | None = None  # never None on a made config: resolved from rope_parameters, else 6.4e6
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    rope_interleave: bool = False
    tie_word_embeddings: bool = False
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    n_group: int = 1
    topk_group: int = 1
    router_enable_expert_bias: bool = True
    use_mome: bool = True
    router_sliding_window: int = 3  # the width of the short convolutions, whatever its name says
    use_mhc: bool = True
    mhc_num_stream: int = 4
    mhc_recur_norm: int = 20
    mhc_use_gamma: bool = True
    sandwich_norm: bool = True
    block_post_layernorm_idx: tuple[int, ...] | None = (0, 4, 9, 14, 19, 24, 29, 34, 39)
    param_sink_number: int = 128
    param_sink_with_value: bool = True
    dsa_layers: tuple[int, ...] = tuple(range(0, 46, 3))
    swa_layers: tuple[int, ...] = tuple(i for i in range(49) if i % 3 or i > 45)
    sliding_window: int = 512
    sliding_window_list: tuple[int, ...] | None = (512,) * 30 + (2048,) * 3
    index_n_heads: int = 24
    index_head_dim: int = 128
    index_topk: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = 148899
    eos_token_id: int | tuple[int, ...] | None = 148900
    pad_token_id: int | None = 148900
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict | None = None

    # Where public sources differ: our choice, and the field that changes it.
    swa_window_includes_self: bool = True  # a window of W: W keys with the query's own (serving), or W + 1 (training)
    mhc_norm_eps: float = 1e-6  # inside the attention and mlp mHC modules; the merge module uses rms_norm_eps
    mtp_hidden: str = "merged"  # what MTP depth 1 reads: the merged streams before ("merged") or after the final norm
    compute_dtype: str = "float32"

    REQUIRED: typing.ClassVar = frozenset((
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_nextn_predict_layers", "num_attention_heads", "n_routed_experts", "n_shared_experts",
        "max_position_embeddings", *UNPUBLISHED)) - {"rope_theta", *NULL_WHEN_ABSENT}
    NULL_WHEN_ABSENT: typing.ClassVar = NULL_WHEN_ABSENT
    OUR_CHOICES: typing.ClassVar = ("swa_window_includes_self", "mhc_norm_eps", "mtp_hidden", "compute_dtype")
    chat: typing.ClassVar[Chat] = OPENPANGU_V2
    SPELLINGS: typing.ClassVar = {"rope_interleaved": "rope_interleave"}
    MTP_FIELD: typing.ClassVar = "num_nextn_predict_layers"

    @classmethod
    def missing(cls, fields):
        windows = "sliding_window" in fields or fields.get("sliding_window_list") is not None
        return ([] if windows else ["sliding_window"]) + super().missing(fields)

    def problems(self):
        return self.resolve_rope(6.4e6) + choice_problems(self, CHOICES) + size_problems(
            self, MAY_BE_ZERO, LARGEST, ("attention_dropout", "rope_theta")) + _order_problems(self) \
            + _layer_problems(self)

    # ---- what follows from the fields

    @functools.cached_property
    def plan(self) -> Plan:
        windows = self._windows()
        mtp_window = windows.pop(None)
        residual = HyperConnection(self.mhc_num_stream, self.mhc_recur_norm, self.mhc_norm_eps)
        indexer = Indexer(self.index_n_heads, self.index_head_dim, self.index_topk)
        dense = FeedForward(self.intermediate_size)
        moe = MoE(self.n_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size,
                  self.n_shared_experts * self.moe_intermediate_size, self.norm_topk_prob, self.routed_scaling_factor)

        def attention(window, own_indexer=None):
            return LatentAttention(
                self.num_attention_heads, self.q_lora_rank, self.kv_lora_rank, self.qk_nope_head_dim,
                self.qk_rope_head_dim, self.v_head_dim, window, self.param_sink_number, self.router_sliding_window,
                own_indexer)

        layers = []
        for index in range(self.num_hidden_layers):
            sparse = index in self.dsa_layers
            layers.append(Layer(index, attention(None if sparse else windows.get(index), indexer if sparse else None),
                                moe if index >= self.first_k_dense_replace else dense, residual,
                                block_norm=index in (self.block_post_layernorm_idx or ())))
        for depth in range(1, self.num_nextn_predict_layers + 1):
            index = self.num_hidden_layers + depth - 1
            layers.append(Layer(index, attention(windows.get(index, mtp_window)), moe, None, mtp_depth=depth))
        return Plan(self.vocab_size, self.hidden_size, tuple(layers), self.rms_norm_eps, self.rope_theta,
                    self.qk_rope_head_dim, self.max_position_embeddings, self.initializer_range, self.compute_dtype,
                    self.mtp_hidden)

    def _windows(self) -> dict[int | None, int]:
        """Layer -> keys that a query sees; under None that of MTP layers which swa_layers leaves out.

        sliding_window_list has an entry for each of swa_layers, or for those of the trunk and one for all MTP layers.
        """
        given = self.sliding_window_list or (self.sliding_window,) * len(self.swa_layers)
        trunk = [i for i in self.swa_layers if i < self.num_hidden_layers]
        named = self.swa_layers if len(given) == len(self.swa_layers) else trunk
        windows = dict(zip(named, given)) | {None: given[-1] if given else self.sliding_window}
        return {index: window + (not self.swa_window_includes_self) for index, window in windows.items()}

    @property
    def tensors(self) -> Table:
        return TENSORS

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The words of the table's shapes."""
        return {
            "1": 1, "3": 3, "vocab": self.vocab_size, "hidden": self.hidden_size, "2*hidden": 2 * self.hidden_size,
            "streams": self.mhc_num_stream, "streams*hidden": self.mhc_num_stream * self.hidden_size,
            # One pre and one post gate for each stream, and the mixing matrix.
            "gates": self.mhc_num_stream * (self.mhc_num_stream + 2),
            "q_rank": self.q_lora_rank, "kv_rank": self.kv_lora_rank, "rope": self.qk_rope_head_dim,
            "kv_rank+rope": self.kv_lora_rank + self.qk_rope_head_dim, "heads": self.num_attention_heads,
            "heads*qk": self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim),
            "heads*kv": self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim),
            "heads*v": self.num_attention_heads * self.v_head_dim,
            "sinks": self.param_sink_number, "taps": self.router_sliding_window,
            "index_heads": self.index_n_heads, "index": self.index_head_dim,
            "index_heads*index": self.index_n_heads * self.index_head_dim,
            "dense": self.intermediate_size, "experts": self.n_routed_experts, "expert": self.moe_intermediate_size,
            "shared": self.n_shared_experts * self.moe_intermediate_size,
        }

    @property
    def row_patterns(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Word of a number of rows -> how they are made up, see `Parameter.row_pattern`."""
        return {"heads*qk": (self.num_attention_heads, (self.qk_nope_head_dim, self.qk_rope_head_dim)),
                "kv_rank+rope": (1, (self.kv_lora_rank, self.qk_rope_head_dim)),
                "heads*kv": (self.num_attention_heads, (self.qk_nope_head_dim, self.v_head_dim))}

    def cut(self, first: int, last: int, mtp: bool) -> "PanguConfig":
        """Of trunk layers `first` to `last` alone, renumbered from 0, with or without the MTP layers."""
        if (first, last) == (0, self.num_hidden_layers - 1) and (mtp or not self.num_nextn_predict_layers):
            return self
        kept = {i: i - first for i in range(first, last + 1)}
        if mtp:
            kept |= {layer.index: last - first + layer.mtp_depth for layer in self.plan.mtp_layers}
        # MTP layers that had no entry of their own get one: the default is the last entry, which may be gone.
        windows = {kept[layer.index]: layer.attention.window - (not self.swa_window_includes_self)
                   for layer in self.plan.layers if layer.index in kept and layer.attention.kind == "swa"}
        return dataclasses.replace(
            self,
            num_hidden_layers=last + 1 - first,
            num_nextn_predict_layers=self.num_nextn_predict_layers if mtp else 0,
            first_k_dense_replace=min(max(self.first_k_dense_replace - first, 0), last + 1 - first),
            dsa_layers=tuple(kept[i] for i in self.dsa_layers if i in kept),
            swa_layers=tuple(windows),
            sliding_window_list=tuple(windows.values()) if self.sliding_window_list is not None else None,
            block_post_layernorm_idx=tuple(kept[i] for i in self.block_post_layernorm_idx or () if i in kept),
        )

    # ---- the released models

    @classmethod
    def flash_92b(cls, **fields) -> "PanguConfig":
        """openPangu-2.0-Flash, 92B with 6B active. `fields` replace single values."""
        return cls(**{"dtype": "bfloat16"} | fields)

    @classmethod
    def pro_505b(cls, **fields) -> "PanguConfig":
        """openPangu-2.0-Pro, 505B with 18B active: widths, experts, layers and vocabulary are public, the rest is not.

        Every field of `UNPUBLISHED` must be given; none is guessed. `ConfigError` names those that are not.
        """
        known = {"hidden_size": 5120, "num_attention_heads": 64, "intermediate_size": 16128, "n_routed_experts": 384,
                 "n_shared_experts": 1, "moe_intermediate_size": 1792, "num_hidden_layers": 50,
                 "num_nextn_predict_layers": 3, "max_position_embeddings": 524288, "dtype": "bfloat16"}
        return cls._published("pro_505b", known, fields)

    @classmethod
    def small_34b(cls, **fields) -> "PanguConfig":
        """The 34B sibling (also called 30B or 35B, 2B active): widths, heads and experts are public, the rest is not.

        Every field of `UNPUBLISHED`, the numbers of layers and the context length must be given; none is guessed.
        """
        known = {"hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 6144, "n_routed_experts": 192,
                 "n_shared_experts": 2, "moe_intermediate_size": 512, "dtype": "bfloat16"}
        return cls._published("small_34b", known, fields)

    @classmethod
    def _published(cls, preset: str, known: dict, fields: dict) -> "PanguConfig":
        wanted = UNPUBLISHED + ("num_hidden_layers", "num_nextn_predict_layers", "max_position_embeddings")
        missing = [name for name in wanted if name not in known | fields]
        if missing:
            raise ConfigError(f"{preset}: no public source gives {', '.join(missing)}; pass them by name")
        return cls(**known | fields)



def _order_problems(config: PanguConfig) -> list[str]:
    problems = []
    if config.qk_rope_head_dim % 2:
        problems.append(f"qk_rope_head_dim: found {config.qk_rope_head_dim}, wanted an even number (pairs are rotated)")
    return problems + order_problems(config, (
        ("n_routed_experts", "num_experts_per_tok", "the router picks distinct experts"),
        ("index_head_dim", "qk_rope_head_dim", "the indexer rotates that many dimensions"),
        ("num_hidden_layers", "first_k_dense_replace", "they are the first of the trunk's layers"),
    ))


def _layer_problems(config: PanguConfig) -> list[str]:
    trunk, last = config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    problems = []
    for name, end, note in (("dsa_layers", trunk, "the trunk's layers"), ("block_post_layernorm_idx", trunk,
                            "the trunk's layers"), ("swa_layers", last, f"trunk and MTP layers; {MTP_HINT}")):
        given = getattr(config, name) or ()
        outside = [i for i in given if not 0 <= i < end]
        if outside:
            problems.append(f"{name}: found {listed(outside)}, wanted 0 to {end - 1} ({note})")
        if len(set(given)) < len(given):
            problems.append(f"{name}: found {listed(sorted(i for i in set(given) if given.count(i) > 1))} twice")
    both = sorted(set(config.dsa_layers) & set(config.swa_layers))
    if both:
        problems.append(f"dsa_layers, swa_layers: found {listed(both)} in both; a layer is of one kind")
    windows = config.sliding_window_list
    if windows is not None:
        in_trunk = sum(0 <= i < trunk for i in config.swa_layers)
        if len(windows) not in (len(config.swa_layers), in_trunk + (trunk < last)):
            problems.append(f"sliding_window_list: found {len(windows)} entries, wanted one for each of the "
                            f"{len(config.swa_layers)} swa_layers, in their order, or one for each of the {in_trunk} "
                            "in the trunk and one for all MTP layers")
        if any(w < 1 for w in windows):
            problems.append(f"sliding_window_list: found {min(windows)}, wanted windows of at least 1 token")
    return problems
