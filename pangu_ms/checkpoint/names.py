"""Every tensor of openPangu-2.0 in one table: its name, shape, how parallel ranks share it, and what it counts as.

Our names are the names of the released checkpoint, with two differences. The routed experts of a layer are stacked
into one tensor per projection, [n_routed_experts, rows, columns]. The copies of the embedding and of the head that the
release stores in each MTP layer do not exist here; `mtp_copies` names them.
"""

import math
from dataclasses import dataclass

from pangu_ms.config import LayerPlan, PanguConfig

# How ranks share a tensor: what is cut, over which parallel dimension, and the unit that must not be cut through.
WHOLE = ()
EXPERT = ("members", "expert", "experts")
ROWS, HEAD_ROWS = ("rows", "tensor", None), ("rows", "tensor", "heads")
COLUMNS, HEAD_COLUMNS = ("columns", "tensor", None), ("columns", "tensor", "heads")

INT8 = "int8"        # the Int8 release stores it as int8 with a `_scale` beside it (the model description, section 10)
FLOAT32 = "float32"  # stays float32 in a bfloat16 checkpoint: rounding it would change which experts are chosen

# name, shape in the words of _sizes(), how it is cut, component, storage note
GLOBAL = (
    ("model.embed_tokens.weight", "vocab hidden", (ROWS,), "embedding", None),
    ("lm_head.weight", "vocab hidden", (ROWS,), "head", None),
    ("model.norm.weight", "hidden", WHOLE, "norm", None),
    ("model.merge_mhc_module.phi.weight", "streams streams*hidden", WHOLE, "merge", None),
    ("model.merge_mhc_module.norm_gamma", "streams*hidden", WHOLE, "merge", None),
    ("model.merge_mhc_module.branch_alpha_pre", "1", WHOLE, "merge", None),
    ("model.merge_mhc_module.branch_beta_pre", "streams", WHOLE, "merge", None),
)

