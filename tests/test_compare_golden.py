"""tools/compare_golden.py: passes on equal results, names the first piece that is off, refuses what does not fit."""
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from compare_golden import main


@pytest.fixture
def golden(data):
    with np.load(data / "odd" / "T24_B2.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def trace(golden, monkeypatch):
    """The results of a model that stands in for the real one: those of the golden file, for a test to change."""
    results = {key: value.copy() for key, value in golden.items() if key not in ("ids", "gaps", "meta")}

    def model_trace(ids):
        assert ids.dtype == np.int32 and np.array_equal(ids, golden["ids"])
        return results

    pretrained = ModuleType("pangu_ms.pretrained")
    pretrained.PanguForCausalLM = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(trace=model_trace))
    monkeypatch.setitem(sys.modules, pretrained.__name__, pretrained)
    return results


def run(model, golden, *options):
    return main(["--model", str(model), "--golden", str(golden), *options])


def odd(data, *options):
    return run(data / "odd", data / "odd" / "T24_B2.npz", *options)


def off(capsys):
    """The pieces marked off, in order, and the one that is named."""
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("first piece that is off: ")
    marked = [line[:24].strip() for line in lines if line.endswith("off")]
    return marked, lines[-1].removeprefix("first piece that is off: ")


def test_equal_results_pass(data, trace, capsys):
    assert odd(data) == 0
    shown = capsys.readouterr().out
    assert "agree to 2e-05" in shown and " off" not in shown


def test_every_piece_is_listed_in_the_order_of_computation(data, trace, golden, capsys):
    assert odd(data) == 0
    shown = [line[:24].strip() for line in capsys.readouterr().out.splitlines()[:-1]]
    inner = {0: ["attn", "mlp"], 1: ["index_scores", "index_sel", "attn", "mlp"],
             2: ["attn", "router_ids", "router_w", "mlp"], 3: ["attn", "router_ids", "router_w", "mlp"],
             4: ["index_scores", "index_sel", "attn", "router_ids", "router_w", "mlp"]}
    layers = [f"layer {i} {key}" for i in inner for key in [*inner[i], "streams"]]
    tail = [f"mtp{d}_{key}" for d in (1, 2, 3) for key in ("hidden", "logits")]
    assert shown == ["index_layers", "router_layers", *layers, "merged", "final", "logits", *tail]


@pytest.mark.parametrize("key, at, piece", [
    ("attn", 2, "layer 2 attn"), ("mlp", 0, "layer 0 mlp"), ("streams", 4, "layer 4 streams"),
    ("index_scores", 1, "layer 4 index_scores"), ("router_w", 0, "layer 2 router_w"),
    ("merged", ..., "merged"), ("final", ..., "final"), ("logits", ..., "logits"),
    ("mtp3_hidden", ..., "mtp3_hidden"), ("mtp1_logits", ..., "mtp1_logits"),
])
def test_one_piece_off_is_named(data, trace, capsys, key, at, piece):
    part = trace[key][at]
    largest = np.abs(part[np.isfinite(part)]).max()
    entry = np.unravel_index(np.argmin(np.abs(part)), part.shape)  # a small entry: the scale is that of the piece
    part[entry] += 3e-5 * largest
    assert odd(data) == 1
    assert off(capsys) == ([piece], piece)
    assert odd(data, "--tolerance", "4e-5") == 0


def test_the_first_of_several_is_named(data, trace, capsys):
    trace["logits"] *= 1.01
    trace["streams"][1:] *= 1.01
    trace["mlp"][1:] *= 1.01
    assert odd(data) == 1
    pieces, named = off(capsys)
    assert named == "layer 1 mlp" and pieces[:3] == ["layer 1 mlp", "layer 1 streams", "layer 2 mlp"]
    assert pieces[-1] == "logits"


