"""Whole graphs with the Ascend forms, in bf16 at the widths of the 92B model: all types and shapes pass inference.

Two layers and an MTP layer stand for all; no memory is taken for parameters. What a device would make of it is open:
the graph is refused here where kernels are chosen. See tests/ops/test_ascend.py for the forms by themselves.
"""
from dataclasses import replace

import mindspore as ms
import pytest
from mindspore.nn.utils import no_init_parameters

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe import PanguProMoEConfig
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.architectures.pangu_ultra_moe import PanguUltraMoEConfig

CONFIG = PanguConfig.flash_92b(
    compute_dtype="bfloat16", num_hidden_layers=2, num_nextn_predict_layers=1, first_k_dense_replace=1,
    dsa_layers=(0,), swa_layers=(1, 2), sliding_window_list=(512, 2048), block_post_layernorm_idx=(0,))
CHUNK, CAPACITY = 512, 32768
ALWAYS = {"RmsNorm", "RotaryPositionEmbedding", "Swiglu", "TopkExt"}
MANY_EXPERTS = {"MoeTokenPermute", "GroupedMatmulV4", "InnerMoeTokenUnpermute"}
MANY_ROWS = ALWAYS | MANY_EXPERTS | {"FlashAttentionScore"}
# One layer for all.
EMBEDDED = PanguEmbeddedConfig.embedded_7b(compute_dtype="bfloat16", num_hidden_layers=1)
TIED = PanguEmbeddedConfig.embedded_1b(compute_dtype="bfloat16", num_hidden_layers=1)
PRO_MOE = PanguProMoEConfig.pro_moe_72b(compute_dtype="bfloat16", num_hidden_layers=1)
R_72B = PanguProMoEV2Config.r_72b(compute_dtype="bfloat16", num_hidden_layers=1, mlp_only_layers=(), num_mtp_layers=0)


