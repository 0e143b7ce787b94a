"""Generation beside what the machine could do. python tools/bench.py generate --model DIR

One run measures, in float32 on the CPU:

machine     memory bandwidth and float32 product rate, on the same cores
compiling   each form of the step (prefill and decode, dense and sparse attention): its first call less a later one
speed       prefill and decode tokens a second after a warm-up run of the same request, best and median of the rounds
floor       what the machine would reach if reading the weights (decode) or multiplying with them (prefill) were all;
            tools/bench_floors.py says what is counted
drafts      with --num-draft-tokens: drafts accepted by depth, tokens for each step, the speed-up over decoding without
            drafts, whose rounds take turns with the others, and the floor that `step_bytes` counts
kernels     operators that one decode step launches, per layer of the trunk; tools/bench_kernels.py says what is counted
memory      peak of the process up to the end of the rounds, compiling included; bytes of the cache, as held (spare
            capacity included) and by formula (exactly the tokens, MTP layers included)
contexts    time of one decode step by length of the context. The cache is given its length without a prefill: all of
            its rows are zeros. Of all operators only the choice of the indexer's best looks at values, and sees ties
"""
import argparse
import dataclasses
import resource
import statistics
from pathlib import Path

import numpy as np

from bench_floors import decode_bytes, prefill_flop, step_bytes
from bench_kernels import decode_kernels, form_start, timed_step
from bench_machine import memory_bandwidth, product_rate, say, use_cores
from pangu_ms.architectures import read_config
from pangu_ms.cache.sizes import cache_bytes
from pangu_ms.errors import PanguError
from pangu_ms.generation.request import check_request

STEPS = 8  # timed decode steps per round and context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--num-draft-tokens", type=int, default=0, metavar="K")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--contexts", type=lengths, default=lengths("512,2048,8192,32768"), metavar="N,N")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="cores the process may use (default: 2)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="decode time over context (needs matplotlib)")


