"""A model on several ranks against the same model in one process."""
import functools
import time
from pathlib import Path

import numpy as np
import pytest

from pangu_ms.checkpoint.convert import main
from pangu_ms.checkpoint.layout import Grid, cut, sliced
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.checkpoint.names import parameters
from pangu_ms.config import PanguConfig
from pangu_ms.errors import ConfigError
from pangu_ms.estimate import work as estimate
from pangu_ms.estimate.memory import weight_bytes
from pangu_ms.estimate.work import Work
from pangu_ms.model.parallel import Parallel
from tests.parallel import worker
from tests.parallel.conftest import LARGE

WORKER = Path(worker.__file__)


def test_ranks_count_tensor_first_then_expert_then_data():
    places = [Parallel(2, 3, 2, rank=rank) for rank in range(12)]
    assert [place.tensor_rank for place in places] == [0, 1] * 6
    assert [place.expert_rank for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place.model_rank for place in places] == list(range(6)) * 2


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="tensor parallel 3 .*num_attention_heads 4.*take one of 1, 2, 4$"):
        Parallel(tensor=3).check(PanguConfig.flash_92b(num_attention_heads=4, vocab_size=96))
    with pytest.raises(ConfigError, match="expert parallel 7 .*n_routed_experts 256"):
        Parallel(expert=7).check(PanguConfig.flash_92b())
    Parallel(tensor=8, expert=16).check(PanguConfig.flash_92b())


def test_a_wrong_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(ConfigError, match="makes 4 processes, and this run has 2: start it by msrun --worker_num=4"):
        Parallel(tensor=2, expert=2).start()
    with pytest.raises(ConfigError, match="tensor parallel is 0"):
        Parallel(tensor=0)


@pytest.fixture(scope="module")
def whole(checkpoint):
    """whole(what): what `worker` computes in one process; of memory, what the estimate says of each of four."""
    def compute(what):
        if what == "memory":
            sizes = weight_bytes(LARGE, estimate.Parallel(1, 2, 2), Work("infer", 1, 1, "float32"))
            return {"memory": sum(sizes.values())}
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
    known, grid = parameters(PanguConfig.from_pretrained(checkpoint)), Grid(*sizes[:2])
    wanted = {name: values for what in WHAT[sizes] for name, values in whole(what).items()}
    for rank, found in enumerate(ranks(sizes, *WHAT[sizes])):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            kind, _, of = name.partition(" ")
            part = cut(values, sliced(known[of.removeprefix("muon.").removeprefix("adam_m.")], grid,
                                      rank % grid.ranks)) if of else values
            if of or name.endswith("logits"):
                off = abs(found[name] - part).max() / max(abs(values).max(), 1e-20)
                assert off < (1e-2 if kind == "state" else 2e-5), f"{name}: {off:.1e}"
        if "memory" in wanted:
            assert found["memory"] == pytest.approx(wanted["memory"], rel=0.1)
        for name, tolerance in (("tokens", 0), ("parts", 2e-5), ("losses", 1e-4), ("norms", 1e-3)):
            if name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=tolerance, err_msg=name)


def test_a_rank_reads_its_part_of_any_layout(checkpoint, tmp_path):
    """A whole directory, one that is cut otherwise, and its own rank of one cut so, of which it opens nothing else."""
    config, grid = PanguConfig.from_pretrained(checkpoint), Grid(2, 2)
    whole = dict(read_parameters(checkpoint, config))
    for tensor, expert in ((2, 2), (4, 1)):
        main(["hf2ms", str(checkpoint), str(tmp_path / f"{tensor}{expert}"), "--tensor-parallel", str(tensor),
              "--expert-parallel", str(expert)])
    for directory in (checkpoint, tmp_path / "22", tmp_path / "41"):
        for rank in range(4):
            for name, values in read_parameters(directory, config, grid=grid, rank=rank):
                np.testing.assert_array_equal(values, cut(whole[name], sliced(parameters(config)[name], grid, rank)))
    (tmp_path / "22" / "rank_0" / "model.safetensors").unlink()
    assert len(list(read_parameters(tmp_path / "22", config, grid=grid, rank=3))) == len(whole)


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
