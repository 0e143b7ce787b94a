"""A model on several ranks against the same model in one process."""
import functools
import time
from pathlib import Path

import numpy as np
import pytest

from pangu_ms.architectures import read_config
from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.estimate.memory import weight_bytes
from pangu_ms.estimate.work import Case, Work
from pangu_ms.parallel.ranks import Ranks
from tests.parallel import worker
from tests.parallel.conftest import LARGE

WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def whole(checkpoint):
    """whole(what): what `worker` computes in one process; of memory, what the estimate says of each of four."""
    def compute(what):
        if what == "memory":
            return {"memory": sum(weight_bytes(Case(LARGE, Ranks(2, 2), Work("infer", 1, 1, "float32"))).values())}
        return getattr(worker, what)(checkpoint, None)
    return functools.cache(compute)


@pytest.fixture(scope="module")
def ranks(checkpoint, msrun, tmp_path_factory):
    """ranks(sizes, *what): the same of each rank."""
    def run(sizes, *what):
        output, count = tmp_path_factory.mktemp("output"), np.prod(sizes)
        code, printed, _ = msrun(count, WORKER, checkpoint, *sizes, output, *what)
        assert code == 0, printed[-3000:]
        return [dict(np.load(output / f"{rank}.npz")) for rank in range(count)]
    return run


WHAT = {(2, 1, 1): ("drafting",), (1, 2, 1): ("drafting",), (1, 1, 2): ("train",),
        (2, 2, 1): ("memory", "train")}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", WHAT, ids=["tensor", "expert", "data", "tensor and expert"])
def test_ranks_together_are_one_process(sizes, whole, ranks, checkpoint):
    known, places = parameters(read_config(checkpoint)), Ranks(*sizes[:2])
    wanted = {name: values for what in WHAT[sizes] for name, values in whole(what).items()}
    for rank, found in enumerate(ranks(sizes, *WHAT[sizes])):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            kind, _, of = name.partition(" ")
            part = values
            if of:
                tensor = known[of.removeprefix("muon.").removeprefix("adam_m.")]
                part = sliced(tensor, places.at(rank % places.count)).view(values)
            if of or name.endswith("logits"):
                off = abs(found[name] - part).max() / max(abs(values).max(), 1e-20)
                assert off < (1e-2 if kind == "state" else 2e-5), f"{name}: {off:.1e}"
        if "memory" in wanted:
            assert found["memory"] == pytest.approx(wanted["memory"], rel=0.1)
        for name, tolerance in (("tokens", 0), ("parts", 2e-5), ("losses", 1e-4), ("norms", 1e-3)):
            if name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=tolerance, err_msg=name)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(msrun, tmp_path, monkeypatch):
    monkeypatch.setenv("MS_NODE_TIMEOUT", "10")                                 # of the scheduler, which ends last: 30
    code, printed, _ = msrun(2, WORKER.with_name("killed.py"), tmp_path / "pid")
    assert code != 0 and time.time() - (tmp_path / "pid").stat().st_mtime < 30
    assert f"Worker process {(tmp_path / 'pid').read_text()} exit with exception. Error code: -9" in printed


@pytest.mark.slow
def test_the_command_prints_once(checkpoint, msrun):
    arguments = ["--model", checkpoint, "--token-ids", "5,6,7", "--max-new-tokens", "1", "--json"]
    code, printed, logs = msrun(2, WORKER.parents[2] / "tools" / "generate.py", *arguments, "--tensor-parallel", "2")
    assert code == 0, printed[-3000:]
    assert [(logs / f"worker_{rank}.log").read_text().count('{"token_ids": [') for rank in (0, 1)] == [1, 0]
