"""Draw the losses of training runs from their log.jsonl files: one panel for each quantity, one line for each run.

The held-out loss is in the panel of the training loss; gradient norms by part are in one panel.
"""
import argparse
import json
import os
import sys

from pangu_ms.errors import PanguError

EXAMPLE = """examples:
  python tools/plot_loss.py output/pretrain/log.jsonl --out loss.png
  python tools/plot_loss.py runs/muon/log.jsonl runs/adamw/log.jsonl --out compare.png --smooth 20

A run is called after the directory of its log. Needs matplotlib: pip install pangu_ms[plot]
"""
NOT_DRAWN = ("step", "seconds", "tokens_per_second", "tflops", "mfu", "expert_balance/")  # what names begin with
HELD_OUT = "eval/"
COLUMNS = 3


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of a run")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="mean of the last N steps (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.smooth < 1:
        parser.error("--smooth: wanted at least 1")
    try:
        runs = dict(zip(run_names(arguments.logs), map(read_log, arguments.logs)))
        draw(runs, arguments.out, arguments.smooth)
    except PanguError as error:
        print(f"plot_loss: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_loss: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def run_names(paths):
    """The directory of each log, with as many directories above it as it takes to tell the runs apart."""
    parts = [os.path.abspath(path).split(os.sep)[1:-1] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise PanguError(f"{paths[0]}: two of the logs lie in one directory; give each run once")


def read_log(path):
    """{name: [(step, value), ...]} of a log.jsonl."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break  # a run is writing it
            try:
                record = json.loads(line)
                for name, value in record.items():
                    if value is not None:  # as in a step that was skipped
                        found.setdefault(name, []).append((record["step"], float(value)))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise PanguError(f"{path}:{number}: no line of a training log; give the log.jsonl of a run") from None
    if not found:
        raise PanguError(f"{path}: is empty; wait for the first step")
    return found


def smooth(values, count):
    """The mean of each value and the up to `count` - 1 before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - count] if i >= count else 0.0)
        means.append(total / min(i + 1, count))
    return means


def panel_of(name):
    """The title of the panel that a quantity is drawn in, and what its lines are called besides the run."""
    if name.startswith(HELD_OUT):
        return name.removeprefix(HELD_OUT), "held out"
    group, slash, part = name.partition("/")
    return (f"{group} by part", part) if slash else (name, "")


def draw(runs, path, count):
    try:
        import matplotlib
    except ImportError:
        raise PanguError("matplotlib is not installed; pip install pangu_ms[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict.fromkeys(name for log in runs.values() for name in log if not name.startswith(NOT_DRAWN))
    titles = list(dict.fromkeys(panel_of(name)[0] for name in names))
    rows = -(-len(titles) // COLUMNS)
    figure, panels = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3.2 * rows), squeeze=False,
                                     layout="constrained")
    places = dict(zip(titles, panels.flat))
    for name in names:
        title, part = panel_of(name)
        panel = places[title]
        for run, log in runs.items():
            if name in log:
                steps, values = zip(*log[name])
                held_out = name.startswith(HELD_OUT)
                panel.plot(steps, values if held_out else smooth(values, count), linewidth=1,
                           label=" ".join((run, part)).strip(), marker="o" * held_out, markersize=3)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(titles):]:
        panel.axis("off")
    for panel in panels.flat[:len(titles)]:
        if panel is panels.flat[0] and len(runs) > 1 or len(panel.get_lines()) > len(runs):
            panel.legend(fontsize="x-small")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise PanguError(f"{path}: {error}") from None
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
