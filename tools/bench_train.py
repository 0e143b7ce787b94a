"""A training step and where its time goes. python tools/bench.py train --config FILE

Model, batch size and sequence length, losses and optimizer are those of a YAML file of pangu-train; the weights are a
new model's, and the tokens random: no data is read. One run measures, on the CPU:

compiling   forward, gradients and whole step, each a graph of its own: its first call less the best later one
speed       tokens a second of whole steps, best and median
parts       forward: the graph of the losses alone; backward: what the graph with gradients takes more; optimizer: what
            the whole step takes more, gradient norm and bias update included. Differences of the best times, as medians
            move with what else the machine does; the three graphs take turns
experts     the routed experts' product, forward and backward, at the sizes and with the routing of the model, times
            the number of MoE layers (an MTP layer is taken to route like the trunk), and its share of the step
memory      peak of the process, compiling included

Gradient accumulation is left out: a step is one batch of runner_config.batch_size.
"""
import argparse
import inspect
import resource
import statistics

import numpy as np

from bench_machine import say, timed
from pangu_ms.architectures import config_from_dict
from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.yaml_file import check_section, read_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of pangu-train")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")


def measure(arguments: argparse.Namespace) -> dict:
    path, steps, fields = arguments.config, arguments.steps, read_yaml(arguments.config)
    if steps < 1:
        raise PanguError(f"--steps is {steps}: wanted at least 1")
    config, options, shape = sections(path, fields)
    settings = TrainingSettings.from_dict(fields.get("pangu_training") or {})
    import mindspore as ms

    from pangu_ms import PanguForCausalLM
    from pangu_ms.training.initial_values import initialize
    from pangu_ms.training.objectives.pretraining import Pretraining
    from pangu_ms.training.optimizer.pangu_muon import PanguMuon
    from pangu_ms.training.step import TrainStep

    check_section(f"{path}: optimizer", options, inspect.signature(PanguMuon).parameters)
    model = PanguForCausalLM(config)
    initialize(model, fields.get("seed", 0), settings)
    objective = Pretraining(model, settings)
    # So small a rate that the routing, which decides how long the experts take, stays that of a new model.
    optimizer = PanguMuon(objective.trained_parameters(), config, **options | {"learning_rate": 1e-8})
    step = TrainStep(objective, optimizer, max_grad_norm=1.0, bias_update_rate=settings.router_bias_update_rate)

    draw = np.random.default_rng(0)
    ids = draw.integers(0, config.plan.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    position = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    batch = [ms.Tensor(column) for column in
             (ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones(shape, np.float32), position)]

    graphs = {"forward": objective, "gradients": step.gradients, "step": step}
    first, seconds = {}, {name: [] for name in graphs}
    for name, graph in graphs.items():
        say(f"compiling {name}")
        first[name] = timed(lambda: finish(graph(*batch)))
    say(f"{steps} steps")
    for _ in range(steps):
        for name, graph in graphs.items():
            seconds[name].append(timed(lambda: finish(graph(*batch))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before measuring anything else takes memory
    say("experts")
    experts = experts_seconds(objective, batch, steps)
    best = {name: min(found) for name, found in seconds.items()}
    tokens = shape[0] * shape[1]
    return {
        "config": path, "batch_size": shape[0], "sequence_length": shape[1], "steps": steps,
        "parameters": sum(parameter.size for parameter in model.get_parameters()),
        "compile_seconds": {name: first[name] - best[name] for name in graphs},
        "tokens_per_second": {"best": tokens / best["step"], "median": tokens / statistics.median(seconds["step"])},
        "seconds": by_part(best),
        "experts": {"moe_layers": len(objective.moe_layers), "seconds": experts, "share": experts / best["step"]},
        "peak_memory_bytes": peak,
    }


def sections(path: str, fields: dict) -> tuple:
    """The model's config, the options of PanguMuon, (batch size, sequence length); `ConfigError` names what lacks."""
    def section(*names):
        found = fields
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None:
            raise ConfigError(f"{path}: lacks {'.'.join(names)}; take a file of configs/openpangu_v2 to start from")
        return found

    options = dict(section("optimizer"))
    if options.pop("type", None) != "PanguMuon":
        raise ConfigError(f"{path}: optimizer.type is {fields['optimizer'].get('type')}, wanted PanguMuon")
    return (config_from_dict(section("model", "model_config")), options,
            (section("runner_config", "batch_size"), section("train_dataset", "data_loader", "seq_length")))


def by_part(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of the three graphs, each of which does what the one before does and more -> of what each adds."""
    forward, gradients, step = (seconds[name] for name in ("forward", "gradients", "step"))
    return {"forward": forward, "backward": gradients - forward, "optimizer": step - gradients, "step": step}


def experts_seconds(objective, batch: list, steps: int) -> float:
    """Of all MoE layers together: the mean over the trunk's routings, each the best of `steps` turns."""
    import mindspore as ms

    from bench_train_cells import ExpertsGradient, Routing

    layers = [place for place in objective.moe_layers if place < objective.trunk]
    if not layers:
        return 0.0
    experts = objective.causal_lm.model.layers[layers[0]].mlp.experts
    product = experts if objective.warm_up else ExpertsGradient(experts)        # the warm-up has no backward there
    x = np.random.default_rng(0).normal(size=(*batch[0].shape, objective.causal_lm.plan.hidden_size))
    x, took = ms.Tensor(x, ms.float32), []
    for ids, weights in Routing(objective.causal_lm, layers)(batch[0], batch[3]):
        finish(product(x, ids, weights))                                        # compiles, the first time
        took.append(min(timed(lambda: finish(product(x, ids, weights))) for _ in range(steps)))
    return len(objective.moe_layers) * statistics.mean(took)


def finish(outputs) -> None:
    """Waits until a call's results are there."""
    (outputs[0] if isinstance(outputs, tuple) else outputs).asnumpy()


def report(found: dict) -> str:
    speed, seconds, experts = found["tokens_per_second"], found["seconds"], found["experts"]
    shares = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms ({seconds[name] / seconds['step']:.0%})"
                       for name in ("forward", "backward", "optimizer"))
    return "\n".join((
        f"{found['config']}: {found['parameters'] / 1e6:.2f} M parameters, batches of {found['batch_size']} times "
        f"{found['sequence_length']} tokens, {found['steps']} steps",
        "compiling   " + ", ".join(f"{name} {took:.1f} s" for name, took in found["compile_seconds"].items()),
        f"speed       {speed['best']:,.0f} tokens/s (median {speed['median']:,.0f}), "
        f"{1e3 * seconds['step']:.1f} ms a step",
        f"parts       {shares}",
        f"experts     {1e3 * experts['seconds']:.1f} ms in {experts['moe_layers']} MoE layers, {experts['share']:.0%} "
        "of the step",
        f"memory      {found['peak_memory_bytes'] / 1e6:,.0f} MB at its peak",
    ))