def test_one_different_selection_is_off_at_any_tolerance(data, trace, capsys):
    trace["index_sel"][1, 0, 20, 3] ^= 1
    trace["router_ids"][2, 1, 7, 0] += 1
    assert odd(data, "--tolerance", "10") == 1
    shown = capsys.readouterr().out
    assert "first piece that is off: layer 4 index_sel" in shown and shown.count("1 differ   off") == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_off(data, trace, capsys, value):
    trace["attn"][3, 0, 0, 0] = value
    assert odd(data, "--tolerance", "10") == 1
    assert off(capsys)[1] == "layer 3 attn"


def test_a_future_position_that_is_not_masked_is_off(data, trace, capsys):
    assert trace["index_scores"][0, 0, 2, 3] == -np.inf
    trace["index_scores"][0, 0, 2, 3] = -1e30
    assert odd(data) == 1
    assert off(capsys)[1] == "layer 1 index_scores"


def test_anything_where_zeros_are_wanted_is_off(data, trace, golden, tmp_path, capsys):
    trace["mlp"][0] = golden["mlp"][0] = 0
    np.savez(tmp_path / "zeros.npz", **golden)
    assert run(data / "odd", tmp_path / "zeros.npz") == 0
    trace["mlp"][0, 0, 0, 0] = 1e-9
    assert run(data / "odd", tmp_path / "zeros.npz") == 1


# ---- bad input

def refused(capsys, code):
    assert code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("compare_golden.py: error: ") and shown.err.count("\n") == 1
    return shown.err


def test_another_shape(data, trace, capsys):
    trace["attn"] = trace["attn"][:, :1]
    assert "attn: the model gives shape (5, 1, 24, 40), wanted" in refused(capsys, odd(data))


def test_other_keys(data, trace, capsys):
    trace["mtp4_hidden"] = trace.pop("mtp3_hidden")
    line = refused(capsys, odd(data))
    assert "gives mtp4_hidden that" in line and "holds mtp3_hidden that" in line


def test_a_key_of_unknown_place(data, trace, golden, tmp_path, capsys):
    golden["queries"] = trace["queries"] = np.zeros(3)
    np.savez(tmp_path / "more.npz", **golden)
    assert "holds queries, which this tool cannot place" in refused(capsys, run(data / "odd", tmp_path / "more.npz"))


def test_other_files_are_compared_with_a_note(data, trace, tmp_path, capsys):
    """A converted checkpoint: the same weights in other files."""
    assert run(tmp_path, data / "odd" / "T24_B2.npz") == 0
    assert "note: the golden data was made for another file" in capsys.readouterr().out
    assert odd(data) == 0
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"", "is not an npz file"), (b"some text", "is not an npz file"),
    (b"\x93NUMPY", "is not an npz file")])
def test_not_an_npz(data, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    assert f"x.npz: {words}" in refused(capsys, run(data / "odd", tmp_path / "x.npz"))


def test_damaged_npz(data, tmp_path, capsys):
    content = bytearray((data / "odd" / "T24_B2.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    assert "x.npz: cannot be read as an npz file" in refused(capsys, run(data / "odd", tmp_path / "x.npz"))


def test_pickles_are_not_loaded(data, golden, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **golden | {"ids": np.array([{}], object)})
    assert "x.npz: cannot be read as an npz file" in refused(capsys, run(data / "odd", tmp_path / "x.npz"))


@pytest.mark.parametrize("meta", [None, "no json", "[]", "{}"])
def test_meta_without_a_checkpoint(data, golden, tmp_path, capsys, meta):
    del golden["meta"]
    np.savez(tmp_path / "x.npz", **golden | ({} if meta is None else {"meta": np.array(meta)}))
    line = refused(capsys, run(data / "odd", tmp_path / "x.npz"))
    assert ("x.npz: lacks meta" if meta is None else "meta does not hold the sha256") in line


@pytest.mark.slow
def test_the_real_model_agrees(data):
    assert run(data / "odd", data / "odd" / "T24_B2.npz") == 0
