"""The command: its answers, what it refuses, the sweep and its picture; and what is sent, by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.estimate import command
from pangu_ms.estimate.devices import DEVICES
from pangu_ms.estimate.phases import phases, smallest_fleet, sweep
from pangu_ms.estimate.traffic import sent_bytes, update_sent_bytes
from pangu_ms.estimate.work import Case, Work, calls_of
from pangu_ms.parallel.ranks import Ranks

DEVICE, FLASH, ROOT = DEVICES["910B-64GB"], PanguConfig.flash_92b(), Path(__file__).parents[2]


def trained(ranks, *work, **options):
    return Case(FLASH, Ranks(*ranks, batch_sharded=True), Work("train", *work, **options))


@pytest.fixture
def run(data, capsys):
    def call(*arguments):
        code = command.main(["--config", str(data / "tiny"), "--sequence-length", "64", "--batch", "8", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err
    return call


@pytest.mark.parametrize("phase", ["train", "infer"])
def test_json_and_text_agree(run, phase):
    code, out, _ = run("--json", "--phase", phase, "--parallel", "dp=2,ep=4")
    found = json.loads(out)
    assert code == 0 and found["devices"] == 8 and found["fits"] and found["smallest_fleet"]["devices"] == 1
    assert found["memory_total"] == sum(sum(parts.values()) for parts in found["memory"].values())
    code, out, _ = run("--phase", phase, "--parallel", "dp=2,ep=4")
    assert code == 0 and "fits" in out and "DOES NOT" not in out and found["phases"][0]["name"] in out


@pytest.mark.parametrize("arguments,said", [
    (["--parallel", "tp=2"], "tensor parallel 2 does not divide 199 rows (model.embed_tokens.weight), 3 heads"),
    (["--parallel", "ep=3"], "8 experts (mlp.experts.gate_proj.weight): take one of 1, 2, 4, 8"),
    (["--parallel", "pp=2"], "wanted pp=1"),
    (["--parallel", "cp=2"], "found 'cp=2', wanted dp, tp, ep or pp and a number"),
    (["--parallel", "dp=3"], "--batch 8 does not divide among dp * ep = 3 sets of sequences; the next that does: 9"),
    (["--device", "H100"], "not in the table; wanted 910B-64GB or"),
    (["--sequence-length", "1000"], "positions end at max_position_embeddings = 512"),
    (["--sweep", "7"], "no layout fits"),
    (["--config", "nowhere"], "nowhere: no such directory"),
])
def test_refusals_are_one_line(run, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_sweep_ranks_and_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run("--sweep", "8", "--json", "--out", str(tmp_path / "sweep.png"))
    rows = json.loads(out)
    assert code == 0 and [row["devices"] for row in rows] == [8] * 4
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_smallest_fleet_fits_and_half_of_it_does_not():
    case = Case(FLASH, Ranks(), Work("infer", 4096, 1, fused=True))
    fleet = smallest_fleet(case, DEVICE)
    assert fleet["fits"] and not any(row["fits"] for row in sweep(case, DEVICE, fleet["devices"] // 2))


def test_collectives_by_hand():
    """Flash, 64 tokens for each of 4 sequences, bfloat16: 49 layers, 47 of them with experts, 4 heads."""
    tensor, expert, data = (trained(sizes, 64, 4) for sizes in ((4, 1, 1), (1, 4, 1), (1, 1, 4)))
    calls, hidden = calls_of(tensor)["step"], 2560 * 2
    forward, backward = 256 * hidden * 99, 256 * (49 * ((1024 + 576) * 2 + hidden) + 4 * hidden)
    assert sent_bytes(tensor, calls) == {
        "tensor": 2 * 3 / 4 * (forward + backward + 4 * 256 * 8), "expert": 0, "data": 0}
    sent = sent_bytes(expert, calls)
    assert sent["tensor"] == 0 and sent["expert"] == 3 / 4 * 47 * 2 * 256 * (2 * hidden + 8 * 8)
    experts = 47 * 256 * 3 * 1024 * 2560 * 2                                    # which these ranks hold apart
    assert sent_bytes(data, calls)["data"] - sent["data"] == pytest.approx(2 * 3 / 4 * experts)


def test_collectives_of_the_update_by_hand():
    """Layer 2's experts, 4 of them on each rank: 3 x 1024 x 2560 values each, one of two ranks with gate or up; and
    its q_a projection, which tensor ranks hold whole."""
    def only(case):
        for each in (case.tensors, case.shapes):
            for name in [*each]:
                if not any(part in name for part in ("layers.2.mlp.experts", "layers.2.self_attn.q_a_proj")):
                    del each[name]
        return case

    expert = 4 * 1024 * 2560
    assert update_sent_bytes(only(trained((4, 64, 1), 64, 64))) == {
        "tensor": 2 * 3 / 4 * 3 * expert / 4 * 4, "data": 0}
    assert update_sent_bytes(only(trained((1, 64, 2), 64, 128, shard_optimizer=True))) == {
        "tensor": 0, "data": 2 * (3 * expert / 2 + 1024 * 2560 * 127 / 128)}


def test_a_group_that_leaves_the_server_takes_the_network():
    near, far = (phases(trained((1, expert), 64, 16), DEVICE)[0] for expert in (8, 16))
    assert near.seconds["expert"] == pytest.approx(near.sent["expert"] / 196e9)
    assert far.seconds["expert"] == pytest.approx(far.sent["expert"] / 25e9)


def test_the_tool_needs_no_mindspore_and_minds_no_closed_pipe(data, tmp_path):
    """As `| head` leaves one."""
    (tmp_path / "mindspore.py").write_text("raise SystemExit('MindSpore was imported')")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        done = subprocess.run([sys.executable, ROOT / "tools" / "estimate.py", "--config", data / "tiny",
                               "--sequence-length", "64"], stdout=pipe, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.stderr == ""