# The same for the layers that meet the condition; names go below "model.layers.{i}.".
EVERY_LAYER = (
    ("input_layernorm.weight", "hidden", WHOLE, "norm", None),
    ("self_attn.q_a_proj.weight", "q_rank hidden", WHOLE, "attention", None),
    ("self_attn.qa_conv.weight", "q_rank 1 taps", WHOLE, "convolution", None),
    ("self_attn.q_a_layernorm.weight", "q_rank", WHOLE, "attention", None),
    ("self_attn.q_b_proj.weight", "heads*qk q_rank", (HEAD_ROWS,), "attention", INT8),
    ("self_attn.kv_a_proj_with_mqa.weight", "kv_rank+rope hidden", WHOLE, "attention", None),
    ("self_attn.compresskv_conv.weight", "kv_rank 1 taps", WHOLE, "convolution", None),
    ("self_attn.kv_a_layernorm.weight", "kv_rank", WHOLE, "attention", None),
    ("self_attn.kv_b_proj.weight", "heads*kv kv_rank", (HEAD_ROWS,), "attention", None),
    ("self_attn.param_sink_compressed_kv", "sinks kv_rank", WHOLE, "sink", None),
    ("self_attn.param_sink_k_pe", "sinks rope", WHOLE, "sink", None),
    ("self_attn.o_conv.weight", "heads*v 1 taps", (HEAD_ROWS,), "convolution", None),
    ("self_attn.o_proj.weight", "hidden heads*v", (HEAD_COLUMNS,), "attention", INT8),
    ("post_attention_layernorm.weight", "hidden", WHOLE, "norm", None),
    ("pre_mlp_layernorm.weight", "hidden", WHOLE, "norm", None),
    ("post_mlp_layernorm.weight", "hidden", WHOLE, "norm", None),
)
DSA = (
    ("self_attn.indexer.wq_b.weight", "index_heads*index q_rank", WHOLE, "indexer", None),
    ("self_attn.indexer.wk.weight", "index hidden", WHOLE, "indexer", None),
    ("self_attn.indexer.k_norm.weight", "index", WHOLE, "indexer", None),
    ("self_attn.indexer.weights_proj.weight", "index_heads hidden", WHOLE, "indexer", None),
)
TRUNK = (
    ("attn_mhc_module.phi.weight", "gates streams*hidden", WHOLE, "mhc", None),
    ("attn_mhc_module.norm_gamma", "streams*hidden", WHOLE, "mhc", None),
    ("attn_mhc_module.branch_alpha", "3", WHOLE, "mhc", None),
    ("attn_mhc_module.branch_beta", "gates", WHOLE, "mhc", None),
    ("mlp_mhc_module.phi.weight", "gates streams*hidden", WHOLE, "mhc", None),
    ("mlp_mhc_module.norm_gamma", "streams*hidden", WHOLE, "mhc", None),
    ("mlp_mhc_module.branch_alpha", "3", WHOLE, "mhc", None),
    ("mlp_mhc_module.branch_beta", "gates", WHOLE, "mhc", None),
)
BLOCK_POST = (
    ("block_post_layernorm.weight", "streams*hidden", WHOLE, "norm", None),
)
DENSE = (
    ("mlp.gate_proj.weight", "dense hidden", (ROWS,), "dense_mlp", INT8),
    ("mlp.up_proj.weight", "dense hidden", (ROWS,), "dense_mlp", INT8),
    ("mlp.down_proj.weight", "hidden dense", (COLUMNS,), "dense_mlp", INT8),
)
MOE = (
    ("mlp.gate.weight", "experts hidden", WHOLE, "router", None),
    ("mlp.e_score_correction_bias", "experts", WHOLE, "router", FLOAT32),
    ("mlp.shared_experts.gate_proj.weight", "shared hidden", (ROWS,), "shared_expert", None),
    ("mlp.shared_experts.up_proj.weight", "shared hidden", (ROWS,), "shared_expert", None),
    ("mlp.shared_experts.down_proj.weight", "hidden shared", (COLUMNS,), "shared_expert", None),
    ("mlp.experts.gate_proj.weight", "experts expert hidden", (EXPERT, ROWS), "expert", INT8),
    ("mlp.experts.up_proj.weight", "experts expert hidden", (EXPERT, ROWS), "expert", INT8),
    ("mlp.experts.down_proj.weight", "experts hidden expert", (EXPERT, COLUMNS), "expert", INT8),
)
MTP = (
    ("enorm.weight", "hidden", WHOLE, "mtp_input", None),
    ("hnorm.weight", "hidden", WHOLE, "mtp_input", None),
    ("eh_proj.weight", "hidden 2*hidden", WHOLE, "mtp_input", INT8),
    ("shared_head.norm.weight", "hidden", WHOLE, "mtp_input", None),
)
LAYER = (
    (lambda plan: True, EVERY_LAYER),
    (lambda plan: plan.kind == "dsa", DSA),
    (lambda plan: plan.mtp_depth == 0, TRUNK),
    (lambda plan: plan.block_post_layernorm, BLOCK_POST),
    (lambda plan: not plan.moe, DENSE),
    (lambda plan: plan.moe, MOE),
    (lambda plan: plan.mtp_depth > 0, MTP),
)

# Stored a second time in every MTP layer of the release, below "model.layers.{i}.".
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


@dataclass(frozen=True)
class Split:
    """One cut of a tensor among ranks: `axis` of `members` | `rows` | `columns`, over `tensor` | `expert` ranks."""

    axis: str
    over: str
    units: int  # the number of ranks must divide it: a head, an expert or a row is never cut through
    unit: str


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model under our name.

    `sources` are the release's names of it: itself, or one per routed expert along the first axis. Seen as rows and
    columns, a parameter is `members` matrices of `rows` x `columns`: one per expert, or one.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    splits: tuple[Split, ...]
    note: str | None  # INT8, FLOAT32 or None
    sources: tuple[str, ...]
    plan: LayerPlan | None  # of the layer it belongs to

    @property
    def stacked(self) -> bool:
        return self.sources != (self.name,)

    @property
    def members(self) -> int:
        return len(self.sources)

    @property
    def member_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def rows(self) -> int:
        return self.member_shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.member_shape[1:])

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parameters(config: PanguConfig) -> dict[str, Parameter]:
    """Every parameter of the model by its name, in the order they are stored: embedding, layers, head."""
    sizes = _sizes(config)
    found = [_parameter(config, sizes, row, "", None) for row in GLOBAL[:1]]
    for plan in config.layers:
        for applies, rows in LAYER:
            if applies(plan):
                found += [_parameter(config, sizes, row, layer_prefix(plan.index), plan) for row in rows]
    found += [_parameter(config, sizes, row, "", None) for row in GLOBAL[1:]]
    return {parameter.name: parameter for parameter in found}


