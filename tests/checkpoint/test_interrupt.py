"""A conversion that is killed, or finds the disk full, at any moment: nothing looks finished, nothing is lost."""
import os
import random
import re
import signal
import subprocess
import sys

import pytest

from pangu_ms.checkpoint.convert import main
from pangu_ms.checkpoint.journal import JOURNAL_FILE, Journal
from tests.checkpoint import generate

# Runs pangu-convert and kills it at the n-th write, flush, rename or removal; a write is cut in half. Prints how many
# of them a whole run makes, and their kinds.
KILLED = """
import os, signal, sys
from pangu_ms.checkpoint import convert, write
at, kinds = int(sys.argv[1]), []

def counted(kind, call):
    def step(*arguments):
        kinds.append(kind)
        if len(kinds) == at:
            if kind == "write":
                arguments[0].write(arguments[1][:len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return step

write.WRITERS = 1  # so that the n-th step is the same in every run
write._write_all = counted("write", write._write_all)
os.fsync, os.rename, os.unlink = counted("flush", os.fsync), counted("rename", os.rename), counted("unlink", os.unlink)
code = convert.main(sys.argv[2:])
print("steps", *kinds)
sys.exit(code)
"""


def run_killed(at, *arguments):
    return subprocess.run([sys.executable, "-c", KILLED, str(at), *map(str, arguments)], capture_output=True, text=True)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def release(data, tmp_path):
    config = generate.config(data)
    return generate.write(tmp_path / "release", config, generate.tensors(config), 3)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(release, tmp_path, seed):
    options = ["--shard-size", "100KB"]
    whole = run_killed(0, "hf2ms", release, tmp_path / "whole", *options)
    steps = re.search("^steps (.*)$", whole.stdout, re.MULTILINE)[1].split()
    expected = contents(tmp_path / "whole")
    moments = {1, 2, len(steps), *(i + d for i, kind in enumerate(steps, 1) if kind == "rename" for d in (0, 1))}
    chosen = random.Random(seed).sample(sorted(moments), 5) + random.Random(seed).sample(range(1, len(steps)), 4)
    for at in {*chosen, len(steps)}:  # the last one is when the directory has its name but keeps the journal
        target = tmp_path / f"killed_{at}"
        assert run_killed(at, "hf2ms", release, target, *options).returncode == -signal.SIGKILL
        if target.exists():  # killed after the last rename
            assert {name: raw for name, raw in contents(target).items() if not name.endswith("journal")} == expected
        assert main(["hf2ms", str(release), str(target), *options]) == 0
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


def test_goes_on_from_finished_shards_after_checking_them(release, tmp_path, capsys):
    options = ["--shard-size", "100KB"]
    steps = run_killed(0, "hf2ms", release, tmp_path / "whole", *options).stdout.split("steps ")[1].split()
    third = [i for i, kind in enumerate(steps, 1) if kind == "rename"][3]
    for damaged in (False, True):
        target = tmp_path / f"damaged_{damaged}"
        run_killed(third, "hf2ms", release, target, *options)
        shards = sorted(name for name in os.listdir(f"{target}.partial") if name.endswith(".safetensors"))
        assert len(shards) == 3
        if damaged:
            with open(f"{target}.partial/{shards[1]}", "r+b") as file:
                file.seek(-10, os.SEEK_END)
                file.write(b"\xff")
        assert main(["hf2ms", str(release), str(target), *options]) == 0
        assert f"resumed: {2 if damaged else 3} shards" in capsys.readouterr().out
        assert contents(target) == contents(tmp_path / "whole")


def test_another_command_does_not_go_on(release, tmp_path, capsys):
    target = tmp_path / "ms"
    run_killed(20, "hf2ms", release, target, "--shard-size", "100KB")
    assert main(["hf2ms", str(release), str(target), "--shard-size", "120KB"]) == 2
    assert "is the beginning of another conversion" in capsys.readouterr().err
    path = release / "model-00001-of-00003.safetensors"
    os.utime(path, ns=(1, 1))  # nor when the input is another than it was
    assert main(["hf2ms", str(release), str(target), "--shard-size", "100KB"]) == 2
    assert "is the beginning of another conversion" in capsys.readouterr().err


def test_two_at_once(release, tmp_path, capsys):
    os.mkdir(tmp_path / "ms.partial")
    with Journal(tmp_path / "ms.partial", {"plan": "of the other process"}):
        assert main(["hf2ms", str(release), str(tmp_path / "ms")]) == 2
    assert "another pangu-convert is writing it" in capsys.readouterr().err


def test_disk_full(release, tmp_path):
    """A limit on file sizes stands in for the full disk: the system refuses to write on, in the middle of a shard."""
    script = ("import resource, sys; from pangu_ms.checkpoint.convert import main\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); sys.exit(main(sys.argv[1:]))")
    options = ["--shard-size", "160KB"]
    full = subprocess.run([sys.executable, "-c", script, "hf2ms", release, tmp_path / "ms", *options],
                          capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.count("\n") == 1
    assert "writing failed: File too large; the finished shards are kept" in full.stderr
    assert not (tmp_path / "ms").exists()
    assert main(["hf2ms", str(release), str(tmp_path / "ms"), *options]) == 0
    assert main(["hf2ms", str(release), str(tmp_path / "whole"), *options]) == 0
    assert contents(tmp_path / "ms") == contents(tmp_path / "whole")


def test_a_planted_link_is_not_written_through(release, tmp_path, capsys):
    options = ["--shard-size", "100KB"]
    steps = run_killed(0, "hf2ms", release, tmp_path / "whole", *options).stdout.split("steps ")[1].split()
    run_killed(steps.index("rename") + 5, "hf2ms", release, tmp_path / "ms", *options)
    unfinished, = (tmp_path / "ms.partial").glob("*.tmp")
    unfinished.unlink()
    (tmp_path / "thesis.txt").write_text("years of work")
    unfinished.symlink_to(tmp_path / "thesis.txt")
    assert main(["hf2ms", str(release), str(tmp_path / "ms"), *options]) == 2
    assert "is a symbolic link, which no conversion leaves there" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new.partial").symlink_to(tmp_path / "elsewhere")
    assert main(["hf2ms", str(release), str(tmp_path / "new"), *options]) == 2
    assert not list((tmp_path / "elsewhere").iterdir())
