"""The command: its answers, what it refuses, the sweep and its picture."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu_ms.config import PanguConfig
from pangu_ms.estimate import command
from pangu_ms.estimate.devices import DEVICES
from pangu_ms.estimate.phases import judge, phases, smallest_fleet, sweep
from pangu_ms.estimate.traffic import collective_bytes, update_collective_bytes
from pangu_ms.estimate.work import Parallel, Work, held, train_calls

DEVICE = DEVICES["910B-64GB"]


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
    (["--parallel", "tp=2"], "tp=2 does not divide heads, MLP rows and vocabulary; these do: 1"),
    (["--parallel", "ep=3"], "ep=3 does not divide n_routed_experts; these do: 1, 2, 4, 8"),
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
    config, work = PanguConfig.flash_92b(), Work("infer", 4096, 1, fused=True)
    fleet = smallest_fleet(config, work, DEVICE)
    assert fleet.fits and judge(config, fleet.parallel, work, DEVICE).fits
    assert not any(layout.fits for layout in sweep(config, work, DEVICE, fleet.parallel.devices // 2))


def test_collectives_by_hand():
    """Flash, 64 tokens for each of 4 sequences, bfloat16: 49 layers, 47 of them with experts, 4 heads."""
    config, work = PanguConfig.flash_92b(), Work("train", 64, 4)
    calls, hidden = train_calls(work), 2560 * 2
    sent = collective_bytes(config, Parallel(1, 4, 1), work, calls)
    forward, backward = 256 * hidden * 99, 256 * (49 * ((1024 + 576) * 2 + hidden) + 4 * hidden)
    assert sent == {"tensor": 2 * 3 / 4 * (forward + backward + 4 * 256 * 8), "expert": 0, "data": 0}
    sent = collective_bytes(config, Parallel(1, 1, 4), work, calls)
    assert sent["tensor"] == 0 and sent["expert"] == 3 / 4 * 47 * 2 * 256 * (2 * hidden + 8 * 8)
    assert collective_bytes(config, Parallel(4, 1, 1), work, calls)["data"] > 50 * sent["data"] * 3 / 4 / 3


def test_collectives_of_the_update_by_hand(monkeypatch):
    """Layer 2's experts, 4 of them on each rank: 3 x 1024 x 2560 values each, one of two ranks with gate or up; and
    its q_a projection, which tensor ranks hold whole."""
    config, some = PanguConfig.flash_92b(), ("layers.2.mlp.experts", "layers.2.self_attn.q_a_proj")
    for module in ("flops", "memory", "traffic"):
        monkeypatch.setattr(f"pangu_ms.estimate.{module}.held",
                            lambda config: [p for p in held(config) if any(name in p.name for name in some)])
    expert = 4 * 1024 * 2560
    sent = update_collective_bytes(config, Parallel(1, 4, 64), Work("train", 64, 64))
    assert sent == {"tensor": 2 * 3 / 4 * 3 * expert / 4 * 4, "data": 0}
    sent = update_collective_bytes(config, Parallel(2, 1, 64), Work("train", 64, 128, shard_optimizer=True))
    assert sent == {"tensor": 0, "data": 2 * (3 * expert / 2 + 1024 * 2560 * 127 / 128)}


def test_a_group_that_leaves_the_server_takes_the_network():
    config, work = PanguConfig.flash_92b(), Work("train", 64, 16)
    near, far = (phases(config, Parallel(1, 1, expert), work, DEVICE)[0] for expert in (8, 16))
    assert near.seconds["expert"] == pytest.approx(near.sent["expert"] / 196e9)
    assert far.seconds["expert"] == pytest.approx(far.sent["expert"] / 25e9)


def test_a_closed_pipe_is_no_error(data):
    """As `| head` leaves one."""
    root = Path(__file__).parents[2]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        done = subprocess.run([sys.executable, root / "tools" / "estimate.py", "--config", data / "tiny",
                               "--sequence-length", "64"], env=os.environ | {"PYTHONPATH": str(root)}, stdout=pipe,
                              stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
