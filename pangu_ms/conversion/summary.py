"""What a conversion reads, writes and leaves out, in words and numbers."""

from pangu_ms.architectures.tensors import count_parameters, mtp_copies, parameters
from pangu_ms.checkpoint.dtypes import NAMES
from pangu_ms.checkpoint.source import Source
from pangu_ms.conversion.plan import Plan


def describe(source: Source, plans: list[Plan]) -> str:
    """Lines that count every tensor read, as used, repeated or left out, and every tensor written."""
    plan = plans[0]
    used = {tensor.parameter.name for tensor in plan.tensors}
    scales = sum(stored.scale is not None for held in source.held.values() for _, stored in held)
    left_out = {name: p for name, p in parameters(source.config).items() if name not in used}
    unused = sum(len(source.held[name, m]) for name, p in left_out.items() for m in range(p.members))
    read = len(source.tensors)
    parts = [f"{read - scales - unused - len(source.repeats) - len(source.computed)} used"]
    if scales:
        parts.append(f"{scales} scales multiplied in")
    if source.repeats:
        parts.append(f"{len(source.repeats)} repeat another and are compared with it")
    if source.computed:
        parts.append(f"{len(source.computed)} follow from config.json and are left out")
    if unused:
        parts.append(f"{unused} left out")
    lines = [f"read: {read} tensors ({source.layout} layout): {', '.join(parts)}"]
    lines += [f"  left out: {group}" for group in _groups(left_out)]
    if len(plan.config.plan.mtp_layers) != len(source.config.plan.mtp_layers):
        lines.append(f"  {plan.config.MTP_FIELD} is now {len(plan.config.plan.mtp_layers)} in config.json")
    if source.adapter:
        lines.append(f"merge: {len(source.adapter.pairs)} matrices with pairs of rank {source.adapter.rank} of "
                     f"{source.adapter.directory}")
    for p in plans:
        place = f" for rank {p.ranks.rank} of {p.ranks.count}" if p.ranks.count > 1 else ""
        formats = ", ".join(sorted({NAMES[tensor.dtype] for tensor in p.tensors}))
        lines.append(f"write{place}: {len(p.tensors)} tensors ({formats}), {p.nbytes:,} bytes")
        lines += [f"  {shard.name}: {len(shard.tensors)} tensors, {shard.nbytes:,} bytes" for shard in p.shards]
    return "\n".join(lines + _components(plans))


def _components(plans: list[Plan]) -> list[str]:
    """Lines with the parameters written by component; none for ranks, which share or repeat them."""
    if plans[0].ranks.count > 1:
        return []
    config = plans[0].config
    written = dict.fromkeys((*count_parameters(config)["components"], "mtp", "copies"), 0)
    copies = mtp_copies(config)
    for tensor in plans[0].tensors:
        p = tensor.parameter
        key = "copies" if tensor.name in copies else "mtp" if p.layer and p.layer.mtp_depth else p.component
        written[key] += tensor.rows * tensor.columns
    written["total"] = sum(written.values())
    return ["parameters, as config.json wants them:",
            *(f"  {key:<14}{count:>18,}" for key, count in written.items() if count)]


def _groups(left_out: dict) -> list[str]:
    """Lines that count the parameters left out, by runs of layers."""
    layers = sorted({(p.layer.mtp_depth > 0, p.layer.index) for p in left_out.values() if p.layer})
    runs: list[list] = []
    for mtp, index in layers:
        if runs and runs[-1][0] == mtp and runs[-1][2] == index - 1:
            runs[-1][2] = index
        else:
            runs.append([mtp, index, index])
    return [f"{'MTP' if mtp else 'trunk'} layers {first} to {last}: "
            f"{sum(p.layer is not None and first <= p.layer.index <= last for p in left_out.values())} parameters"
            for mtp, first, last in runs]
