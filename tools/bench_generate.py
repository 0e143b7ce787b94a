"""Generation beside what the machine could do. python tools/bench.py generate --model DIR

One run measures, in float32 on the CPU:

machine     memory bandwidth and float32 product rate, on the same cores
compiling   each form of the step (prefill and decode, dense and sparse attention): its first call less a later one
speed       prefill and decode tokens a second after a warm-up run of the same request, best and median of the rounds
floor       what the machine would reach if reading the weights (decode) or multiplying with them (prefill) were all;
            `decode_bytes` and `prefill_flop` say what is counted
drafts      with --num-draft-tokens: drafts accepted by depth, tokens for each step, the speed-up over decoding without
            drafts, whose rounds take turns with the others, and the floor that `step_bytes` counts
kernels     operators that one decode step launches, per layer of the trunk; `count_kernels` says what is counted
memory      peak of the process up to the end of the rounds, compiling included; bytes of the cache, as held (spare
            capacity included) and by formula (exactly the tokens, MTP layers included)
contexts    time of one decode step by length of the context. The cache is given its length without a prefill: all of
            its rows are zeros. Of all operators only the choice of the index_topk best looks at values, and sees ties
"""
import argparse
import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pangu_ms.checkpoint.names import parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.generation.command import one_line
from pangu_ms.generation.request import check_request

FLOAT32_BYTES = 4
STEPS = 8  # timed decode steps per round and context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--num-draft-tokens", type=int, default=0, metavar="K")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--contexts", type=lengths, default=lengths("512,2048,8192,32768"), metavar="N,N")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="cores the process may use (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="decode time over context (needs matplotlib)")


