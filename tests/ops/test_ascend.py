"""The Ascend forms: types and shapes are inferred; a host without CANN then finds no kernel.

In bf16, at the widths of the 92B model. The graph is read back from MindSpore's dump of it.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from pangu_ms import device
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.model import elementary
from pangu_ms.ops import ascend
from tests.ops import flat
from tests.ops.cells import Call

device.start()
CONFIG = PanguConfig.flash_92b()
HEADS, LATENT, ROPE = CONFIG.num_attention_heads, CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim
WIDTH, SINKS, TOPK = CONFIG.qk_nope_head_dim + ROPE, CONFIG.param_sink_number, CONFIG.index_topk
KV_B = (HEADS * (CONFIG.qk_nope_head_dim + CONFIG.v_head_dim), LATENT)
OUT = HEADS * CONFIG.v_head_dim
HIDDEN, EXPERTS, CHOICES, EXPERT = 2560, 256, 8, 1024
SCALE = WIDTH ** -0.5


class Gradient(ms.nn.Cell):
    """Of the sum of what the function gives, by every argument."""

    def __init__(self, function, *constants):
        super().__init__()
        self.call, self.gradient = Call(function, *constants), ops.GradOperation(get_all=True)

    def construct(self, *arguments):
        return self.gradient(self.call)(*arguments)


def bf16(*shape):
    return ms.Tensor(shape=shape, dtype=ms.bfloat16, init="zeros")              # no memory behind it


def of(dtype, *shape):
    return ms.Tensor(shape=shape, dtype=dtype, init="zeros")


def queries(length, keys):
    """The arguments of an attention: q, sinks, keys."""
    return bf16(1, length, HEADS, WIDTH), bf16(SINKS, LATENT + ROPE), bf16(1, keys, LATENT + ROPE)


FORMS = {
    # name: (arguments, constants behind them, primitives of the forward graph, of the gradient's, the result's shape)
    "rms_norm": ((bf16(1, 512, HIDDEN), bf16(HIDDEN)), (1e-5,), {"RmsNorm"}, {"RmsNormGrad"}, (1, 512, HIDDEN)),
    "swiglu": ((bf16(512, EXPERT), bf16(512, EXPERT)), (), {"Swiglu"}, {"SwigluGrad"}, (512, EXPERT)),
    "apply_rope": ((bf16(1, 512, HEADS, WIDTH), *(of(ms.float32, 1, 512, 1, ROPE // 2),) * 2), (WIDTH - ROPE, True),
                   {"RotaryPositionEmbedding"}, {"RotaryPositionEmbeddingGrad"}, (1, 512, HEADS, WIDTH)),
    "top_k": ((of(ms.float32, 1, 512, 8192),), (TOPK,), {"TopkExt"}, None, (1, 512, TOPK)),
    "cross_entropy": ((bf16(1, 4096, HIDDEN), bf16(CONFIG.vocab_size, HIDDEN), of(ms.int32, 1, 4096),
                       of(ms.float32, 1, 4096)), (), {"Dense", "OneHot"}, {"Dense", "MatMul"}, (1, 4096)),
    "expanded_attention": ((*queries(512, 1048), of(ms.bool_, 1, 512, 1, SINKS + 1048), bf16(*KV_B)), (SCALE,),
                           {"FlashAttentionScore"}, {"FlashAttentionScoreGrad"}, (1, 512, OUT)),
    "grouped_attention_and_largest": ((bf16(1, 512, 32, 128), bf16(1, 1048, 8, 128), bf16(1, 1048, 8, 128),
                                       of(ms.bool_, 1, 512, 1, 1048)), (128 ** -0.5,),
                                      {"FlashAttentionScore", "ReduceMax"}, {"FlashAttentionScoreGrad"}, (32,)),
    "grouped_attention_with_sinks": (                                          # of openPangu-R-72B-2512
        (bf16(1, 512, 64, 192), bf16(1, 1048, 4, 192), bf16(1, 1048, 4, 128), of(ms.bool_, 1, 512, 1, SINKS + 1048),
         192 ** -0.5, bf16(SINKS, 4, 192), bf16(SINKS, 4, 128)), (), {"FlashAttentionScore"},
        {"FlashAttentionScoreGrad"}, (1, 512, 64 * 128)),
    "sparse_attention": ((*queries(512, 8192), of(ms.int32, 1, 512, TOPK), of(ms.int32, 1, 512), bf16(*KV_B)),
                           (SCALE,), {"SparseFlashAttention"}, None, (1, 512, OUT)),
    "topk_indices": ((bf16(1, 512, CONFIG.index_n_heads, CONFIG.index_head_dim), bf16(1, 8192, CONFIG.index_head_dim),
                of(ms.float32, 1, 512, CONFIG.index_n_heads), of(ms.int32, 1, 512)), (TOPK,), {"LightningIndexer"},
               None, (1, 512, TOPK)),
    "experts_grouped": ((bf16(512, HIDDEN), of(ms.int32, 512, CHOICES), of(ms.float32, 512, CHOICES),
                     bf16(EXPERTS, EXPERT, HIDDEN), bf16(EXPERTS, EXPERT, HIDDEN), bf16(EXPERTS, HIDDEN, EXPERT)), (),
                    {"MoeTokenPermute", "GroupedMatmulV4", "InnerMoeTokenUnpermute"},
                    {"MoeTokenPermuteGrad", "GroupedMatmulV4", "MoeTokenUnpermuteGrad"}, (512, HIDDEN)),
}


@pytest.mark.parametrize("name", FORMS)
def test_inference_passes_and_only_the_kernel_is_missing(on_ascend, inferred_graph, name):
    arguments, constants, primitives, _, shape = FORMS[name]
    found, shapes = inferred_graph(Call(getattr(flat, name), *constants), *arguments)
    assert primitives <= found
    assert ", ".join(map(str, shape)) in shapes
    assert not any("-1" in each for each in shapes)


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name][3]])
def test_the_gradient_is_defined(on_ascend, inferred_graph, name):
    arguments, constants, _, primitives, _ = FORMS[name]
    found, shapes = inferred_graph(Gradient(getattr(flat, name), *constants), *arguments)
    assert primitives <= found
    assert not any("-1" in each for each in shapes)


@pytest.mark.parametrize("name, arguments", [
    ("rms_norm", (bf16(2, 3, 8), bf16(7))), ("swiglu", (bf16(4, 6), bf16(5, 6)))])
def test_a_wrong_shape_is_seen_by_inference(on_ascend, inferred_graph, name, arguments):
    """Otherwise the tests above would show nothing."""
    with pytest.raises(pytest.fail.Exception, match="not for want of a kernel"):
        inferred_graph(Call(getattr(flat, name), *FORMS[name][1]), *arguments)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_forms_without_a_fused_operator_run_here(name):
    x = ms.Tensor(np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32))
    found, wanted = (Call(form)(x).asnumpy() for form in (getattr(ascend, name), getattr(elementary, name)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
