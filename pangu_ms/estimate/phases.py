"""A run as phases, each with its operations, its traffic and a roofline time; what fits, and the best layouts."""
from collections.abc import Iterator
from dataclasses import dataclass

from pangu_ms.config import PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.estimate import flops, traffic
from pangu_ms.estimate.devices import Device
from pangu_ms.estimate.memory import memory, total
from pangu_ms.estimate.work import Parallel, Work, check, decode_calls, fitting, prefill_calls, train_calls

LARGEST_FLEET = 1024


@dataclass(frozen=True)
class Phase:
    """One part of a run on its busiest device.

    tokens: that the whole fleet gets through. flops, bytes, sent: by component, by kind, by group of ranks. seconds:
    `compute` and `memory` overlap and the longer one counts; `tensor`, `expert` and `data` collectives overlap with
    nothing.
    """

    name: str
    tokens: int
    flops: dict[str, float]
    bytes: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]

    @property
    def time(self) -> float:
        return max(self.seconds["compute"], self.seconds["memory"]) + sum(
            self.seconds[group] for group in self.sent)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.get)


def _phase(name, tokens, operations, moved, sent, device: Device, parallel: Parallel) -> Phase:
    """Operations over the peak of their dtype, bytes over the memory's, sent bytes over the slowest link of a group."""
    slow = sum(value for key, value in operations.items() if key in (*flops.FLOAT32, "newton_schulz"))
    counted = sum(value for key, value in operations.items() if not (key == "mtp" and name != "step"))
    seconds = {"compute": (counted - slow) / device.bfloat16_tflops / 1e12 + slow / device.float32_tflops / 1e12,
               "memory": sum(moved.values()) / device.memory_gb_per_s / 1e9}
    # Ranks of a tensor group are neighbours; an expert group spans tensor * expert devices, a data group all.
    spans = {"tensor": parallel.tensor, "expert": parallel.tensor * parallel.expert, "data": parallel.devices}
    for group, value in sent.items():
        local = spans[group] <= device.per_server
        seconds[group] = value / 1e9 / (device.link_gb_per_s if local else device.network_gb_per_s)
    return Phase(name, tokens, operations, moved, sent, seconds)


def phases(config: PanguConfig, parallel: Parallel, work: Work, device: Device) -> list[Phase]:
    """Training: forward and backward, then the update. Inference: the prefill of the batch, then one decoding step.

    In inference the operations of `mtp`, which only drafting takes, are listed and not timed.
    """
    if work.phase == "train":
        calls = train_calls(work)
        sent = traffic.collective_bytes(config, parallel, work, calls)
        update = {"newton_schulz": flops.optimizer_flops(config, parallel, work)}
        return [
            _phase("step", work.batch * work.length, flops.train_flops(config, parallel, work, calls),
                   traffic.train_bytes(config, parallel, work, calls), sent, device, parallel),
            _phase("update", 0, update, traffic.update_bytes(config, parallel, work),
                   traffic.update_collective_bytes(config, parallel, work), device, parallel),
        ]
    return [_phase(name, work.batch * calls.tokens, flops.forward_flops(config, parallel, work, calls),
                   traffic.infer_bytes(config, parallel, work, calls),
                   traffic.collective_bytes(config, parallel, work, calls), device, parallel)
            for name, calls in (("prefill", prefill_calls(config, parallel, work)), ("decode", decode_calls(work)))]


def flops_per_token(config: PanguConfig, work: Work) -> dict[str, dict[str, float]]:
    """Of the whole model, by phase and component: one sequence's operations over its tokens."""
    alone = Work(work.phase, work.length, 1, work.dtype, work.recompute, fused=work.fused)
    if work.phase == "train":
        calls = {"train": train_calls(alone)}
        count = flops.train_flops
    else:
        calls = {"prefill": prefill_calls(config, Parallel(), alone), "decode": decode_calls(alone)}
        count = flops.forward_flops
    return {name: {key: value / c.tokens for key, value in count(config, Parallel(), alone, c).items()}
            for name, c in calls.items()}


@dataclass(frozen=True)
class Layout:
    """A way to spread the work, judged. `time` of a training step with its update, or of one decoding step."""

    parallel: Parallel
    bytes: float
    time: float
    fits: bool


def judge(config: PanguConfig, parallel: Parallel, work: Work, device: Device) -> Layout:
    needed = total(memory(config, parallel, work))
    found = phases(config, parallel, work, device)
    time = sum(phase.time for phase in found) if work.phase == "train" else found[-1].time
    return Layout(parallel, needed, time, needed <= device.usable)


def layouts(config: PanguConfig, work: Work, devices: int) -> Iterator[Parallel]:
    """Every layout of so many devices that `check` lets through."""
    for tensor in fitting(config, "tensor"):
        for expert in fitting(config, "expert"):
            if devices % (tensor * expert) == 0:
                parallel = Parallel(devices // (tensor * expert), tensor, expert)
                if work.phase != "train" or work.batch % parallel.replicas == 0:
                    yield parallel


def sweep(config: PanguConfig, work: Work, device: Device, devices: int) -> list[Layout]:
    """Layouts of so many devices: those that fit by time, then the others by memory."""
    check(config, Parallel(), work)
    found = [judge(config, parallel, work, device) for parallel in layouts(config, work, devices)]
    if not found:
        raise PanguError(f"--sweep {devices}: no layout fits; tp is one of {fitting(config, 'tensor')}, ep one of "
                         f"{fitting(config, 'expert')}, and in training dp * ep divides --batch {work.batch}")
    return sorted(found, key=lambda layout: (not layout.fits, layout.time if layout.fits else layout.bytes))


def smallest_fleet(config: PanguConfig, work: Work, device: Device) -> Layout | None:
    """The fewest devices that hold the work, 1, 2, 4, ... 1024, in their fastest layout; None if none do."""
    devices = 1
    while devices <= LARGEST_FLEET:
        fitting_ones = [parallel for parallel in layouts(config, work, devices)
                        if total(memory(config, parallel, work)) <= device.usable]
        if fitting_ones:
            return min((judge(config, parallel, work, device) for parallel in fitting_ones),
                       key=lambda layout: layout.time)
        devices *= 2
    return None
