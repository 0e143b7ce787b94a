"""Nothing here opens a connection: what is not on this machine is an error at once."""
import ast
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pangu_ms
import pangu_ms.generation.command
import pangu_ms.training.run.command
from pangu_ms.errors import PanguError
from pangu_ms.text.chat_template import ChatTemplate
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data.chats import read_chats
from pangu_ms.training.data.documents import read_texts
from tests.text.byte_tokenizer import save_tokenizer

PACKAGE = Path(pangu_ms.__file__).parent
HUB = "Qwen/Qwen3-8B"  # what a model hub would know
# They fetch, each by a call that looks as if it read a file.
FETCHING = {"transformers", "huggingface_hub", "datasets", "modelscope", "openmind_hub", "requests", "urllib",
            "urllib3", "http", "httpx", "aiohttp"}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Any attempt at a connection, or at the address of a host, fails the test; nothing catches that."""
    def refuse(*arguments, **_):
        pytest.fail(f"a connection to {arguments[-1]}")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def test_what_is_here_is_read(no_network, directory, tmp_path):
    tokenizer = Tokenizer(directory)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert ChatTemplate(tokenizer).render(messages[:1])
    for read, record in ((read_texts, {"text": "a"}), (read_chats, {"messages": messages, "thinking": False})):
        (tmp_path / "lines.jsonl").write_text(json.dumps(record))
        assert len(read(tmp_path / "lines.jsonl", tokenizer)) == 1


def test_a_name_of_a_model_hub_is_no_directory(no_network, capsys):
    with pytest.raises(PanguError, match=f"{HUB}: no such directory"):
        Tokenizer(HUB)
    assert pangu_ms.generation.command.main(["--model", HUB, "--prompt", "a", "--max-new-tokens", "1"]) == 2
    assert f"{HUB}: no such directory" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_training_reads_what_is_here(no_network, directory, tmp_path, monkeypatch, capsys):
    """The command up to MindFormers, in whose place stands what its loader does."""
    def train(fields, *_):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        loader = fields["train_dataset"]["data_loader"]
        read_texts(loader["path"], Tokenizer(loader["tokenizer"]))
    module = SimpleNamespace(train=train)
    monkeypatch.setitem(sys.modules, "pangu_ms.training.run.mindformers", module)
    monkeypatch.setattr(pangu_ms.training.run, "mindformers", module, raising=False)
    monkeypatch.setattr(pangu_ms.training.run.command, "prepare", lambda *_: None)  # the file has one section alone
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}')
    for tokenizer, code, message in ((directory, 0, ""), (HUB, 2, f"data_loader.tokenizer: {HUB}: is not there")):
        loader = {"type": "PanguJsonlLoader", "path": "texts.jsonl", "tokenizer": str(tokenizer)}
        (tmp_path / "run.yaml").write_text(json.dumps({"train_dataset": {"data_loader": loader}}))
        assert pangu_ms.training.run.command.main(["--config", "run.yaml"]) == code
        assert message in capsys.readouterr().err


def test_no_file_of_the_package_imports_what_fetches():
    """MindFormers imports transformers for itself: `pangu_ms.training.run.command` tells it before to stay offline."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name: str(path) for name in names if name and name.partition(".")[0] in FETCHING}
    assert not found
