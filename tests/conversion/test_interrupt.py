"""A conversion that is killed, or finds the disk full, at any moment: nothing looks finished, nothing is lost."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from pangu_ms.conversion.command import main
from pangu_ms.conversion.journal import JOURNAL_FILE, Journal
from tests.checkpoint import generate

# Runs pangu-convert once for each pair (n, output) and kills it at its n-th write, flush, rename or removal; a write is
# cut in half. Each run is a fork of one process that has imported everything. With n = 0 it runs to its end and prints
# the kinds of all its steps.
KILLED = """
import json, os, signal, sys
from pangu_ms.conversion import command, write
runs, arguments = json.loads(sys.argv[1]), sys.argv[2:]

def counted(kind, call):
    def step(*given):
        kinds.append(kind)
        if len(kinds) == at:
            if kind == "write":
                given[0].write(given[1][:len(given[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given)
    return step

write.WRITERS = 1  # so that the n-th step is the same in every run
write._write_all = counted("write", write._write_all)
os.fsync = counted("flush", lambda file: None)  # slow, and a killed process loses nothing that the system has
os.rename, os.unlink = counted("rename", os.rename), counted("unlink", os.unlink)
for at, output in runs:
    kinds = []
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert status == (signal.SIGKILL if at else 0), (at, status)
    else:
        code = command.main(["hf2ms", arguments[0], output, *arguments[1:]])
        print("steps", *kinds, flush=True)
        os._exit(code)
"""
OPTIONS = ["--shard-size", "12KB"]


def run_killed(release, runs, *options):
    """hf2ms of a release for each (step to be killed at, output); the kinds of the steps of the run that is not."""
    runs = json.dumps([(at, str(output)) for at, output in runs])
    done = subprocess.run([sys.executable, "-c", KILLED, runs, release, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = re.search("^steps (.*)$", done.stdout, re.MULTILINE)
    return steps[1].split() if steps else None


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def release(data, tmp_path_factory):
    """Three shards, for reading alone."""
    config = generate.config(data, **generate.SMALL)
    return generate.write(tmp_path_factory.mktemp("interrupt") / "release", config, generate.tensors(config), 3)


@pytest.fixture(scope="module")
def whole(release):
    """(directory of a conversion that was not killed, kinds of its steps)"""
    directory = release.parent / "whole"
    return directory, run_killed(release, [(0, directory)], *OPTIONS)


def test_killed_at_any_moment(release, whole, tmp_path, monkeypatch):
    """At each step that is no write, and at some writes. The last is when the directory has its name, and a journal."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    expected = contents(whole[0])
    moments = [n for n, kind in enumerate(whole[1], 1) if kind != "write" or n % 10 == 2]
    targets = {n: tmp_path / f"killed_{n}" for n in moments}
    run_killed(release, targets.items(), *OPTIONS)
    for n, target in targets.items():
        if target.exists():  # killed after the last rename
            assert n >= len(whole[1]) - 1
            assert {name: raw for name, raw in contents(target).items() if not name.endswith("journal")} == expected
        assert main(["hf2ms", str(release), str(target), *OPTIONS]) == 0
        assert contents(target) == expected and not os.path.exists(f"{target}.partial")


def test_a_journal_goes_on_after_a_line_that_was_cut(tmp_path):
    for half in (b'{"sha', b'{"shard": 1}'):  # without its end of line even a whole one is not trusted
        with Journal(tmp_path, {"plan": "a"}) as journal:
            journal.record({"n": 1})
        with open(tmp_path / JOURNAL_FILE, "ab") as file:
            file.write(half)
        with Journal(tmp_path, {"plan": "a"}) as journal:
            assert journal.lines == [{"n": 1}] and not journal.fresh
            journal.record({"n": 2})
        with Journal(tmp_path, {"plan": "a"}) as journal:
            assert journal.lines[0] == {"n": 1} and journal.lines[-1] == {"n": 2}
        os.unlink(tmp_path / JOURNAL_FILE)


def test_goes_on_from_finished_shards_after_checking_them(release, whole, tmp_path, capsys):
    fourth = [n for n, kind in enumerate(whole[1], 1) if kind == "rename"][3]
    targets = {damaged: tmp_path / f"damaged_{damaged}" for damaged in (False, True)}
    run_killed(release, [(fourth, target) for target in targets.values()], *OPTIONS)
    for damaged, target in targets.items():
        shards = sorted(name for name in os.listdir(f"{target}.partial") if name.endswith(".safetensors"))
        assert len(shards) == 3
        if damaged:
            with open(f"{target}.partial/{shards[1]}", "r+b") as file:
                file.seek(-10, os.SEEK_END)
                file.write(b"\xff")
        assert main(["hf2ms", str(release), str(target), *OPTIONS]) == 0
        assert f"resumed: {2 if damaged else 3} shards" in capsys.readouterr().out
        assert contents(target) == contents(whole[0])


def test_another_command_does_not_go_on(release, tmp_path, capsys):
    target, source = tmp_path / "ms", tmp_path / "release"
    shutil.copytree(release, source)
    run_killed(source, [(20, target)], *OPTIONS)
    assert main(["hf2ms", str(source), str(target), "--shard-size", "13KB"]) == 2
    assert "is the beginning of another conversion" in capsys.readouterr().err
    os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))  # nor when the input is another than it was
    assert main(["hf2ms", str(source), str(target), *OPTIONS]) == 2
    assert "is the beginning of another conversion" in capsys.readouterr().err


def test_two_at_once(release, tmp_path, capsys):
    os.mkdir(tmp_path / "ms.partial")
    with Journal(tmp_path / "ms.partial", {"plan": "of the other process"}):
        assert main(["hf2ms", str(release), str(tmp_path / "ms")]) == 2
    assert "another pangu-convert is writing it" in capsys.readouterr().err


def test_disk_full(release, whole, tmp_path):
    """A limit on file sizes stands in for the full disk: the system refuses to write on, in the middle of a shard."""
    script = ("import resource, sys; from pangu_ms.conversion.command import main\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); sys.exit(main(sys.argv[1:]))")
    full = subprocess.run([sys.executable, "-c", script, "hf2ms", release, tmp_path / "ms", *OPTIONS],
                          capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.count("\n") == 1
    assert "writing failed: File too large; the finished shards are kept" in full.stderr
    assert not (tmp_path / "ms").exists()
    assert main(["hf2ms", str(release), str(tmp_path / "ms"), *OPTIONS]) == 0
    assert contents(tmp_path / "ms") == contents(whole[0])


def test_a_planted_link_is_not_written_through(release, whole, tmp_path, capsys):
    run_killed(release, [(whole[1].index("rename") + 5, tmp_path / "ms")], *OPTIONS)
    unfinished, = (tmp_path / "ms.partial").glob("*.tmp")
    unfinished.unlink()
    (tmp_path / "thesis.txt").write_text("years of work")
    unfinished.symlink_to(tmp_path / "thesis.txt")
    assert main(["hf2ms", str(release), str(tmp_path / "ms"), *OPTIONS]) == 2
    assert "is a symbolic link, which no conversion leaves there" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new.partial").symlink_to(tmp_path / "elsewhere")
    assert main(["hf2ms", str(release), str(tmp_path / "new"), *OPTIONS]) == 2
    assert not list((tmp_path / "elsewhere").iterdir())
