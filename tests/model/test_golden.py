"""The full forward against golden files: every piece of every layer, in graph mode."""
import json
import shutil

import numpy as np
import pytest

from compare_golden import compare
from pangu_ms import PanguForCausalLM

GOLDEN = [("tiny", "T5"), ("tiny", "T24"), ("tiny", "T64"), ("tiny", "T40_B2"),
          ("tiny_full", "T5"), ("tiny_full", "T24"), ("tiny_full", "T64"),
          ("odd", "T5"), ("odd", "T24"), ("odd", "T64"), ("odd", "T24_B2"),
          ("eps", "T5"), ("eps", "T24"), ("eps", "T64"),
          *[(name, file) for name in ("embedded", "embedded_tied", "pro_moe", "pro_moe_v2", "ultra_moe")
            for file in ("T5", "T24", "T40_B2")]]


@pytest.mark.parametrize("name, file", GOLDEN)
def test_every_piece_agrees(model, golden, name, file):
    wanted = golden(name, file)
    rows = compare(model(name).trace(wanted["ids"]), wanted)
    assert len(rows) >= 3 * len(model(name).plan.trunk) + 2
    off = [row for row in rows if not row.within(2e-5)]
    assert not off


@pytest.mark.parametrize("name, file", [("embedded", "T24"), ("embedded_tied", "T40_B2"), ("pro_moe", "T24"),
                                        ("pro_moe_v2", "T24"), ("ultra_moe", "T24")])
def test_formulas_agree_where_no_operator_is_compiled(data, golden, name, file, monkeypatch):
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    wanted = golden(name, file)
    rows = compare(PanguForCausalLM.from_pretrained(data / name).trace(wanted["ids"]), wanted)
    assert not [row for row in rows if not row.within(2e-5)]


def test_a_tied_head_is_in_memory_once(model):
    names = [parameter.name for parameter in model("embedded_tied").get_parameters()]
    assert "lm_head.weight" not in names and len(names) == len(set(names)) == 4 * 13 + 2


def test_forward_and_mtp_give_what_the_trace_gives(model, golden):
    tiny, wanted = model("tiny"), golden("tiny", "T5")
    logits, drafts = tiny(wanted["ids"]), tiny.mtp_logits(wanted["ids"])
    close(logits.asnumpy(), wanted["logits"])
    assert len(drafts) == 3
    for depth, draft in enumerate(drafts, 1):
        close(draft.asnumpy(), wanted[f"mtp{depth}_logits"])


def test_a_depth_without_rows_is_left_out(model, golden):
    tiny, wanted = model("tiny"), golden("tiny", "T5")
    drafts = tiny.mtp_logits(wanted["ids"][:, :2])
    assert [draft.shape for draft in drafts] == [(1, 1, 199)]
    close(drafts[0].asnumpy(), wanted["mtp1_logits"][:, :1])


def test_config_decides_what_the_first_depth_reads(data, golden, tmp_path):
    """After the final norm it is another function: the golden files hold the default, before it."""
    wanted = golden("tiny", "T5")
    found = first_depth(data / "tiny", tmp_path, wanted["ids"], mtp_hidden="final")
    assert np.abs(found - wanted["mtp1_logits"]).max() > 0.1


def test_the_first_depth_of_ultra_may_read_what_is_not_normed(data, golden, tmp_path):
    wanted = golden("ultra_moe", "T5")
    found = first_depth(data / "ultra_moe", tmp_path, wanted["ids"], mtp_hidden="merged")
    close(found, wanted["mtp1_logits_raw"])


def first_depth(source, directory, ids, **changed):
    """The first MTP depth's logits of a checkpoint with changed fields."""
    fields = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | changed))
    shutil.copy(source / "model.safetensors", directory)
    return PanguForCausalLM.from_pretrained(directory).mtp_logits(ids)[0].asnumpy()


def close(found, wanted):
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
