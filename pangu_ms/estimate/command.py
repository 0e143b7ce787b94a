"""The estimate as a command: a table, JSON, or a sweep over layouts with a picture."""
import argparse
import json
import os
import sys

from pangu_ms import architectures
from pangu_ms.architectures.fields import Config
from pangu_ms.cache.sizes import DTYPE_BYTES
from pangu_ms.errors import ConfigError, PanguError, one_line
from pangu_ms.estimate.devices import DEVICES, GIB, Device, device
from pangu_ms.estimate.memory import memory, total
from pangu_ms.estimate.phases import LARGEST_FLEET, flops_per_token, phases, smallest_fleet, sweep
from pangu_ms.estimate.work import Case, Work, parse_parallel
from pangu_ms.yaml_file import read_yaml

EXAMPLE = """examples:
  python tools/estimate.py --config configs/openpangu_v2/predict_flash_92b.yaml --phase infer \\
      --parallel ep=8 --sequence-length 32768 --batch 8
  python tools/estimate.py --config configs/openpangu_v2/pretrain_flash_92b.yaml --parallel dp=4,tp=1,ep=16 \\
      --sequence-length 4096 --batch 64 --recompute --shard-optimizer --fused
  python tools/estimate.py --config openPangu-2.0-Flash --sequence-length 4096 --batch 64 --sweep 64 --out sweep.png

The busiest device counts, experts evenly loaded. Seconds are a roofline over vendors' peaks: a lower bound, for
comparing. Without --fused everything is as the plain operators of this package compute today.
"""


