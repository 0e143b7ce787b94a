"""How many operators a compiled decode step launches.

`python tools/bench_kernels.py DIR GRAPHS FORM ...` is the process in which `decode_kernels` compiles the step.
"""
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench_machine import timed
from pangu_ms.errors import PanguError

NODE = re.compile(r"^  %(\d+)\(.+?\) = (?:PrimFunc_)?(\w+)(.*)", re.MULTILINE)  # number, name, inputs
NODE_INPUT = re.compile(r"%(\d+)\b")
WEIGHT_INPUT = re.compile(r"%para\d+_(?:model\.|tensors)")
TAIL_INPUT = re.compile(r"%para\d+_(?:model\.merge_mhc_module|model\.norm|lm_head)\.")
ENVIRONMENT = {"MS_DEV_DUMP_IR_PASSES": "graph_build"}  # of all the passes only the last: the others are a gigabyte
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


def decode_kernels(directory: str, forms: Iterable[str], layers: int) -> dict[str, dict]:
    """The kernels of each form ("dense" or "sparse" attention) of the decode step, of a trunk of so many layers.

    Compiles in a process of its own, as saving graphs slows everything.
    """
    with tempfile.TemporaryDirectory(prefix="pangu_bench_") as graphs:
        done = subprocess.run([sys.executable, __file__, directory, graphs, *forms], env=os.environ | ENVIRONMENT,
                              capture_output=True, text=True)
        saved = {form: [path.read_text() for path in Path(graphs, form).rglob("graph_build_*.ir")] for form in forms}
    if done.returncode or not all(saved.values()):
        raise PanguError(f"compiling the decode step to count its kernels failed: {done.stderr[-2000:]}")
    found = {}
    for form, graphs in saved.items():
        counts = [count_kernels(ir) for ir in graphs]
        inside, outside = (sum((count[i] for count in counts), Counter()) for i in (0, 1))
        found[form] = {"per_trunk_layer": inside.total() / layers, "outside": outside.total(),
                       "in_layers": dict(inside.most_common())}
    return found


def compile_decode(directory: str, graphs: str, *forms: str) -> None:
    """Saves the graph of each form in a folder of its name."""
    import mindspore as ms

    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.engine import Engine

    model = PanguForCausalLM.from_pretrained(directory)
    for form in forms:
        engine = Engine(model)
        ms.set_context(save_graphs=1, save_graphs_path=os.path.join(graphs, form))
        timed_step(engine, engine.decode, form_start(form, model.plan))
        ms.set_context(save_graphs=0)


def form_start(form: str, plan) -> int:
    """A length of the cache from which a step has that form: attention selects once there is more than the topk."""
    return plan.indexer.topk if form == "sparse" else 0


def timed_step(engine, step, start: int, width: int = 1) -> float:
    """Seconds of one step of `width` tokens behind a context of `start`."""
    engine.cache.reserve(start + width)
    engine.cache.length[:] = start
    return timed(lambda: step(np.zeros((1, width), np.int32)))


if __name__ == "__main__":
    compile_decode(*sys.argv[1:])
