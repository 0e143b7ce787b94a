"""tools/bench.py: its formulas by hand, its count of kernels, what it refuses, and one run of each on tiny sizes."""
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import pytest
import yaml

import bench
import bench_convert
import bench_generate
import bench_kernels
import bench_machine
import bench_train
import make_model
from bench_floors import decode_bytes, prefill_flop, step_bytes
from bench_generate import beside, draft_report, lengths
from bench_kernels import count_kernels
from bench_machine import memory_bandwidth
from pangu_ms.architectures import read_config
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.ops.cpu import library
from pangu_ms.yaml_file import read_yaml

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
    """3 of 8 experts a row. One draft: 2 rows verify, 2 rows draft; four with three layers: 5 rows, 7 rows, and 1."""
    expert = 3 * 20 * 48
    mtp = EVERY_LAYER - 2 * (24 * 192 + 192 + 3 + 24) + 3 * 48 + 2 * 48 * 48 + 8 * 48 + 8 + expert
    found = step_bytes(tiny, 1)
    assert found["verify"] / 4 == pytest.approx(LAYERS + HEAD + 3 * expert * (8 * (1 - (5 / 8) ** 2) - 3))
    assert found["draft"] / 4 == pytest.approx(HEAD + mtp + expert * 8 * (1 - (5 / 8) ** 2))
    found = step_bytes(tiny, 4)
    assert found["draft"] / 4 == pytest.approx(4 * (HEAD + mtp) + expert * (3 * 8 * (1 - (5 / 8) ** 7) + 3))
    assert step_bytes(tiny, 0) == {"verify": decode_bytes(tiny), "draft": 0}


def test_drafts_against_none():
    def responses(tokens, *seconds):
        return [SimpleNamespace(decode_tokens=tokens, decode_seconds=s, drafted=(20, 20), accepted=(15, 5))
                for s in seconds]
    found = draft_report(responses(40, 2.0, 1.0), responses(40, 4.0, 2.5), 100.0, {"verify": 15.0, "draft": 5.0})
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


def test_grouped_queries_meet_each_key_once_for_each_head(data):
    """embedded_tied: 4 layers of 6 query heads of 6; the head is the embedding."""
    config = read_config(data / "embedded_tied")
    layers, head = config.parameter_count()["active"]["layers"], 205 * 36
    assert decode_bytes(config) == 4 * (layers + head)
    assert prefill_flop(config, 3) == 2 * (3 * layers + head) + 4 * (1 + 2 + 3) * 2 * 6 * (6 + 6)


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

    monkeypatch.setattr(bench_machine, "best_seconds", half_a_second)
    assert memory_bandwidth(2, (7, 10)) == 7 * 10 * 4 / 0.5
    assert rows == [10.0] * 7


@pytest.mark.parametrize("text", ["", "1,,2", "0", "8,-1", "x"])
def test_contexts_are_positive_numbers(text):
    with pytest.raises(ValueError):
        lengths(text)


