"""A model on several ranks against the same model in one process."""
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


# Folder of the checkpoint, ranks, what they compute.
CASES = {"tensor and expert": ("", (2, 2, 1), ("memory", "train", "drafting")),
         "grouped queries": ("grouped", (2, 1, 1), ("grouped",)), "grouped experts": ("mixed", (1, 2, 1), ("grouped",)),
         "fused": ("fused", (2, 1, 1), ("train", "drafting")), "latent": ("latent", (2, 1, 1), ("train", "drafting"))}


def whole(what, checkpoint):
    """What `worker` computes, in one process; of memory, what the estimate says of each of four."""
    if what == "memory":
        return {"memory": sum(weight_bytes(Case(LARGE, Ranks(2, 2), Work("infer", 1, 1, "float32"))).values())}
    return getattr(worker, what)(checkpoint, None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_process(checkpoint, msrun, tmp_path, case):
    """Data parallel runs are in tests/test_documented_commands.py."""
    folder, sizes, computed = CASES[case]
    checkpoint = checkpoint / folder
    code, printed, _ = msrun(np.prod(sizes), WORKER, checkpoint, *sizes, tmp_path, *computed)
    assert code == 0, printed[-3000:]
    known = parameters(read_config(checkpoint))
    places = Ranks(*sizes[:2])
    wanted = {name: values for what in computed for name, values in whole(what, checkpoint).items()}
    for rank in range(places.count):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            kind, _, of = name.partition(" ")
            part = values
            if of:
                tensor = known[of.removeprefix("muon.").removeprefix("adam_m.")]
                part = sliced(tensor, places.at(rank)).part_of(values)
            if of or name.endswith("logits"):
                off = abs(found[name] - part).max() / max(abs(values).max(), 1e-20)
                assert off < (1e-2 if kind == "state" else 2e-5), f"{name}: {off:.1e}"
        if "memory" in wanted:
            assert found["memory"] == pytest.approx(wanted["memory"], rel=0.1)
        for name, tolerance in (("tokens", 0), ("parts", 2e-5), ("squares", 1e-3), ("losses", 1e-4), ("norms", 1e-3),
                                ("largest", 1e-3)):
            if name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=tolerance, err_msg=name)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(msrun, tmp_path, monkeypatch):
    monkeypatch.setenv("MS_NODE_TIMEOUT", "10")                                 # of the scheduler, which ends last: 30
    code, printed, _ = msrun(2, WORKER.with_name("killed.py"), tmp_path / "pid")
    assert code != 0 and time.time() - (tmp_path / "pid").stat().st_mtime < 30
    assert f"Worker process {(tmp_path / 'pid').read_text()} exit with exception. Error code: -9" in printed
