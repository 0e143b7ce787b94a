"""tools/tokenize_corpus.py: what training reads is what it would have made of the files, whatever interrupts it."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
import tokenize_corpus
from pyarrow import parquet
from toy_tokenizer import train_tokenizer

from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data import corpus, shards
from pangu_ms.training.data.chats import read_chats
from pangu_ms.training.data.documents import read_texts
from pangu_ms.training.data.indexed import read_indexed
from pangu_ms.training.data.packing import PackedDataset

TEXTS = [{"id": f"n{i}", "text": f"the {i} é\n" * (i % 7)} for i in range(60)]
CHATS = [{"thinking": bool(i % 2), "messages": [
    {"role": "user", "content": "the 1?" * (i % 3 + 1)},
    {"role": "assistant", "content": "Lima"} | ({"reasoning_content": "why"} if i % 2 else {}),
    {"role": "user", "content": f"{i}?"},
    {"role": "assistant", "content": "Peru 7"} | ({"reasoning_content": "so"} if i % 2 else {})]}
    for i in range(20)] + [{"text": "the user, the assistant"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the capital of Peru is Lima, the user, the assistant, the system"], 284, directory)
    return str(directory)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 300)


@pytest.fixture
def one_process(monkeypatch):
    """Shards are tokenized in this process."""
    def tokenize(pending, settings, number_type, workers, bar):
        context = multiprocessing.get_context("spawn")
        corpus._tokenize_shard.process = (corpus.ENCODERS[settings.documents](Tokenizer(settings.tokenizer)), settings,
                                          context.Event(), context.Value("d", 0.0))
        for base, shard in pending.items():
            corpus._tokenize_shard(base, shard, number_type)
    monkeypatch.setattr(corpus, "_tokenize", tokenize)


@pytest.fixture
def run(tokenizer, tmp_path, capsys):
    """run(*files, options): (exit code, what was printed, what was complained of), of a corpus c."""
    def call(*files, options=()):
        code = tokenize_corpus.main([*map(str, files), "--tokenizer", tokenizer, "--output", str(tmp_path / "c"),
                                     *options])
        return code, *capsys.readouterr()
    return call


def jsonl(path, records):
    path.write_bytes(b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n"
                              for each in records))
    return path


def equal(one, other):
    """Whether two sets of documents are packed into the same sequences, for an epoch and a half."""
    one, other = (PackedDataset(documents, 64, seed=3) for documents in (one, other))
    assert len(one) == len(other) > 5
    for n in range(len(one) * 3 // 2):
        for a, b in zip(one[n], other[n], strict=True):
            assert a.dtype == b.dtype and (a == b).all()


@pytest.mark.parametrize("kind, records, read", [("texts", TEXTS, read_texts), ("chats", CHATS, read_chats)])
def test_two_processes_give_the_sequences_of_the_jsonl_file(run, tokenizer, tmp_path, kind, records, read):
    path = jsonl(tmp_path / "lines.jsonl", [records[0], b"", *records[1:], b" "])
    code, printed, _ = run(path, options=["--workers", "2", "--documents", kind])
    assert code == 0 and sorted(each.suffix for each in tmp_path.glob("c*")) == \
        [".bin", ".idx", *([".mask"] if kind == "chats" else [])]
    wanted = read(path, Tokenizer(tokenizer))
    found = read_indexed(str(tmp_path / "c"), kind, wanted.pad_id)
    assert (found.ids == wanted.ids).all() and (found.counted == wanted.counted).all() and found.ids.dtype == np.uint16
    assert (found.offsets == wanted.offsets).all() and found.may_be_cut == wanted.may_be_cut
    equal(found, wanted)
    assert printed.splitlines()[-1].startswith(f"{tmp_path / 'c'}: {len(wanted)} documents, {len(wanted.ids):,} tokens")
    assert ("left out: 9 empty texts" in printed) == (kind == "texts")


KILLED = """
import sys
from pangu_ms.training.data import shards
from tokenize_corpus import main
shards.SHARD_BYTES = 50000
if __name__ == "__main__":
    sys.exit(main())