def main(argv=None):
    parser = argparse.ArgumentParser(prog="estimate", epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Memory, operations, traffic and time of a run, before it is run.")
    parser.add_argument("--config", required=True, metavar="FILE|DIR",
                        help="config.json, its directory, or a YAML file with model.model_config")
    parser.add_argument("--phase", choices=("train", "infer"), default="train", help="default: train")
    parser.add_argument("--parallel", default="", metavar="dp=..,tp=..,ep=..,pp=1", help="default: one device")
    parser.add_argument("--sequence-length", type=_positive, required=True, metavar="N",
                        help="tokens of a sequence; in inference the prompt, then the context that is decoded at")
    parser.add_argument("--batch", type=_positive, default=1, metavar="N",
                        help="sequences at once on all devices together; with gradient accumulation, of one of its "
                             "steps (default: 1)")
    parser.add_argument("--device", default="910B-64GB", metavar="NAME",
                        help=f"{', '.join(DEVICES)} (default: 910B-64GB)")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--recompute", action="store_true", help="keep a layer's input alone, compute it again")
    parser.add_argument("--shard-optimizer", action="store_true", help="data-parallel ranks share its states")
    parser.add_argument("--fused", action="store_true", help="as fused operators would compute (run on no device)")
    parser.add_argument("--sweep", type=_positive, metavar="N", help="rank the layouts of N devices instead")
    parser.add_argument("--out", metavar="PNG", help="with --sweep: draw memory against time")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.out and not arguments.sweep:
        parser.error("--out: wanted together with --sweep N")
    work = Work(arguments.phase, arguments.sequence_length, arguments.batch, arguments.dtype, arguments.recompute,
                arguments.shard_optimizer, arguments.fused)
    try:
        config, hardware = read_config(arguments.config), device(arguments.device)
        case = Case(config, parse_parallel(arguments.parallel, work.phase == "train"), work)
        if arguments.sweep:
            found = sweep(case, hardware, arguments.sweep)
            if arguments.out:
                draw(found, hardware, arguments.out)
            print(json.dumps(found) if arguments.json else sweep_text(found, hardware))
        else:
            case.check()
            found = estimate(case, hardware)
            print(json.dumps(found) if arguments.json else estimate_text(found))
    except PanguError as error:
        print(f"estimate: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted at least 1")
    return value


def read_config(path: str) -> Config:
    """A directory with config.json, a config.json, or a YAML file with model.model_config."""
    if path.endswith((".yaml", ".yml")):
        model = read_yaml(path).get("model")
        fields = model.get("model_config") if isinstance(model, dict) else None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: has no model.model_config; wanted the fields of config.json there")
        try:
            return architectures.config_from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if os.path.basename(path) == architectures.CONFIG_FILE:
        path = os.path.dirname(path) or "."
    return architectures.read_config(path)


def estimate(case: Case, hardware: Device) -> dict:
    """All there is to report: bytes, operations and seconds, of the busiest rank unless the name says otherwise."""
    parts, ranks = memory(case), case.ranks
    return {
        "parameters": sum(p.count for p in case.tensors.values()), "work": vars(case.work),
        "parallel": {"data": ranks.data, "tensor": ranks.tensor, "expert": ranks.expert}, "layout": str(ranks),
        "devices": ranks.count, "device": vars(hardware), "memory": parts, "memory_total": total(parts),
        "memory_usable": hardware.usable, "fits": total(parts) <= hardware.usable,
        "flops_per_token_of_the_model": flops_per_token(case),
        "phases": [vars(phase) for phase in phases(case, hardware)], "smallest_fleet": smallest_fleet(case, hardware),
    }


def estimate_text(found: dict) -> str:
    work, fleet = found["work"], found["smallest_fleet"]
    lines = [f"{found['parameters'] / 1e9:.3f} B parameters, MTP layers included, {work['phase']}, {work['batch']} x "
             f"{work['length']} tokens, {work['dtype']}, {'fused' if work['fused'] else 'plain'} operators",
             f"{found['devices']} x {found['device']['name']}: {found['layout']}", "", "memory of one device, GiB"]
    for component, parts in found["memory"].items():
        lines.append(f"  {component:<24}{sum(parts.values()) / GIB:9.2f}")
        lines += [f"    {name:<24}{value / GIB:9.2f}" for name, value in parts.items()
                  if len(parts) > 1 and value >= 0.005 * GIB]
    lines.append(f"  {'total':<24}{found['memory_total'] / GIB:9.2f}   of {found['memory_usable'] / GIB:.1f} usable: "
                 + ("fits" if found["fits"] else "DOES NOT FIT"))
    lines.append(f"  smallest fleet that holds this work: {fleet['devices']} ({fleet['parallel']})" if fleet else
                 f"  no fleet of up to {LARGEST_FLEET} devices (a power of two) holds this work")
    for name, parts in found["flops_per_token_of_the_model"].items():
        drafting = 0 if name == "step" else parts.pop("mtp", 0)
        lines += ["", f"{name}: operations a token, whole model, GFLOP"]
        lines += [f"  {key:<24}{value / 1e9:9.3f}" for key, value in parts.items() if value]
        lines.append(f"  {'total':<24}{sum(parts.values()) / 1e9:9.3f}")
        lines += [f"  mtp, only when drafting {drafting / 1e9:9.3f}"] if drafting else []
    for phase in found["phases"]:
        lines += ["", f"{phase['name']}: one device, roofline"]
        lines += [f"  moves {name:<18}{value / 1e9:11.3f} GB" for name, value in phase["bytes"].items()]
        lines += [f"  sends in {name + ' group':<15}{value / 1e9:11.3f} GB" for name, value in phase["sent"].items()]
        seconds = ", ".join(f"{name} {value:.4g}" for name, value in phase["seconds"].items() if value)
        speed = f", {phase['tokens'] / phase['time']:.4g} tokens/s of the fleet" if phase["tokens"] else ""
        lines += [f"  seconds: {seconds}", f"  {phase['time']:.4g} s{speed}; bound by {phase['bound']}"]
    return "\n".join([*lines, "", f"peaks by the vendor, not measured: {found['device']['source']}"])


def sweep_text(found: list[dict], hardware: Device) -> str:
    lines = [f"{'layout':<20}{'GiB':>9}{'seconds':>11}   {hardware.usable / GIB:.1f} GiB usable of {hardware.name}"]
    lines += [f"{row['parallel']:<20}{row['bytes'] / GIB:9.1f}{row['seconds']:11.4g}"
              f"{'' if row['fits'] else '   does not fit'}" for row in found]
    return "\n".join(lines)


def draw(found: list[dict], hardware: Device, path: str) -> None:
    """Memory against time, a point for each layout, a line for what a device holds."""
    try:
        import matplotlib
    except ImportError:
        raise PanguError("matplotlib is not installed; pip install pangu_ms[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in found:
        place = row["seconds"], row["bytes"] / GIB
        panel.plot(*place, "o", color="tab:green" if row["fits"] else "tab:red")
        panel.annotate(row["parallel"], place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    panel.axhline(hardware.usable / GIB, color="black", linewidth=1, linestyle="--")
    panel.set(xscale="log", yscale="log", xlabel="roofline seconds of a step",
              ylabel="GiB of one device; dashed: what it holds", title=f"{found[0]['devices']} x {hardware.name}")
    panel.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PanguError(f"{path}: {error}") from None
    pyplot.close(figure)