@pytest.fixture
def model(on_ascend):
    from pangu_ms import PanguForCausalLM
    with no_init_parameters():
        return PanguForCausalLM(CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("length, sparse, capacity, primitives", [
    (None, True, CAPACITY, MANY_ROWS | {"SparseFlashAttention", "LightningIndexer"}),
    (None, False, CONFIG.index_topk, MANY_ROWS), (4, True, CAPACITY, ALWAYS | {"LightningIndexer"})])
def test_steps(model, inferred_graph, length, sparse, capacity, primitives):
    from pangu_ms.generation.steps import Step
    step = Step(model, 1, length, sparse, True, CHUNK if length is None else None, capacity)
    found, shapes = inferred_graph(step, *step.get_inputs())
    assert primitives <= found
    assert ("SparseFlashAttention" in found) == (length is None and sparse)
    assert not any("-1" in shape for shape in shapes)
    if length is None:                                                          # no copies, and no scores of all rows
        assert not {f"1, {CHUNK}, {CONFIG.index_topk}, 576", f"1, {CHUNK}, 24, {CAPACITY}"} & set(shapes)


@pytest.mark.slow
def test_drafting(model, inferred_graph):
    from pangu_ms.generation.steps import Draft
    step = Draft(model, 1, 3)
    found, shapes = inferred_graph(step, *step.get_inputs())
    assert ALWAYS <= found and not any("-1" in shape for shape in shapes)


@pytest.mark.slow
def test_gradients_of_training(on_ascend, inferred_graph, monkeypatch):
    """A DSA layer and a sliding MTP layer, both with experts; with the largest logits of their heads."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.training.objectives import indexer
    from pangu_ms.training.objectives.pretraining import Pretraining
    from pangu_ms.training.objectives.settings import TrainingSettings
    from pangu_ms.training.step import Gradients
    monkeypatch.setattr(indexer, "QUERIES", 1152)                                # two pieces stand for eighteen
    settings = TrainingSettings(indexer_loss="sparse", indexer_loss_coeff=0.1, balance_loss_coeff=0.1,
                                z_loss_coeff=0.1, qk_clip_threshold=100)
    config = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0, swa_layers=(1,), sliding_window_list=(2048,))
    with no_init_parameters():
        model = PanguForCausalLM(config)
    forward = Pretraining(model, settings)
    weights = ms.ParameterTuple(forward.trained_parameters())
    ids, mask = (ms.Tensor(shape=[1, 2304], dtype=dtype) for dtype in (ms.int32, ms.float32))
    found, shapes = inferred_graph(Gradients(forward, weights), ids, ids, mask, ids)
    assert MANY_ROWS <= found
    assert {"RmsNormGrad", "RotaryPositionEmbeddingGrad", "SwigluGrad", "FlashAttentionScoreGrad",
            "MoeTokenPermuteGrad", "MoeTokenUnpermuteGrad"} <= found
    assert not any("-1" in shape for shape in shapes)
    assert f"2, {CONFIG.num_attention_heads}" in shapes
    assert f"1024, {CONFIG.vocab_size}" in shapes and f"2304, {CONFIG.vocab_size}" not in shapes    # logits, in pieces


@pytest.mark.slow
@pytest.mark.parametrize("config, length, primitives", [
    (EMBEDDED, None, set()), (EMBEDDED, 1, set()), (PRO_MOE, None, MANY_EXPERTS | {"TopkExt"}), (R_72B, None, set()),
    (R_72B, 1, set())])
def test_steps_of_grouped_queries(on_ascend, inferred_graph, config, length, primitives):
    """At the widths of the releases, one layer for all."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.steps import Step
    with no_init_parameters():
        network = PanguForCausalLM(config)
    step = Step(network, 2, length, False, False, CHUNK if length is None else None, 1024)
    found, shapes = inferred_graph(step, *step.get_inputs())
    assert {"RmsNorm", "RotaryPositionEmbedding", "Swiglu", "FlashAttentionScore"} | primitives <= found
    assert not any("-1" in shape for shape in shapes)
    copied = (2, 1024, config.num_attention_heads, config.plan.layers[0].attention.head_dim)    # for each query head
    assert f"2, 1, {config.vocab_size}" in shapes and ", ".join(map(str, copied)) not in shapes


@pytest.mark.slow
@pytest.mark.parametrize("drafting", [False, True])
def test_steps_of_ultra(on_ascend, inferred_graph, drafting):
    """At the widths of Ultra MoE 718B, one layer with experts and the MTP layer, which sees the whole context."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.steps import Draft, Step
    with no_init_parameters():
        network = PanguForCausalLM(PanguUltraMoEConfig.ultra_moe_718b(
            compute_dtype="bfloat16", num_hidden_layers=1, num_dense_layers=0))
    step = Draft(network, 1, 2, 1024) if drafting else Step(network, 1, None, False, True, CHUNK, 1024)
    found, shapes = inferred_graph(step, *step.get_inputs())
    assert (ALWAYS if drafting else MANY_ROWS) <= found
    assert not any("-1" in shape for shape in shapes)


@pytest.mark.slow
def test_gradients_of_grouped_queries(on_ascend, inferred_graph):
    """Of a head that is the embedding."""
    from pangu_ms import PanguForCausalLM
    from pangu_ms.training.objectives.pretraining import Pretraining
    from pangu_ms.training.objectives.settings import TrainingSettings
    from pangu_ms.training.step import Gradients
    with no_init_parameters():
        network = PanguForCausalLM(TIED)
    forward = Pretraining(network, TrainingSettings())
    ids, mask = (ms.Tensor(shape=[1, 2048], dtype=dtype) for dtype in (ms.int32, ms.float32))
    gradients = Gradients(forward, ms.ParameterTuple(forward.trained_parameters()))
    found, shapes = inferred_graph(gradients, ids, ids, mask, ids)
    assert {"RmsNormGrad", "RotaryPositionEmbeddingGrad", "SwigluGrad", "FlashAttentionScoreGrad"} <= found
    assert not any("-1" in shape for shape in shapes)
