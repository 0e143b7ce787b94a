"""What the tests of training share: a small tokenizer, a way to write JSONL, a small model's config."""
import json

import pytest

from pangu_ms.config import PanguConfig
from pangu_ms.training.tokenizer import train_tokenizer


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


@pytest.fixture(scope="session")
def small(data):
    """small(**fields): a config as small as they come: a dense DSA layer, a sliding one with experts, one MTP depth."""
    tiny = json.loads((data / "tiny" / "config.json").read_text())
    tiny |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "dsa_layers": [0], "swa_layers": [1, 2],
             "sliding_window_list": [7, 7], "block_post_layernorm_idx": [1]}
    return lambda **fields: PanguConfig.from_dict(tiny | fields)