GRAPH = """
# Total params: 4
%para1_model.layers.0.w: <Ref[Tensor[Float32]], (2, 2)>
subgraph @kernel_graph0(%para1_model.layers.0.w, %para2_tensors, %para3_start, %para4_lm_head.weight) {
  %0(CNode_1) = Load(%para1_model.layers.0.w, UMonad[U]) cnode_attrs: {}
      # In file /somewhere/rows.py:9, 1~2/        x = gather(y) # see %3(CNode_9) = Mul(z)
  %1(CNode_2) = TupleGetItem(%para2_tensors, I64(0)) cnode_attrs: {}
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


@pytest.mark.skipif(not library.available(ms.float32), reason="the compiled operators are not built here")
@pytest.mark.parametrize("name, kernels", [("embedded_tied", 7.25), ("pro_moe_v2", 8.25)])
def test_a_layer_of_grouped_queries_launches_few_kernels(data, name, kernels):
    """Norm, rows, attention, output, sum and next norm, feed-forward, sum; the embedding's is one more, and a norm of
    sinks."""
    found = bench_kernels.decode_kernels(str(data / name), ("dense",), 4)["dense"]
    assert found["per_trunk_layer"] == kernels
    assert found["in_layers"].keys() <= {"Custom", "Add", "Gather"}


def refused(capsys, tool, *options):
    """The one line that it says."""
    assert bench.main([tool, *map(str, options)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("options, words", [
    (["--threads", "0"], "--threads is 0: wanted 1 to "),
    (["--rounds", "0"], "--rounds is 0"),
    (["--new-tokens", "1"], "--new-tokens is 1: wanted at least 2"),
    (["--prompt-tokens", "510"], "pass max_position_embeddings 512"),
    (["--num-draft-tokens", "-1"], "num_draft_tokens is -1"),
])
def test_bad_options_are_one_line(data, capsys, options, words):
    assert words in refused(capsys, "generate", "--model", data / "tiny", "--prompt-tokens", 12, "--new-tokens", 4,
                            *options)


@pytest.mark.slow
def test_generate_on_two_layers(tmp_path, monkeypatch, capsys):
    """A dense DSA layer and a sliding one with experts. Contexts go past the model's 512 positions, the text not past
    the indexer's topk, and kernels are counted of one form, for fewer graphs: of the formulas, whose names are known.
    """
    picture, model = tmp_path / "contexts.png", tmp_path / "model"
    assert make_model.main([str(model), *(f"--set={change}" for change in (
        "num_hidden_layers=2", "num_nextn_predict_layers=1", "dsa_layers=[0]", "swa_layers=[1,2]",
        "sliding_window_list=null", "block_post_layernorm_idx=[1]"))]) == 0
    monkeypatch.setattr(bench_generate, "use_cores", lambda count: None)        # the other tests need theirs
    monkeypatch.setattr(bench_generate, "product_rate", lambda: bench_machine.product_rate(256))
    monkeypatch.setattr(bench_generate, "memory_bandwidth", lambda threads: memory_bandwidth(threads, (4096, 2048)))
    monkeypatch.setitem(bench_kernels.ENVIRONMENT, "PANGU_MS_COMPILED_OPS", "0")
    monkeypatch.setattr(bench_generate, "decode_kernels",
                        lambda model, forms, layers: bench_kernels.decode_kernels(model, forms[1:], layers))
    capsys.readouterr()
    assert bench.main(["generate", "--model", str(model), "--prompt-tokens", "4", "--new-tokens", "4", "--rounds", "1",
                       "--num-draft-tokens", "2", "--contexts", "8,600", "--json", "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    config = PanguConfig.from_pretrained(model)

    machine = found["machine"]
    floors = {"prefill": 4 * machine["flop_per_second"] / prefill_flop(config, 4),
              "decode": machine["bytes_per_second"] / decode_bytes(config)}
    for name, floor in floors.items():
        speed = found[name]["tokens_per_second"]
        assert speed["floor"] == pytest.approx(floor)
        assert 0 < speed["median"] <= speed["best"] < floor
        assert found[name]["share"] == pytest.approx(speed["best"] / floor)

    drafts = found["drafts"]
    assert len(drafts["accepted"]) == 2 and 1 <= drafts["tokens_per_step"] <= 3 and drafts["speed_up"] > 0

    assert found["compile_seconds"].keys() == {f"{step}_{form}" for step in ("prefill", "decode")
                                               for form in ("dense", "sparse")}
    assert all(seconds > 0 for seconds in found["compile_seconds"].values())
    kernels = found["kernels"]["sparse"]
    assert kernels["per_trunk_layer"] * 2 == sum(kernels["in_layers"].values()) and kernels["outside"] > 0
    assert kernels["per_trunk_layer"] > 10                                      # a product for each matrix, and more
    assert kernels["in_layers"]["TopK"] == 2                                    # a router, an indexer

    assert found["peak_memory_bytes"] > 100 * 2 ** 20
    growing, ring, tap = (32 + 20) * 4, 32 * 4, (32 + 24 + 36) * 4
    held = 256 * growing + 2 * (7 + 24) * ring + 3 * (2 + 24) * tap + 2 * 24 * 48 * 4   # with room to roll back
    assert found["cache_bytes"] == {"held": held, "formula": 7 * growing + 2 * 7 * ring + 3 * 2 * tap}
    assert [(row["context"], row["capacity"]) for row in found["contexts"]] == [(8, 256), (600, 1024)]
    assert all(0 < row["best_seconds"] <= row["median_seconds"] for row in found["contexts"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a trunk layer" in bench_generate.report(found)


# ---------------------------------------------------------------- train

@pytest.fixture
def run_file(small, tmp_path):
    """run_file(**sections): the path of a file like the toy's, with one DSA layer with experts and one MTP depth."""
    fields = read_yaml(str(ROOT / "configs" / "openpangu_v2" / "pretrain_toy_cpu.yaml"))
    fields["model"]["model_config"] = json.loads(json.dumps(small(
        num_hidden_layers=1, first_k_dense_replace=0, swa_layers=[1], sliding_window_list=[7],
        block_post_layernorm_idx=[0]).to_dict()))  # lists for tuples, as YAML has them
    fields["train_dataset"]["data_loader"]["seq_length"] = 24
    fields["runner_config"]["batch_size"] = 2

    def write(**sections):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields | sections))
        return tmp_path / "run.yaml"
    return write


