"""Counts the kernels of a compiled step: on a CPU as on an NPU each costs microseconds to launch, whatever it computes.

What counts is every node of the graph that MindSpore runs, bookkeeping apart: nodes that load a parameter, order side
effects, make or take apart tuples, or compute a shape on the host launch nothing. Reshapes count: on a CPU each is a
launch. "per layer" is the count of the whole step, embedding and head included, over the number of trunk layers.
"""
import argparse
import collections
import json
import os
import re
import sys
import tempfile
from pathlib import Path

EXAMPLE = """example:
  python tools/kernel_count.py --model tests/data/tiny --decode
"""
BOOKKEEPING = {"Load", "UpdateState", "Depend", "Return", "MakeTuple", "TupleGetItem", "RealMakeTuple",
               "RealTupleGetItem", "ShapeCalc", "Shape", "TensorToScalar", "ScalarToTensor", "ScalarFloorDiv"}
NODE = re.compile(r"^ +%\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(", re.MULTILINE)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="kernel_count.py", description=__doc__, epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--decode", action="store_true", help="the step of one token (default)")
    form.add_argument("--prefill", action="store_true", help="the step of many tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only, unless the user wants more
    os.environ["MS_DEV_DUMP_IR_PASSES"] = "graph_build"  # of all passes the last, the graph that runs
    found = count(arguments.model, arguments.prefill)
    print(json.dumps(found) if arguments.json else report(found))
    return 0


def count(directory, prefill):
    """-> {"kernels", "layers", "per_layer", "by_kind"}; compiles the step of that checkpoint for one sequence."""
    import mindspore as ms
    import numpy as np

    from pangu_ms import PanguForCausalLM
    from pangu_ms.generation.engine import Engine

    model = PanguForCausalLM.from_pretrained(directory)
    engine = Engine(model)
    with tempfile.TemporaryDirectory() as folder:
        ms.set_context(save_graphs=1, save_graphs_path=folder)
        ids = np.zeros((1, 2 if prefill else 1), np.int32)
        engine.prefill(ids) if prefill else engine.decode(ids)
        ms.set_context(save_graphs=0)
        graph = max(Path(folder).glob("graph_build*.ir"), key=lambda path: path.stat().st_size)
        kinds = collections.Counter(NODE.findall(graph.read_text()))
    kinds = {kind: n for kind, n in kinds.most_common() if kind not in BOOKKEEPING}
    total, layers = sum(kinds.values()), model.config.num_hidden_layers
    return {"kernels": total, "layers": layers, "per_layer": total / layers, "by_kind": kinds}


def report(found):
    lines = [f"{n:6d}  {kind}" for kind, n in found["by_kind"].items()]
    return "\n".join(lines + [f"{found['kernels']} kernels, {found['layers']} trunk layers: "
                              f"{found['per_layer']:.1f} per layer"])


if __name__ == "__main__":
    sys.exit(main())
