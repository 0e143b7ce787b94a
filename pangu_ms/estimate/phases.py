"""A run as phases, each with its operations, its traffic and a roofline time; what fits, and the best layouts."""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pangu_ms.architectures.tensors import fitting
from pangu_ms.errors import PanguError
from pangu_ms.estimate import optimizer, traffic
from pangu_ms.estimate.devices import Device
from pangu_ms.estimate.flops import forward_flops, train_flops
from pangu_ms.estimate.memory import memory, total
from pangu_ms.estimate.work import FLOAT32, Case, calls_of
from pangu_ms.parallel.ranks import Ranks

LARGEST_FLEET = 1024


@dataclass(frozen=True)
class Phase:
    """One part of a run on its busiest rank.

    tokens: that the whole fleet gets through. flops, bytes, sent: by component, by kind, by group of ranks. seconds:
    `compute` and `memory` overlap and the longer one counts; `tensor`, `expert` and `data` collectives overlap with
    nothing. bound: what takes longest.
    """

    name: str
    tokens: int
    flops: dict[str, float]
    bytes: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]
    time: float
    bound: str


def phases(case: Case, device: Device) -> list[Phase]:
    """Training: forward and backward, then the update. Inference: the prefill of the batch, then one decoding step.

    In inference the operations of `mtp`, which only drafting takes, are listed and not timed.
    """
    found = [_phase(name, case.work.batch * calls.tokens, (train_flops if case.train else forward_flops)(case, calls),
                    traffic.moved_bytes(case, calls), traffic.sent_bytes(case, calls), case, device)
             for name, calls in calls_of(case).items()]
    if case.train:
        found.append(_phase("update", 0, {"newton_schulz": optimizer.update_flops(case)}, traffic.update_bytes(case),
                            traffic.update_sent_bytes(case), case, device))
    return found


def _phase(name, tokens, flops, moved, sent, case: Case, device: Device) -> Phase:
    """Operations over the peak of their dtype, bytes over the memory's, sent bytes over the slowest link of a group."""
    slow = sum(value for key, value in flops.items() if key in FLOAT32 or key == "newton_schulz")
    fast = sum(value for key, value in flops.items() if case.train or key != "mtp") - slow
    seconds = {"compute": fast / device.bfloat16_tflops / 1e12 + slow / device.float32_tflops / 1e12,
               "memory": sum(moved.values()) / device.memory_gb_per_s / 1e9}
    # Ranks of a tensor group are neighbours; an expert group spans tensor * expert devices, a data group all.
    spans = {"tensor": case.ranks.tensor, "expert": case.ranks.model.count, "data": case.ranks.count}
    for group, value in sent.items():
        local = spans[group] <= device.per_server
        seconds[group] = value / 1e9 / (device.link_gb_per_s if local else device.network_gb_per_s)
    time = max(seconds["compute"], seconds["memory"]) + sum(seconds[group] for group in sent)
    return Phase(name, tokens, flops, moved, sent, seconds, time, max(seconds, key=seconds.get))


def flops_per_token(case: Case) -> dict[str, dict[str, float]]:
    """Of the whole model, by phase and component: one sequence's operations over its tokens."""
    alone = Case(case.config, Ranks(batch_sharded=case.train), replace(case.work, batch=1), case.tensors)
    return {name: {key: value / calls.tokens for key, value in
                   (train_flops if case.train else forward_flops)(alone, calls).items()}
            for name, calls in calls_of(alone).items()}


def judge(case: Case, device: Device) -> dict:
    """A layout: its name, devices, bytes of one, seconds of a training step with its update or of one decoding step."""
    needed, times = total(memory(case)), [phase.time for phase in phases(case, device)]
    return {"parallel": str(case.ranks), "devices": case.ranks.count, "bytes": needed,
            "seconds": sum(times) if case.train else times[-1], "fits": needed <= device.usable}


def layouts(case: Case, devices: int, numbers: dict[str, list[int]]) -> Iterator[Case]:
    """The work in every layout of so many devices, among numbers of tensor and expert ranks that fit the model."""
    for tensor, expert in itertools.product(numbers["tensor"], numbers["expert"]):
        if devices % (tensor * expert) == 0:
            ranks = Ranks(tensor, expert, devices // (tensor * expert), batch_sharded=case.train)
            if not case.train or case.work.batch % ranks.batch == 0:
                yield case.on(ranks)


def fitting_ranks(case: Case) -> dict[str, list[int]]:
    return {dimension: fitting(case.config, dimension) for dimension in ("tensor", "expert")}


def sweep(case: Case, device: Device, devices: int) -> list[dict]:
    """`judge` of layouts of so many devices: those that fit by time, then the others by memory."""
    case.on(Ranks(batch_sharded=case.train)).check()
    numbers = fitting_ranks(case)
    found = [judge(each, device) for each in layouts(case, devices, numbers)]
    if not found:
        raise PanguError(f"--sweep {devices}: no layout fits; tp is one of {numbers['tensor']}, ep one of "
                         f"{numbers['expert']}, and in training dp * ep divides --batch {case.work.batch}")
    return sorted(found, key=lambda row: (not row["fits"], row["seconds" if row["fits"] else "bytes"]))


def smallest_fleet(case: Case, device: Device) -> dict | None:
    """The fewest devices that hold the work, 1, 2, 4, ... LARGEST_FLEET, in their fastest layout; None if none do."""
    devices, numbers = 1, fitting_ranks(case)
    while devices <= LARGEST_FLEET:
        enough = [each for each in layouts(case, devices, numbers) if total(memory(each)) <= device.usable]
        if enough:
            return min((judge(each, device) for each in enough), key=lambda row: row["seconds"])
        devices *= 2
    return None
