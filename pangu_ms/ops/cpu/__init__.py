"""What a CPU computes in place of formulas: compiled operators, for float32."""
from pangu_ms.ops.cpu.decoding import (
    append_index_rows, attention_output, grouped_rows, latent_keys, latent_query, moe, mtp_input,
    residual_post, residual_post_pre, residual_pre, select_rows,
)
from pangu_ms.ops.cpu.formulas import (
    absorbed_attention, apply_rope, choose_experts, cross_entropy, expanded_attention, experts_gathered,
    experts_grouped, feed_forward, grouped_attention, latent_rows, linear, masked_softmax, mhc_merge, mhc_post,
    mhc_pre, ring_update, rms_norm, rotary_angles, short_conv, swiglu,
)
from pangu_ms.ops.cpu.library import available

__all__ = [
    "absorbed_attention", "append_index_rows", "apply_rope", "attention_output", "available", "choose_experts",
    "cross_entropy", "expanded_attention", "experts_gathered", "experts_grouped", "feed_forward", "gathers_no_rows",
    "grouped_attention", "grouped_rows", "latent_keys", "latent_query", "latent_rows",
    "linear", "masked_softmax", "mhc_merge", "mhc_post", "mhc_pre", "moe", "mtp_input", "residual_post",
    "residual_post_pre", "residual_pre", "ring_update", "rms_norm", "rotary_angles", "select_rows", "short_conv",
    "swiglu",
]


def gathers_no_rows(plan):
    """Sparse attention gathers the rows of each query."""
    return False
