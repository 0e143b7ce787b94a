"""tools/plot_loss.py: what it reads of a log, and that each panel holds each run's values."""
import json

import pytest

import plot_loss


@pytest.fixture
def log(tmp_path):
    def write(run, values, **more):
        (tmp_path / run).mkdir(parents=True)
        path = tmp_path / run / "log.jsonl"
        path.write_text("".join(json.dumps({"step": i + 1, "loss": v, "lm": v / 2, "seconds": 1} | more) + "\n"
                                for i, v in enumerate(values)))
        return str(path)
    return write


def test_a_panel_for_each_part_and_a_line_for_each_run(log, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot
    drawn = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.update(
        {panel.get_title(): {line.get_label(): line.get_ydata().tolist() for line in panel.get_lines()}
         for panel in figure.axes if panel.get_title()}))
    timing = {"seconds/data": 1, "tflops": 1, "expert_balance/layer_0": 1}
    logs = [log("muon", [4, 2, 1]), log("adamw", [4, 3], z=7, **{"eval/lm": 3, "grad_norm/head": 2}, **timing)]
    assert plot_loss.main([*logs, "--out", str(tmp_path / "loss.png")]) == 0
    assert drawn == {"loss": {"muon": [4, 2, 1], "adamw": [4, 3]}, "z": {"adamw": [7, 7]},
                     "lm": {"muon": [2, 1, .5], "adamw": [2, 1.5], "adamw held out": [3, 3]},
                     "grad_norm by part": {"adamw head": [2, 2]}}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_belongs_together_is_in_one_panel():
    assert plot_loss.panel_of("lm") == ("lm", "") and plot_loss.panel_of("eval/lm") == ("lm", "held out")
    assert plot_loss.panel_of("grad_norm/head") == ("grad_norm by part", "head")


def test_smooth():
    assert plot_loss.smooth([4, 2, 0, 6], 1) == [4, 2, 0, 6]
    assert plot_loss.smooth([4, 2, 0, 6], 3) == [4, 3, 2, 8 / 3]


def test_runs_are_told_apart(log):
    assert plot_loss.run_names(["/a/x/log.jsonl", "/b/x/log.jsonl"]) == ["a/x", "b/x"]


def test_a_line_being_written_is_left_out(log):
    path = log("run", [1, 2])
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert plot_loss.read_log(path)["loss"] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("text, message", [("", "is empty"), ("[]\n", "log.jsonl:1: no line of a training log"),
                                           ('{"step": 1, "loss": "x"}\n', "log.jsonl:1: no line"), (None, "No such")])
def test_bad_logs_are_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    assert plot_loss.main([str(path), "--out", str(tmp_path / "loss.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_a_skipped_step_had_no_number_for_is_left_out(log):
    assert plot_loss.read_log(log("run", [4, 2], lm=None)) == {
        "step": [(1, 1), (2, 2)], "loss": [(1, 4), (2, 2)], "seconds": [(1, 1), (2, 1)]}
