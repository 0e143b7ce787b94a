"""The toy's corpora, from a library of a few files."""
import json
import re
from pathlib import Path

import pytest
from toy_corpus import CAPITALS, Questions, held_out, library_files, write_corpus

SOURCES = {
    "json/__init__.py": "def dumps(obj, *, indent=None):\n    pass\n\ndef loads(text):\n    pass\n\n"
                        "def _own():\n    pass\n",
    "textwrap.py": "def indent(text, prefix):\n    pass\n\nclass Wrapper:\n    def wrap(self):\n        pass\n",
    "shlex.py": "def join(words):\n    pass\n", "os.py": "def join(a, b):\n    pass\n",
    "empty.py": "\n", "latin.py": b"# coding: latin-1\nname = '\xe9'\n",
    "test/test_json.py": "left = out\n", "encodings/cp437.py": "left = out\n", "pydoc_data/topics.py": "left = out\n",
    "site-packages/numpy/core.py": "left = out\n", "_sysconfigdata__linux.py": "left = out\n",
    "config-3.11-x86/python-config.py": "left = out\n"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lib")
    for name, source in SOURCES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    return directory


def read(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_only_the_library_itself_is_read(library):
    files = dict(library_files(library))
    assert list(files) == ["json/__init__.py", "latin.py", "os.py", "shlex.py", "textwrap.py"]
    assert files["latin.py"].endswith("name = 'é'\n")
    assert files["json/__init__.py"] == SOURCES["json/__init__.py"]


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_right(library, seed):
    """Each kind of question comes, and its answer is worked out here in another way."""
    questions, kinds = Questions(library_files(library), seed), set()
    calls = {"dumps": "`json.dumps(obj)`", "loads": "`json.loads(text)`", "indent": "`textwrap.indent(text, prefix)`"}
    for _ in range(500):
        chat = questions.chat()
        turns = [message for message in chat["messages"] if message["role"] != "system"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for question, reply in zip(turns[::2], turns[1::2]):
            asked, answer = question["content"], reply["content"]
            assert ("reasoning_content" in reply) == chat["thinking"]
            if "capital" in asked:
                kinds.add("capital")
                country = re.search(r"capital of (\w+)", asked)[1]
                assert answer == CAPITALS[country] + "."
            elif numbers := re.findall(r"\d", asked):
                a, b = map(int, numbers)
                kinds.add("sum" if re.search(r"\+|plus|Add", asked) else "product")
                assert int(answer) == (a + b if re.search(r"\+|plus|Add", asked) else a * b)
                if chat["thinking"] and b:
                    assert reply["reasoning_content"].endswith(f" {answer}.")
            elif "`" in asked:
                kinds.add("module" if "module" in answer else "arguments")
                name = re.search(r"`(?:\w+\.)?(\w+)`", asked)[1]
                module = "textwrap" if name == "indent" else "json"
                assert answer in (calls[name], f"`{name}` is in the module `{module}`.")
            else:
                kinds.add("backwards")
                assert answer[::-1] in re.findall(r"'(\w+)'", asked)
    assert kinds == {"capital", "sum", "product", "module", "arguments", "backwards"}


def test_the_files_are_the_same_wherever_they_are_written(library, tmp_path):
    lines = write_corpus(tmp_path / "one", library, chats=300)
    assert write_corpus(tmp_path / "two", library, chats=300) == lines
    for name, count in lines.items():
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert len(read(tmp_path / "one" / name)) == count
    documents = read(tmp_path / "one" / "pretrain.jsonl") + read(tmp_path / "one" / "heldout.jsonl")
    assert sorted((document["id"], document["text"]) for document in documents) == library_files(library)


def test_no_held_out_question_is_trained_on(library, tmp_path):
    write_corpus(tmp_path, library, chats=1000)
    trained, tried = [{message["content"] for chat in read(tmp_path / f"{name}.jsonl")
                       for message in chat.get("messages", ()) if message["role"] == "user"}  # the others are texts
                      for name in ("chats", "chats_heldout")]
    assert trained and tried and not trained & tried
    chats = [record for record in read(tmp_path / "chats.jsonl") if "messages" in record]
    assert len({json.dumps(chat["messages"]) + str(chat["thinking"]) for chat in chats}) == len(chats)


def test_the_share_that_is_held_out():
    kept_out = sum(held_out(f"file {i}", 2) for i in range(10000))
    assert 150 < kept_out < 250