def lengths(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def measure(arguments: argparse.Namespace) -> dict:
    config = read_config(arguments.model)
    plan = config.plan
    prompt = np.random.default_rng(0).integers(plan.vocab_size, size=arguments.prompt_tokens).tolist()
    check(arguments, plan, prompt)
    use_cores(arguments.threads)

    from pangu_ms import PanguForCausalLM
    model = PanguForCausalLM.from_pretrained(arguments.model)
    # The tables of rotary angles reach every context asked for; the weights do not depend on it.
    model.plan = dataclasses.replace(model.plan, max_positions=max(plan.max_positions, *arguments.contexts))

    forms = ("dense", "sparse") if plan.indexer else ("dense",)
    say("compiling")
    compiled = compile_seconds(model, forms, arguments.prompt_tokens)
    say("prefill and decode")
    drafted, plain = generation_rounds(model, prompt, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before measuring anything else takes memory
    say("the machine")
    bandwidth, rate = memory_bandwidth(arguments.threads), product_rate()
    say("contexts")
    contexts = context_steps(model, arguments.contexts, arguments.rounds)
    say("counting kernels")
    kernels = decode_kernels(arguments.model, forms, len(plan.trunk))

    flop, weights = prefill_flop(config, arguments.prompt_tokens), decode_bytes(config)
    tokens = arguments.prompt_tokens + arguments.new_tokens - 1  # the last one is never fed back
    moved = step_bytes(config, arguments.num_draft_tokens) if arguments.num_draft_tokens else None
    found = {
        "model": arguments.model, "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens,
        "num_draft_tokens": arguments.num_draft_tokens, "rounds": arguments.rounds, "threads": arguments.threads,
        "machine": {"bytes_per_second": bandwidth, "flop_per_second": rate},
        "compile_seconds": compiled,
        "prefill": {"floor_flop": flop} | beside(arguments.prompt_tokens * rate / flop, [
            response.prefill_tokens / response.prefill_seconds for response in drafted]),
        "decode": {"floor_bytes_per_token": weights} | beside(bandwidth / weights, decode_speeds(drafted)),
        "drafts": draft_report(drafted, plain, bandwidth, moved) if moved else None,
        "kernels": kernels,
        "peak_memory_bytes": peak,
        "cache_bytes": {"held": drafted[-1].cache_bytes, "formula": cache_bytes(model.plan, tokens)["total"]},
        "contexts": contexts,
    }
    if arguments.plot:
        plot(found, arguments.plot)
    return found


def check(arguments: argparse.Namespace, plan, prompt: list[int]) -> None:
    """Refuses at once what would fail after minutes."""
    check_request(plan, prompt, arguments.new_tokens, arguments.num_draft_tokens)
    if arguments.new_tokens < 2:
        raise PanguError("--new-tokens is 1: wanted at least 2, as the first one comes out of the prefill")
    if arguments.rounds < 1:
        raise PanguError(f"--rounds is {arguments.rounds}: wanted at least 1")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise PanguError("--plot needs matplotlib: pip install matplotlib") from None


# ---------------------------------------------------------------- measuring

def compile_seconds(model, forms: tuple[str, ...], rows: int) -> dict[str, float]:
    """Seconds of compiling each form of the step; a prefill of `rows` tokens, or of fewer, so that it has one form."""
    from pangu_ms.generation.engine import Engine

    engine, found, indexer = Engine(model), {}, model.plan.indexer
    rows = min(rows, indexer.topk) if indexer else rows
    for form in forms:
        start = form_start(form, model.plan)
        for name, step, width in (("prefill", engine.prefill, rows), ("decode", engine.decode, 1)):
            first, *later = (timed_step(engine, step, start, width) for _ in range(3))
            found[f"{name}_{form}"] = first - min(later)
    return found


def generation_rounds(model, prompt: list[int], arguments: argparse.Namespace) -> tuple[list, list]:
    """The last response of each round, which holds the round's times, and with drafts the same without; a round before
    them warms up."""
    from pangu_ms import stream_generate

    found = {drafts: [] for drafts in (arguments.num_draft_tokens, 0)}
    for _ in range(1 + arguments.rounds):
        for drafts, responses in found.items():
            *_, last = stream_generate(model, prompt, arguments.new_tokens, num_draft_tokens=drafts, eos_token_ids=())
            responses.append(last)
    return found[arguments.num_draft_tokens][1:], found[0][1:]


def context_steps(model, contexts: list[int], rounds: int) -> list[dict]:
    """The decode step that makes a context so many tokens long. Contexts take turns, so that a disturbance of the
    machine does not fall on one of them."""
    from pangu_ms.generation.engine import Engine

    engines = [Engine(model) for _ in contexts]
    seconds = [[] for _ in contexts]
    for turn in range(1 + rounds):
        for context, engine, found in zip(contexts, engines, seconds):
            took = [timed_step(engine, engine.decode, context - 1) for _ in range(STEPS)]
            found += took if turn else []  # the first turn warms up
    return [{"context": context, "capacity": engine.cache.capacity, "cache_bytes": engine.cache.bytes,
             "best_seconds": min(found), "median_seconds": statistics.median(found)}
            for context, engine, found in zip(contexts, engines, seconds)]


def decode_speeds(responses: list) -> list[float]:
    """Tokens a second of each round."""
    return [response.decode_tokens / response.decode_seconds for response in responses]


def beside(floor: float, rounds: list[float]) -> dict:
    """Speeds in tokens a second, and the share of the floor that the best round reaches."""
    return {"tokens_per_second": {"best": max(rounds), "median": statistics.median(rounds), "floor": floor},
            "share": max(rounds) / floor}


def draft_report(drafted: list, plain: list, bandwidth: float, moved: dict[str, float]) -> dict:
    """What drafts bring: the last responses of each round, with and without, and the bytes that a step moves."""
    last, steps, without = drafted[-1], drafted[-1].drafted[0], max(decode_speeds(plain))
    return {"accepted": [accepted / count for accepted, count in zip(last.accepted, last.drafted)],
            "tokens_per_step": last.decode_tokens / steps, "speed_up": max(decode_speeds(drafted)) / without,
            "tokens_per_second_without": without, "floor_bytes_per_step": moved,
            "floor_tokens_per_second": bandwidth / sum(moved.values()) * last.decode_tokens / steps}


# ---------------------------------------------------------------- showing

def report(found: dict) -> str:
    machine, cache = found["machine"], found["cache_bytes"]
    lines = [f"{found['model']}: {found['prompt_tokens']} prompt tokens, {found['new_tokens']} new ones, "
             f"{found['num_draft_tokens']} drafts, {found['threads']} threads, {found['rounds']} rounds",
             f"machine     {machine['bytes_per_second'] / 1e9:.1f} GB/s, "
             f"{machine['flop_per_second'] / 1e9:.0f} GFLOP/s"]
    for name in ("prefill", "decode"):
        speed = found[name]["tokens_per_second"]
        lines.append(f"{name:<12}{speed['best']:,.1f} tokens/s (median {speed['median']:,.1f}), "
                     f"{found[name]['share']:.1%} of the machine's {speed['floor']:,.1f}")
    lines.append(f"floors      {found['prefill']['floor_flop'] / 1e9:.3f} GFLOP for the prompt, "
                 f"{found['decode']['floor_bytes_per_token'] / 1e6:.3f} MB of weights for each new token")
    if drafts := found["drafts"]:
        shares = ", ".join(f"depth {depth} {share:.0%}" for depth, share in enumerate(drafts["accepted"], 1))
        moved = drafts["floor_bytes_per_step"]
        lines.append(f"drafts      accepted {shares}; {drafts['tokens_per_step']:.2f} tokens a step; "
                     f"{drafts['speed_up']:.2f} times the {drafts['tokens_per_second_without']:,.1f} tokens/s without")
        lines.append(f"            floor {drafts['floor_tokens_per_second']:,.1f} tokens/s: "
                     f"{moved['verify'] / 1e6:.3f} MB of weights to verify, {moved['draft'] / 1e6:.3f} MB to draft")
    lines += [f"compiling   {name.replace('_', ', ')}: {seconds:.1f} s"
              for name, seconds in found["compile_seconds"].items()]
    for form, kernels in found["kernels"].items():
        often = ", ".join(f"{count} {name}" for name, count in list(kernels["in_layers"].items())[:8])
        lines.append(f"kernels     decode, {form}: {kernels['per_trunk_layer']:.1f} a trunk layer, "
                     f"{kernels['outside']} outside; in all layers {often}, ...")
    lines += [f"memory      {found['peak_memory_bytes'] / 1e6:,.0f} MB at its peak",
              f"cache       {cache['held']:,} bytes held, {cache['formula']:,} by formula",
              "",
              f"{'context':>9}{'best ms':>10}{'median ms':>11}{'cache MB':>10}"]
    lines += [f"{row['context']:>9,}{row['best_seconds'] * 1e3:>10.2f}{row['median_seconds'] * 1e3:>11.2f}"
              f"{row['cache_bytes'] / 1e6:>10.2f}" for row in found["contexts"]]
    return "\n".join(lines)


def plot(found: dict, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    rows = sorted(found["contexts"], key=lambda row: row["context"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in ("best", "median"):
        axes.plot([row["context"] for row in rows], [row[f"{name}_seconds"] * 1e3 for row in rows], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["context"] for row in rows], [f"{row['context']:,}" for row in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms for one decode step")
    axes.set_title(f"{Path(found['model']).name}, float32, {found['threads']} threads")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
