"""What a conversion reads, writes and leaves out, in words and numbers."""

from pangu_ms.checkpoint.dtypes import NAMES
from pangu_ms.checkpoint.names import count_parameters, parameters
from pangu_ms.checkpoint.plan import Plan
from pangu_ms.checkpoint.source import Source


def describe(source: Source, plans: list[Plan]) -> str:
    """Every tensor that is read is counted here as used, repeated or left out; every one that is written as well."""
    plan = plans[0]
    used = {output.source for output in plan.outputs}
    scales = sum(h.scale is not None for held in source.held.values() for h in held)
    left_out = {name: p for name, p in parameters(source.config).items() if name not in used}
    unused = sum(len(source.held[name, m]) for name, p in left_out.items() for m in range(p.members))
    read = len(source.entries)
    parts = [f"{read - scales - unused - len(source.repeats)} used"]
    if scales:
        parts.append(f"{scales} scales multiplied in")
    if source.repeats:
        parts.append(f"{len(source.repeats)} repeat another and are compared with it")
    if unused:
        parts.append(f"{unused} left out")
    lines = [f"read: {read} tensors ({source.layout} layout): {', '.join(parts)}"]
    lines += [f"  left out: {group}" for group in _groups(left_out)]
    if plan.config.num_nextn_predict_layers != source.config.num_nextn_predict_layers:
        lines.append("  num_nextn_predict_layers is now 0 in config.json")
    for p in plans:
        place = f" for rank {p.rank} of {p.grid.ranks}" if p.grid.ranks > 1 else ""
        formats = ", ".join(sorted({NAMES[output.dtype] for output in p.outputs}))
        lines.append(f"write{place}: {len(p.outputs)} tensors ({formats}), {p.nbytes:,} bytes")
        lines += [f"  {shard.name}: {len(shard.outputs)} tensors, {shard.nbytes:,} bytes" for shard in p.shards]
    return "\n".join(lines + _components(plans))


def _components(plans: list[Plan]) -> list[str]:
    """Parameters written by component beside what the config wants; ranks share or repeat them, so not for slices."""
    if plans[0].grid.ranks > 1:
        return []
    written: dict[str, int] = {}
    seen = set()
    for output in plans[0].outputs:
        p = output.stored.parameter
        repeats = output.stored.name not in p.sources and output.stored.name != p.name
        key = "copies" if repeats else "mtp" if p.plan and p.plan.mtp_depth else p.component
        written[key] = written.get(key, 0) + output.stored.rows * output.stored.columns
        seen.add(p.name)
    counts = count_parameters(plans[0].config)
    wanted = counts["components"] | {"mtp": counts["mtp"]}
    if "copies" in written:
        wanted["copies"] = counts["with_copies"] - counts["trunk_and_mtp"]
    wanted = {key: count for key, count in wanted.items() if count}
    assert written == wanted, f"the plan writes {written}, the config wants {wanted}"
    lines = ["parameters, as config.json wants them:"]
    return lines + [f"  {key:<14}{count:>18,}" for key, count in (wanted | {"total": sum(wanted.values())}).items()]


def _groups(left_out: dict) -> list[str]:
    """The parameters that are not written, by runs of layers."""
    layers = sorted({(p.plan.mtp_depth > 0, p.plan.index) for p in left_out.values() if p.plan})
    runs: list[list] = []
    for mtp, index in layers:
        if runs and runs[-1][0] == mtp and runs[-1][2] == index - 1:
            runs[-1][2] = index
        else:
            runs.append([mtp, index, index])
    return [f"{'MTP' if mtp else 'trunk'} layers {first} to {last}: "
            f"{sum(p.plan is not None and first <= p.plan.index <= last for p in left_out.values())} parameters"
            for mtp, first, last in runs]
