"""tools/bench.py generate: its formulas by hand, its count of kernels, and one run on a tiny checkpoint."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_generate import (
    beside, count_kernels, decode_bytes, decode_kernels, draft_report, lengths, memory_bandwidth, prefill_flop,
    step_bytes)

from pangu_ms.checkpoint import convert
from pangu_ms.config import PanguConfig

ROOT = Path(__file__).parents[1]

# tiny, by hand. Hidden 48, 4 streams, 3 heads of 16 + 8 and 12, ranks 32 and 24, convolutions of 3, 5 sinks.
EVERY_LAYER = (
    4 * 48                                                        # norms around the two sublayers
    + 32 * 48 + 32 + 3 * 24 * 32                                  # q_a, its norm, q_b
    + 32 * 48 + 24 + 3 * (16 + 12) * 24                           # kv_a (latent and rotary), norm of the latent, kv_b
    + 48 * 3 * 12                                                 # o
    + 3 * (32 + 24 + 36)                                          # convolutions
    + 5 * (24 + 8)                                                # sinks
    + 2 * (24 * 192 + 192 + 3 + 24))                              # two mHC modules: phi, gamma, alpha, beta
INDEXER = 6 * 20 * 32 + 20 * 48 + 20 + 6 * 48                     # in layers 0 and 3
DENSE = 3 * 80 * 48                                               # layer 0
MOE = 8 * 48 + 8 + (1 + 3) * 3 * 20 * 48                          # layers 1 to 3: router, bias, shared and 3 experts
BLOCK_POST = 192                                                  # layers 1 and 3
MERGE_AND_NORM = 4 * 192 + 192 + 1 + 4 + 48
LAYERS = 4 * EVERY_LAYER + 2 * INDEXER + DENSE + 3 * MOE + 2 * BLOCK_POST + MERGE_AND_NORM
HEAD = 199 * 48


@pytest.fixture
def tiny(data):
    return PanguConfig.from_pretrained(data / "tiny")


def test_decode_reads_every_active_weight_and_the_head(tiny):
    assert decode_bytes(tiny) == 4 * (LAYERS + HEAD) == 585_012


def test_a_step_with_drafts_reads_the_experts_of_all_rows(tiny):
    """3 of 8 experts a row. One draft: 2 rows verify, 2 rows draft; four with three layers: 5 rows, 7 rows, one more."""
    expert = 3 * 20 * 48
    mtp = EVERY_LAYER - 2 * (24 * 192 + 192 + 3 + 24) + 3 * 48 + 2 * 48 * 48 + 8 * 48 + 8 + expert
    found = step_bytes(tiny, 1)
    assert found["verify"] / 4 == pytest.approx(LAYERS + HEAD + 3 * expert * (8 * (1 - (5 / 8) ** 2) - 3))
    assert found["draft"] / 4 == pytest.approx(HEAD + mtp + expert * 8 * (1 - (5 / 8) ** 2))
    found = step_bytes(tiny, 4)
    assert found["draft"] / 4 == pytest.approx(4 * (HEAD + mtp) + expert * (3 * 8 * (1 - (5 / 8) ** 7) + 3))
    assert step_bytes(tiny, 0) == {"verify": decode_bytes(tiny), "draft": 0}


def test_drafts_against_none():
    def pieces(tokens, *seconds):
        return [SimpleNamespace(decode_tokens=tokens, decode_seconds=s, drafted=(20, 20), accepted=(15, 5))
                for s in seconds]
    found = draft_report(pieces(40, 2.0, 1.0), pieces(40, 4.0, 2.5), 100.0, {"verify": 15.0, "draft": 5.0})
    assert found == {"accepted": [0.75, 0.25], "tokens_per_step": 2.0, "speed_up": 2.5,
                     "tokens_per_second_without": 16.0, "floor_bytes_per_step": {"verify": 15.0, "draft": 5.0},
                     "floor_tokens_per_second": 10.0}


def test_prefill_of_one_token(tiny):
    """Each layer's query sees 5 sinks and itself: 3 heads, products over 24 and 12."""
    assert prefill_flop(tiny, 1) == 2 * (LAYERS + HEAD) + 4 * (5 + 1) * 2 * 3 * (24 + 12) == 297_690