def mtp_copies(config: PanguConfig) -> dict[str, str]:
    """The release's repetitions of embedding and head: name of the copy -> name of the parameter it repeats."""
    return {layer_prefix(plan.index) + copy: original
            for plan in config.layers if plan.mtp_depth for copy, original in COPIES.items()}


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def _parameter(config: PanguConfig, sizes: dict[str, int], row: tuple, prefix: str,
               plan: LayerPlan | None) -> Parameter:
    name, shape, splits, component, note = row
    shape = tuple(sizes[word] for word in shape.split())
    sources = (prefix + name,)
    if component == "expert":
        head, tail = name.split("experts.")
        sources = tuple(f"{prefix}{head}experts.{e}.{tail}" for e in range(config.n_routed_experts))
    member_shape = shape[1:] if component == "expert" else shape
    cut = {"rows": member_shape[0], "columns": math.prod(member_shape[1:])}
    resolved = tuple(Split(axis, over, sizes[unit] if unit else cut[axis], unit or axis) for axis, over, unit in splits)
    return Parameter(prefix + name, shape, component, resolved, note, sources, plan)


def _sizes(c: PanguConfig) -> dict[str, int]:
    """The words of the table's shapes."""
    return {
        "1": 1, "3": 3, "vocab": c.vocab_size, "hidden": c.hidden_size, "2*hidden": 2 * c.hidden_size,
        "streams": c.mhc_num_stream, "streams*hidden": c.mhc_num_stream * c.hidden_size,
        "gates": c.mhc_num_stream * (c.mhc_num_stream + 2),  # one pre and one post per stream, and the mixing matrix
        "q_rank": c.q_lora_rank, "kv_rank": c.kv_lora_rank, "rope": c.qk_rope_head_dim,
        "kv_rank+rope": c.kv_lora_rank + c.qk_rope_head_dim, "heads": c.num_attention_heads,
        "heads*qk": c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim),
        "heads*kv": c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
        "heads*v": c.num_attention_heads * c.v_head_dim,
        "sinks": c.param_sink_number, "taps": c.router_sliding_window,
        "index_heads": c.index_n_heads, "index": c.index_head_dim,
        "index_heads*index": c.index_n_heads * c.index_head_dim,
        "dense": c.intermediate_size, "experts": c.n_routed_experts, "expert": c.moe_intermediate_size,
        "shared": c.n_shared_experts * c.moe_intermediate_size,
    }


def count_parameters(config: PanguConfig) -> dict:
    """Numbers of parameters (the model description, section 2.2).

    `components`: of the trunk, by component. `trunk`, `mtp` (all MTP layers), `trunk_and_mtp`, `with_copies` (as the
    release stores them). `active`: used for one token by the trunk, `layers` alone, then `with_head`, then
    `with_head_and_embedding`.
    """
    found = parameters(config)
    components: dict[str, int] = {}
    for p in found.values():
        if p.plan is None or p.plan.mtp_depth == 0:
            components[p.component] = components.get(p.component, 0) + p.count
    trunk, total = sum(components.values()), sum(p.count for p in found.values())
    copies = sum(found[original].count for original in mtp_copies(config).values())
    experts = components.get("expert", 0)
    active = trunk - experts + experts * config.num_experts_per_tok // config.n_routed_experts
    embedding, head = components["embedding"], components["head"]
    return {
        "components": components, "trunk": trunk, "mtp": total - trunk, "trunk_and_mtp": total,
        "with_copies": total + copies,
        "active": {"layers": active - embedding - head, "with_head": active - embedding,
                   "with_head_and_embedding": active},
    }
