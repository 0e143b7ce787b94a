"""What the tests of training share: a small tokenizer and a way to write JSONL."""
import json

import pytest
from toy_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """256 bytes, 20 merges, then the special tokens: 276 begins a text, 277 ends it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the capital of Peru is Lima, the user, the assistant, the system"], 284, directory)
    return directory


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(records): the path of a file that holds them; text and bytes are lines as they stand."""
    def write(records):
        lines = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
                 for line in records]
        (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / "lines.jsonl"
    return write