def test_prefill_past_the_window_and_index_topk(tiny):
    """Ten tokens, window 7, index_topk 8: the queries of rows 8 and 9 see 8 of 9 and of 10 rows, by an indexer of 6
    heads of 20."""
    windowed = 1 + 2 + 3 + 4 + 5 + 6 + 7 + 7 + 7 + 7
    selected = 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 8 + 8
    seen = 2 * windowed + 2 * selected + 4 * 10 * 5
    assert prefill_flop(tiny, 10) == 2 * (10 * LAYERS + HEAD) + 2 * 3 * (24 + 12) * seen + 2 * (9 + 10) * 2 * 6 * 21


def test_a_full_layer_sees_every_row(data):
    """tiny_full: 6 layers, layer 4 of them full, windows 6, 11 and 4, index_topk 8, and tiny's widths."""
    config = PanguConfig.from_pretrained(data / "tiny_full")
    added = prefill_flop(config, 13) - prefill_flop(config, 12)
    layers = config.parameter_count()["active"]["layers"]
    seen = 13 + 6 + 11 + 4 + 2 * 8 + 6 * 5
    assert added == 2 * layers + 2 * 3 * (24 + 12) * seen + 2 * 13 * 2 * 6 * 21


def test_flash_reads_its_published_active_parameters():
    assert decode_bytes(PanguConfig.flash_92b()) / 4 == pytest.approx(5.39e9, rel=1e-3)


def test_share_is_that_of_the_best_round():
    assert beside(200.0, [40.0, 50.0, 20.0]) == {
        "tokens_per_second": {"best": 50.0, "median": 40.0, "floor": 200.0}, "share": 0.25}


def test_memory_bandwidth_counts_the_matrix_once(monkeypatch):
    rows = []

    def half_a_second(call, times):
        rows.extend(value for part in call() for value in part)
        return 0.5

    monkeypatch.setattr("bench_generate.best_seconds", half_a_second)
    assert memory_bandwidth(2, (7, 10)) == 7 * 10 * 4 / 0.5
    assert rows == [10.0] * 7


@pytest.mark.parametrize("text", ["", "1,,2", "0", "8,-1", "x"])
def test_contexts_are_positive_numbers(text):
    with pytest.raises(ValueError):
        lengths(text)


GRAPH = """
# Total params: 4
%para1_model.layers.0.w: <Ref[Tensor[Float32]], (2, 2)>
subgraph @kernel_graph0(%para1_model.layers.0.w, %para2_memory, %para3_start, %para4_lm_head.weight) {
  %0(CNode_1) = Load(%para1_model.layers.0.w, UMonad[U]) cnode_attrs: {}
      # In file /somewhere/rows.py:9, 1~2/        x = gather(y) # see %3(CNode_9) = Mul(z)
  %1(CNode_2) = TupleGetItem(%para2_memory, I64(0)) cnode_attrs: {}
  %2(CNode_3) = PrimFunc_Shape(%1) primitive_attrs: {}
  %3(CNode_4) = PrimFunc_LessEqual(%2, %para3_start) primitive_attrs: {}
  %4([CNode_5]) = PrimFunc_Reshape(%0, (I64(-1), I64(192))) primitive_attrs: {}
  %10(CNode_6) = PrimFunc_Select(%3, %4) primitive_attrs: {}
  %11(CNode_7) = ScatterUpdate[reserved: Bool(1)](%1, %3) primitive_attrs: {}
  %12(CNode_8) = PrimFunc_MatMul(%10, %para4_lm_head.weight) primitive_attrs: {}
  %13(CNode_9) = PrimFunc_Cast(%12, I64(43)) primitive_attrs: {}
  %14(CNode_10) = TupleGetItem(%11, I64(0)) cnode_attrs: {}
  %15(CNode_11) = PrimFunc_Shape(%14) primitive_attrs: {}
  %16(CNode_12) = PrimFunc_FillV2(%15) primitive_attrs: {}
  Return(%13)
}
"""