def lengths(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def run(arguments: argparse.Namespace) -> int:
    try:
        config = PanguConfig.from_pretrained(arguments.model)
        prompt = np.random.default_rng(0).integers(config.vocab_size, size=arguments.prompt_tokens).tolist()
        check(arguments, config, prompt)
        use_cores(arguments.threads)
        found = measure(arguments, config, prompt)
    except PanguError as error:
        print(f"bench.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    if arguments.plot:
        plot(found, arguments.plot)
    print(json.dumps(found) if arguments.json else report(found))
    return 0


def check(arguments: argparse.Namespace, config: PanguConfig, prompt: list[int]) -> None:
    """Refuses at once what would fail after minutes."""
    check_request(config, prompt, arguments.new_tokens, arguments.num_draft_tokens)
    if arguments.new_tokens < 2:
        raise PanguError("--new-tokens is 1: wanted at least 2, as the first one comes out of the prefill")
    if arguments.rounds < 1:
        raise PanguError(f"--rounds is {arguments.rounds}: wanted at least 1")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= cores:
        raise PanguError(f"--threads is {arguments.threads}: wanted 1 to {cores}, the cores this process may use")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise PanguError("--plot needs matplotlib: pip install matplotlib") from None


def use_cores(count: int) -> None:
    """Keep all threads to `count` cores: those that exist (numpy's), and those that will be made."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def measure(arguments: argparse.Namespace, config: PanguConfig, prompt: list[int]) -> dict:
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
    from pangu_ms import PanguForCausalLM
    from pangu_ms.cache import cache_bytes

    model = PanguForCausalLM.from_pretrained(arguments.model)
    # The tables of rotary angles reach every context asked for; the weights do not depend on it.
    longest = max(config.max_position_embeddings, *arguments.contexts)
    model.config = dataclasses.replace(model.config, max_position_embeddings=longest)

    say("compiling")
    compiled = compile_seconds(model, min(arguments.prompt_tokens, config.index_topk))
    say("prefill and decode")
    pieces, plain = generation_rounds(model, prompt, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before measuring anything else takes memory
    say("the machine")
    bandwidth, rate = memory_bandwidth(arguments.threads), product_rate()
    say("contexts")
    contexts = context_steps(model, arguments.contexts, arguments.rounds)
    say("counting kernels")
    forms = {name.removeprefix("decode_") for name in compiled if name.startswith("decode_")}
    kernels = {form: decode_kernels(arguments.model, form, config) for form in sorted(forms)}

    flop, weights = prefill_flop(config, arguments.prompt_tokens), decode_bytes(config)
    prefill = [piece.prefill_tokens / piece.prefill_seconds for piece in pieces]
    decode = [piece.decode_tokens / piece.decode_seconds for piece in pieces]
    tokens = arguments.prompt_tokens + arguments.new_tokens - 1  # the last one is never fed back
    drafts = draft_report(pieces, plain, bandwidth, step_bytes(config, arguments.num_draft_tokens)) if plain else None
    return {
        "model": arguments.model, "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens,
        "num_draft_tokens": arguments.num_draft_tokens, "rounds": arguments.rounds, "threads": arguments.threads,
        "machine": {"bytes_per_second": bandwidth, "flop_per_second": rate},
        "compile_seconds": compiled,
        "prefill": {"floor_flop": flop} | beside(arguments.prompt_tokens * rate / flop, prefill),
        "decode": {"floor_bytes_per_token": weights} | beside(bandwidth / weights, decode),
        "drafts": drafts,
        "kernels": kernels,
        "peak_memory_bytes": peak,
        "cache_bytes": {"held": pieces[-1].cache_bytes, "formula": cache_bytes(config, tokens)["total"]},
        "contexts": contexts,
    }


def say(what: str) -> None:
    print(f"bench.py: {what} ...", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- floors

def decode_bytes(config: PanguConfig) -> int:
    """Bytes of float32 weights that one token reads: every trunk layer with the experts chosen for the token, merge,
    final norm, head.

    Of the embedding one row is read, which is nothing beside the rest. The cache is not counted: the floor is that of
    a short context.
    """
    return FLOAT32_BYTES * config.parameter_count()["active"]["with_head"]


def step_bytes(config: PanguConfig, drafts: int) -> dict[str, float]:
    """Bytes of float32 weights that a step with drafts reads: verifying 1 + drafts rows, and drafting.

    A matrix is read once for all rows. Of the routed experts those are counted that the rows reach if each chooses
    evenly and for itself. Drafting runs the MTP layers, the last one once more for each draft that has no layer of its
    own, and the head for each draft; their windows are a few rows, see `Draft`.
    """
    from pangu_ms.model.step import Draft

    depths = min(drafts, config.num_nextn_predict_layers)
    verify, draft = 0.0, 0.0
    for parameter in parameters(config).values():
        depth = parameter.plan.mtp_depth if parameter.plan else 0

        def read(rows, parameter=parameter):
            missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** rows
            return parameter.count * (1 - missed if parameter.component == "expert" else 1)

        if depth:
            draft += read(Draft.window(drafts, depths)) if depth <= depths else 0
            draft += (drafts - depths) * read(1) if depth == depths else 0
        elif parameter.component != "embedding":
            verify += read(1 + drafts)
            draft += drafts * parameter.count if parameter.component == "head" else 0
    return {"verify": FLOAT32_BYTES * verify, "draft": FLOAT32_BYTES * draft}


def draft_report(pieces: list, plain: list, bandwidth: float, moved: dict[str, float]) -> dict:
    """What drafts bring; `pieces` and `plain` are the last ones of each round, with and without."""
    last, steps = pieces[-1], pieces[-1].drafted[0]
    best, without = (max(piece.decode_tokens / piece.decode_seconds for piece in some) for some in (pieces, plain))
    return {"accepted": [accepted / drafted for accepted, drafted in zip(last.accepted, last.drafted)],
            "tokens_per_step": last.decode_tokens / steps, "speed_up": best / without,
            "tokens_per_second_without": without, "floor_bytes_per_step": moved,
            "floor_tokens_per_second": bandwidth / sum(moved.values()) * last.decode_tokens / steps}


def prefill_flop(config: PanguConfig, tokens: int) -> int:
    """Floating-point operations of the products that a prefill of `tokens` cannot do without.

    weights      a token multiplies with each active weight of the layers and adds: 2 per weight and token. (Vectors,
                 such as the gains of norms, are among them: under 1 % at real widths.)
    head         the same, for the last token alone.
    attention    a query and a row that it sees, a sink or an earlier token or itself, cost each head one dot product
                 over qk_nope_head_dim + qk_rope_head_dim, and v_head_dim multiplications and additions for the output:
                 2 * (nope + rope + v). A query sees all sinks, and of n rows up to itself min(n, window) or
                 min(n, index_topk).
    indexer      where n is more than index_topk, the query's index_n_heads score all n rows and are added by weight:
                 2 * (index_head_dim + 1) per head and row.
    """
    upto = np.arange(1, tokens + 1)
    flop = 2 * (config.parameter_count()["active"]["layers"] * tokens + config.vocab_size * config.hidden_size)
    pair = 2 * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    scored = 2 * config.index_n_heads * (config.index_head_dim + 1)
    for plan in config.layers[:config.num_hidden_layers]:
        most = config.index_topk if plan.kind == "dsa" else plan.window or tokens
        flop += pair * int((np.minimum(upto, most) + config.param_sink_number).sum())
        if plan.kind == "dsa":
            flop += scored * int(upto[upto > most].sum())
    return flop


def beside(floor: float, rounds: list[float]) -> dict:
    """Speeds in tokens a second, and the share of the floor that the best round reaches."""
    return {"tokens_per_second": {"best": max(rounds), "median": statistics.median(rounds), "floor": floor},
            "share": max(rounds) / floor}


# ---------------------------------------------------------------- the machine

def memory_bandwidth(threads: int, shape: tuple[int, int] = (65536, 2048)) -> float:
    """Bytes a second of a float32 matrix-vector product; the default matrix has 512 MiB, far more than any cache.

    numpy's product, each thread with its part of the rows: MindSpore's is slower, and the floor is the machine's.
    """
    matrix, vector = np.ones(shape, np.float32), np.ones(shape[1], np.float32)
    parts = np.array_split(matrix, threads)
    with ThreadPoolExecutor(threads) as pool:
        return matrix.nbytes / best_seconds(lambda: list(pool.map(lambda part: part @ vector, parts)), 8)


def product_rate(size: int = 4096) -> float:
    """Floating-point operations a second of MindSpore's product of two square float32 matrices."""
    from mindspore import ops
    square = ops.ones((size, size))
    return 2 * size ** 3 / best_seconds(lambda: ops.matmul(square, square).asnumpy(), 5)


def best_seconds(call, times: int) -> float:
    return min(timed(call) for _ in range(times))


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ---------------------------------------------------------------- generation

def compile_seconds(model, rows: int) -> dict[str, float]:
    """Seconds of compiling each form of the step, prefilling `rows` tokens; sparse ones need DSA layers."""
    from pangu_ms.generation.engine import Engine

    engine, found = Engine(model), {}
    for form in ("dense", "sparse") if engine.selects else ("dense",):
        for name, step, width in (("prefill", engine.prefill, rows), ("decode", engine.decode, 1)):
            first, *later = (timed_step(engine, step, form_start(form, model.config), width) for _ in range(3))
            found[f"{name}_{form}"] = first - min(later)
    return found


def form_start(form: str, config: PanguConfig) -> int:
    """A length of the cache from which a step has that form: attention selects once there is more than index_topk."""
    return config.index_topk if form == "sparse" else 0


def timed_step(engine, step, start: int, width: int = 1) -> float:
    """Seconds of one step of `width` tokens behind a context of `start`."""
    engine.cache.reserve(start + width)
    engine.cache.length[:] = start
    return timed(lambda: step(np.zeros((1, width), np.int32)))


def generation_rounds(model, prompt: list[int], arguments: argparse.Namespace) -> tuple[list, list]:
    """The last piece of each round, which holds the round's times, and with drafts the same without; a round before
    them warms up."""
    from pangu_ms import stream_generate

    found = {drafts: [] for drafts in (arguments.num_draft_tokens, 0)}
    for _ in range(1 + arguments.rounds):
        for drafts, pieces in found.items():
            *_, last = stream_generate(model, prompt, arguments.new_tokens, num_draft_tokens=drafts, eos_token_ids=())
            pieces.append(last)
    return found[arguments.num_draft_tokens][1:], found[0][1:] if arguments.num_draft_tokens else []


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


# ---------------------------------------------------------------- kernels

NODE = re.compile(r"^  %(\d+)\(.+?\) = (?:PrimFunc_)?(\w+)(.*)", re.MULTILINE)  # number, name, inputs
NODE_INPUT = re.compile(r"%(\d+)\b")
WEIGHT_INPUT = re.compile(r"%para\d+_(?:model\.|memory)")
TAIL_INPUT = re.compile(r"%para\d+_(?:model\.merge_mhc_module|model\.norm|lm_head)\.")
BOOKKEEPING = {"Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem"}


def count_kernels(ir: str) -> tuple[Counter, Counter]:
    """Kernels by name in the trunk's layers, and outside of them, of a graph as MindSpore saves it.

    The graph is the last one before execution, after fusion and the choice of kernels. Counted is every node that is
    launched, whether it computes or only moves: a Reshape costs a launch too. Not counted is what orders and names
    values and is never launched: Load, UpdateState, Depend, MakeTuple, TupleGetItem.

    In the layers is what depends on the model's weights or cache, up to the weights of the merge, the final norm and
    the head: the three kernels of the embedding, and those of the merge before its first weight, are among them.
    Outside is what all layers share (masks, slots, rotary angles). MindSpore's own record of where a node comes from
    does not serve: it gives every slice to the first cell that slices.
    """
    inside, outside = Counter(), Counter()
    stored, layer, tail = set(), set(), set()  # nodes that are a weight or cache; depend on one; depend on the tail's
    for number, name, inputs in NODE.findall(ir):
        before = set(NODE_INPUT.findall(inputs))
        in_layer = bool(WEIGHT_INPUT.search(inputs) or before & layer)
        in_tail = bool(TAIL_INPUT.search(inputs) or before & tail)
        if in_layer and not (name == "Shape" and before & stored):  # all masks depend on the capacity of the cache
            layer.add(number)
        if in_tail:
            tail.add(number)
        if name in BOOKKEEPING:
            stored |= {number} if in_layer and before <= stored else set()
        else:
            (inside if in_layer and not in_tail else outside)[name] += 1
    return inside, outside


def decode_kernels(directory: str, form: str, config: PanguConfig) -> dict:
    """Compiles the decode step in a process of its own, as saving graphs slows everything, and counts its kernels."""
    with tempfile.TemporaryDirectory(prefix="pangu_bench_") as graphs:
        # Of all the passes only the last: the others are a gigabyte.
        environment = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": graphs,
                       "MS_DEV_DUMP_IR_PASSES": "graph_build"}
        done = subprocess.run([sys.executable, __file__, directory, form], env=os.environ | environment,
                              capture_output=True, text=True)
        saved = [path.read_text() for path in Path(graphs).glob("graph_build_*.ir")]
    if done.returncode or not saved:
        raise PanguError(f"compiling the {form} decode step to count its kernels failed: {done.stderr[-2000:]}")
    counts = [count_kernels(ir) for ir in saved]
    inside, outside = (sum((count[i] for count in counts), Counter()) for i in (0, 1))
    return {"per_trunk_layer": inside.total() / config.num_hidden_layers, "outside": outside.total(),
            "in_layers": dict(inside.most_common())}


def compile_decode(directory: str, form: str) -> None:
    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.engine import Engine

    engine = Engine(PanguForCausalLM.from_pretrained(directory))
    timed_step(engine, engine.decode, form_start(form, engine.config))


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


if __name__ == "__main__":  # see decode_kernels
    compile_decode(*sys.argv[1:])
