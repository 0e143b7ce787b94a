"""The table against the published numbers of the model description, sections 2.1, 2.2 and 10."""
import json
import re
import struct

import pytest

from pangu_ms.architectures import read_config
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.tensors import INT8, check_ranks, computed_tensors, mtp_copies, parameters
from pangu_ms.checkpoint.layout import released, stacked
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks


@pytest.fixture(scope="module")
def flash():
    return PanguConfig.flash_92b()


@pytest.mark.parametrize("name", ["tiny", "tiny_full", "odd", "eps", "embedded", "embedded_tied", "pro_moe",
                                  "pro_moe_v2", "ultra_moe"])
def test_the_release_layout_is_what_the_golden_checkpoints_hold(data, name):
    with open(data / name / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__")
    config = read_config(data / name)
    wanted = {s.name: list(s.shape) for s in released(config, config.tensors.copies_known)}
    assert wanted == {key: fields["shape"] for key, fields in header.items() if key not in computed_tensors(config)}


def test_tensor_counts_of_the_two_releases(flash):
    tensors = released(flash)
    assert len(tensors) == 37_587 and len(mtp_copies(flash)) == 6
    assert sum(s.parameter.note == INT8 for s in tensors) == 36_203


def test_parameter_counts_of_flash(flash):
    count = flash.parameter_count()
    assert round(count["trunk"] / 1e9, 3) == 91.597
    assert round(count["trunk_and_mtp"] / 1e9, 2) == 97.81
    assert round(count["with_copies"] / 1e9, 3) == 100.136
    assert [round(n / 1e9, 3) for n in count["active"].values()] == [5.005, 5.393, 5.781]
    assert count["mtp"] / 3 == pytest.approx(2.0706e9, rel=1e-4)
    assert count["components"] == {
        "embedding": 387_973_120, "head": 387_973_120, "merge": 51_205,
        "attention": 46 * 35_554_816, "convolution": 46 * 23_040, "sink": 46 * 73_728, "mhc": 46 * 512_054,
        "indexer": 16 * 3_534_976, "dense_mlp": 2 * 70_778_880, "expert": 44 * 256 * 7_864_320,
        "shared_expert": 44 * 7_864_320, "router": 44 * 256 * 2561, "norm": 46 * 4 * 2560 + 9 * 10_240 + 2560}


def test_shapes_of_flash(flash):
    shapes = {name: p.shape for name, p in parameters(flash).items()}
    assert shapes["model.layers.0.self_attn.q_b_proj.weight"] == (9216, 1024)
    assert shapes["model.layers.48.mlp.experts.gate_proj.weight"] == (256, 1024, 2560)
    assert shapes["model.layers.48.mlp.experts.down_proj.weight"] == (256, 2560, 1024)
    assert shapes["model.layers.46.eh_proj.weight"] == (2560, 5120)
    assert shapes["model.layers.45.self_attn.o_conv.weight"] == (6144, 1, 3)
    assert shapes["model.layers.39.block_post_layernorm.weight"] == (10240,)
    assert "model.layers.46.attn_mhc_module.phi.weight" not in shapes
    assert "model.layers.46.embed_tokens.weight" not in shapes
    assert "model.layers.1.self_attn.indexer.wk.weight" not in shapes


def test_slices_of_flash(flash):
    ranks = Ranks(tensor=4, expert=2)
    check_ranks(flash, ranks)
    last = {s.name: s for s in stacked(flash, ranks.at(7))}
    layer = "model.layers.3."
    shapes = {name: last[layer + name].shape for name in (
        "self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight",
        "self_attn.o_conv.weight", "self_attn.q_a_proj.weight", "mlp.experts.gate_proj.weight",
        "mlp.experts.down_proj.weight", "mlp.shared_experts.down_proj.weight", "mlp.gate.weight")}
    assert list(shapes.values()) == [(2304, 1024), (3072, 512), (2560, 1536), (1536, 1, 3), (1024, 2560),
                                     (128, 256, 2560), (128, 2560, 256), (2560, 256), (256, 2560)]
    part = last[layer + "mlp.experts.down_proj.weight"].slices[0]
    assert (part.member, part.row, part.rows, part.column, part.columns) == (128, 0, 2560, 768, 256)


def test_ranks_that_cut_through_a_head_or_an_expert_are_refused(data):
    with pytest.raises(ConfigError) as refusal:
        check_ranks(PanguConfig.from_pretrained(data / "tiny"), Ranks(tensor=2, expert=3))
    assert re.search(r"^tensor parallel 2 does not divide .*199 rows \(model.embed_tokens.weight\).*"
                     r"3 heads \(self_attn.q_b_proj.weight\).*: take one of 1; expert parallel 3 does not divide "
                     r"8 experts \(.*\): take one of 1, 2, 4, 8$", str(refusal.value))
    with pytest.raises(ConfigError, match="tensor parallel is 0"):
        Ranks(tensor=0)