def test_kernels_are_nodes_that_are_launched():
    """In the layers: what depends on weights or cache, but for the cache's shape, and not what depends on the head."""
    inside, outside = count_kernels(GRAPH)
    assert inside == Counter(Shape=2, Reshape=1, Select=1, ScatterUpdate=1, FillV2=1)
    assert outside == Counter(LessEqual=1, MatMul=1, Cast=1)


def bench(*options):
    return subprocess.run([sys.executable, ROOT / "tools" / "bench.py", "generate", *map(str, options)],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.parametrize("options, words", [
    (["--threads", "0"], "--threads is 0: wanted 1 to "),
    (["--rounds", "0"], "--rounds is 0"),
    (["--new-tokens", "1"], "--new-tokens is 1: wanted at least 2"),
    (["--prompt-tokens", "510"], "pass max_position_embeddings 512"),
    (["--num-draft-tokens", "-1"], "num_draft_tokens is -1"),
])
def test_bad_options_are_one_line(data, options, words):
    done = bench("--model", data / "tiny", "--prompt-tokens", 12, "--new-tokens", 4, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_generate_on_two_layers_of_tiny(data, tmp_path, monkeypatch):
    """A dense DSA layer and a sliding one with experts. Contexts go past tiny's 512 positions, the text not past
    index_topk, for fewer graphs."""
    picture, model = tmp_path / "contexts.png", tmp_path / "model"
    assert convert.main(["hf2ms", str(data / "tiny"), str(model), "--layers", "0-1"]) == 0
    config = PanguConfig.from_pretrained(model)
    weight_bytes = decode_bytes(config)
    done = bench("--model", model, "--prompt-tokens", 4, "--new-tokens", 4, "--rounds", 1, "--threads", 1,
                 "--num-draft-tokens", 2, "--contexts", "8,600", "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert found["decode"]["floor_bytes_per_token"] == weight_bytes < 585_012
    assert found["prefill"]["floor_flop"] == prefill_flop(config, 4)
    machine = found["machine"]
    floors = {"prefill": 4 * machine["flop_per_second"] / found["prefill"]["floor_flop"],
              "decode": machine["bytes_per_second"] / weight_bytes}
    for name, floor in floors.items():
        speed = found[name]["tokens_per_second"]
        assert speed["floor"] == pytest.approx(floor)
        assert 0 < speed["median"] <= speed["best"] < floor
        assert found[name]["share"] == pytest.approx(speed["best"] / floor)

    drafts = found["drafts"]
    assert len(drafts["accepted"]) == 2 and 1 <= drafts["tokens_per_step"] <= 3 and drafts["speed_up"] > 0
    assert drafts["floor_tokens_per_second"] == pytest.approx(
        machine["bytes_per_second"] / sum(drafts["floor_bytes_per_step"].values()) * drafts["tokens_per_step"])

    forms = {f"{step}_{form}" for step in ("prefill", "decode") for form in ("dense", "sparse")}
    assert found["compile_seconds"].keys() == forms
    assert all(seconds > 0 for seconds in found["compile_seconds"].values())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")  # the names of the plain operators are known
    plain = decode_kernels(str(model), "sparse", config)
    for kernels in (plain, *found["kernels"].values()):
        assert kernels["per_trunk_layer"] * 2 == sum(kernels["in_layers"].values()) > 0 < kernels["outside"]
    assert found["kernels"].keys() == {"dense", "sparse"}
    assert plain["per_trunk_layer"] > 10  # more than one product for each matrix of a layer
    assert plain["in_layers"]["TopK"] == 2  # a router, an indexer

    assert found["peak_memory_bytes"] > 100 * 2 ** 20
    growing, ring, tap = (32 + 20) * 4, 32 * 4, (32 + 24 + 36) * 4
    held = 256 * growing + 4 * (7 + 24) * ring + 5 * (2 + 24) * tap + 2 * 24 * 48 * 4   # with room to roll back
    assert found["cache_bytes"] == {"held": held, "formula": 7 * growing + 4 * 7 * ring + 5 * 2 * tap}
    assert [(row["context"], row["capacity"]) for row in found["contexts"]] == [(8, 256), (600, 1024)]
    assert all(0 < row["best_seconds"] <= row["median_seconds"] for row in found["contexts"])
    assert picture.read_bytes().startswith(b"\x89PNG")