"""


def test_what_was_killed_goes_on(tokenizer, tmp_path):
    """Between its shards and while it joins them; then the corpus is as if nothing had happened."""
    path, prefix = jsonl(tmp_path / "lines.jsonl", [{"text": "the capital " * 4000}] * 24), tmp_path / "c"
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(output):
        return subprocess.Popen([sys.executable, program, path, "--tokenizer", tokenizer, "--output", output,
                                 "--workers", "2"], env=environment, stdout=subprocess.PIPE, text=True)
    process = start(prefix)
    while process.poll() is None and len(list(tmp_path.glob("c.shards/*.lengths"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("c.*.bin")) and not (tmp_path / "c.idx").exists()
    (tmp_path / "c.bin.partial").write_bytes(b"cut off")
    (tmp_path / "c.bin").write_bytes(b"of a run that was killed before its index had its name")
    process = start(prefix)
    printed, _ = process.communicate()
    assert process.returncode == 0 and printed.startswith("resumed: ") and not list(tmp_path.glob("c*.*.*"))
    documents = read_indexed(str(prefix), "texts", 0)
    one = Tokenizer(tokenizer).encode_batch(["the capital " * 4000])[0]
    assert (documents.ids.reshape(24, -1) == [276, *one, 277]).all()


def test_a_broken_line_is_named_by_its_number_in_the_file(one_process, run, tmp_path):
    """The second file, and of it a late shard; then with the file mended, and with the line left out."""
    good = jsonl(tmp_path / "good.jsonl", TEXTS)
    lines = [*TEXTS[:40], b"{", *TEXTS[40:50], {"text": 7}, *TEXTS[50:]]
    path = jsonl(tmp_path / "lines.jsonl", lines)
    code, _, complaint = run(good, path)
    assert code == 2 and complaint == (
        f"tokenize_corpus: error: {path}:41: not JSON (Expecting property name enclosed in double quotes: line 2 "
        "column 1 (char 2)): mend the line or remove it\n")
    jsonl(path, [line for line in lines if line != b"{"])
    assert run(good, path)[2] == f'tokenize_corpus: error: {path}:51: "text" is a number: wanted text\n'
    jsonl(path, lines)
    code, printed, _ = run(path, options=["--skip-broken"])
    assert code == 0 and f"left out: 2 broken lines, the first of them {path}:41: not JSON" in printed
    assert len(read_indexed(str(tmp_path / "c"), "texts", 0)) == 51


def test_every_line_is_in_one_shard_and_has_its_number(tmp_path):
    """Wherever a shard begins: within a line, at its first byte, at the end of it."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content := b"one\n\ntwo\nthree")
    for begin in range(len(content) + 1):
        parts = [shards.JsonlShard(str(path), 0, begin), shards.JsonlShard(str(path), begin, len(content))]
        first, second = ([line for _, line in part.records()] for part in parts)
        assert b"".join(first + second) == content and parts[0].lines_before() == 0
        assert parts[1].lines_before() == len(first)


def test_shards_of_a_file_that_did_not_change_are_kept(one_process, run, tmp_path, monkeypatch):
    good, other = jsonl(tmp_path / "good.jsonl", TEXTS), jsonl(tmp_path / "other.jsonl", [*TEXTS, b"{"])
    assert run(good, other)[0] == 2
    jsonl(other, TEXTS[:1] + TEXTS)
    code, printed, _ = run(good, other)
    kept = len(shards.find_shards(str(good)))
    assert code == 0 and printed.startswith(f"resumed: {kept} of ") and len(read_indexed(str(tmp_path / "c"), "texts",
                                                                                        0)) == 102


@pytest.mark.parametrize("kind, records", [("texts", TEXTS), ("chats", CHATS)])
def test_parquet_holds_what_jsonl_does(one_process, run, tmp_path, kind, records):
    """Rows that lack what others have hold nulls."""
    options = ["--documents", kind]
    assert run(jsonl(tmp_path / "lines.jsonl", records), options=options)[0] == 0
    wanted = {path.name: path.read_bytes() for path in tmp_path.glob("c.*")}
    for path in tmp_path.glob("c.*"):
        path.unlink()
    parquet.write_table(pyarrow.Table.from_pylist(records, pyarrow.schema(
        [("id", pyarrow.string()), ("text", pyarrow.string()), ("thinking", pyarrow.bool_()),
         ("messages", pyarrow.list_(pyarrow.struct([(name, pyarrow.string()) for name in
                                                    ("role", "content", "reasoning_content")])))])),
                        tmp_path / "rows.parquet", row_group_size=7)
    assert len(shards.find_shards(str(tmp_path / "rows.parquet"))) > 1
    assert run(tmp_path / "rows.parquet", options=options)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("c.*")} == wanted


def test_a_broken_row_is_named(one_process, run, tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"a" * 400] * 8 + [b"\xff", None], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    assert run(path)[2] == f"tokenize_corpus: error: {path}:9: not UTF-8 (invalid start byte): convert the file\n"
    code, printed, _ = run(path, options=["--skip-broken"])
    assert code == 0 and f"left out: 2 broken lines, the first of them {path}:9: not UTF-8" in printed


@pytest.mark.parametrize("prepare, files, message", [
    (lambda path: None, ["none.jsonl"], "none.jsonl: cannot be read (No such file or directory): check the path"),
    (lambda path: (path / "c.idx").touch(), ["a.jsonl"], "c.idx: is there already: remove it, or choose another"),
    (lambda path: (path / "c.mask").touch(), ["a.jsonl"], "c.mask: is there already: remove it, or choose another"),
    (lambda path: (path / "a.jsonl").write_text("\n"), ["a.jsonl"], "a.jsonl: holds no document, as all files here"),
    (lambda path: (path / "a.jsonl").write_text(""), ["a.jsonl"], "a.jsonl: holds no document, as all files here"),
    (lambda path: (path / "a.parquet").write_text("PAR1 and more PAR1"), ["a.parquet"], "cannot be read as parquet ("),
    (lambda path: parquet.write_table(pyarrow.table({"body": ["a"]}), path / "a.parquet"), ["a.parquet"],
     "a.parquet: has the columns body: wanted text, or messages"),
])
def test_what_cannot_be_is_one_line(one_process, run, tmp_path, prepare, files, message):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(tmp_path)
    code, _, complaint = run(*(tmp_path / name for name in files))
    assert code == 2 and message in complaint and complaint.count("\n") == 1


def test_parquet_without_pyarrow(run, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow, which is not installed: pip install pangu_ms[data], or bring JSONL\n" in \
        run(tmp_path / "a.parquet")[2]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        tokenize_corpus.main(["--help"])
    assert "python tools/tokenize_corpus.py" in capsys.readouterr().out