def test_parts_are_differences():
    parts = bench_train.by_part({"forward": 2.0, "gradients": 5.0, "step": 6.5})
    assert parts == {"forward": 2.0, "backward": 3.0, "optimizer": 1.5, "step": 6.5}


@pytest.mark.parametrize("sections, options, words", [
    ({}, ("--steps", "0"), "--steps is 0: wanted at least 1"),
    ({"optimizer": {"type": "AdamW"}}, (), "optimizer.type is AdamW, wanted PanguMuon"),
    ({"optimizer": {"type": "PanguMuon", "weight_decy": 1}}, (), "optimizer.weight_decy: no such key; did you mean"),
    ({"runner_config": {}}, (), "run.yaml: lacks runner_config.batch_size"),
    ({"pangu_training": {"mtp_weight": 1}}, (), "pangu_training.mtp_weight: no such key"),
])
def test_a_wrong_file_is_one_line(run_file, capsys, sections, options, words):
    assert words in refused(capsys, "train", "--config", run_file(**sections), *options)


@pytest.mark.slow
def test_train_on_a_small_model(run_file, capsys):
    path = run_file()
    assert bench.main(["train", "--config", str(path), "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch_size"], found["sequence_length"], found["steps"]) == (2, 24, 3)
    assert found["parameters"] == PanguConfig.from_dict(
        read_yaml(str(path))["model"]["model_config"]).parameter_count()["trunk_and_mtp"]
    assert all(seconds > 0.1 for seconds in found["compile_seconds"].values()) and len(found["compile_seconds"]) == 3
    seconds = found["seconds"]
    assert 0 < seconds["forward"] < seconds["step"]
    assert found["tokens_per_second"]["best"] == pytest.approx(2 * 24 / seconds["step"])
    assert found["tokens_per_second"]["best"] >= found["tokens_per_second"]["median"]
    assert found["experts"]["moe_layers"] == 2 and 0 < found["experts"]["share"] < 1
    assert found["peak_memory_bytes"] > 100 * 2 ** 20
    assert "2 times 24 tokens, 3 steps" in bench_train.report(found)


# ---------------------------------------------------------------- convert

@pytest.mark.slow
def test_convert_there_and_back(tmp_path, monkeypatch, capsys):
    tiny = make_model.make_config("tiny", ["dtype=bfloat16"])
    monkeypatch.setattr(bench_convert, "narrow_config", lambda layers: tiny)
    assert bench.main(["convert", "--gigabytes", "1e-4", "--rounds", "1", "--directory", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(took > 0 for step in found["seconds"].values() for (took,) in step.values())
    assert "hf2ms" in bench_convert.report(found) and not any(tmp_path.iterdir())


def test_convert_without_a_disk_is_one_line(tmp_path, capsys):
    assert "nowhere" in refused(capsys, "convert", "--directory", tmp_path / "nowhere")
