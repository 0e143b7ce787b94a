"""Fixtures that every test may use."""
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

# MindSpore logs warnings about its own operators by default; a test run shows errors only.
os.environ.setdefault("GLOG_v", "3")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of golden checkpoints: one folder each, with config.json, model.safetensors and T*.npz."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def model(data):
    """model(name): the golden checkpoint of that name, loaded once and with its compiled functions kept."""
    @functools.cache
    def load(name):
        from pangu_ms import PanguForCausalLM
        return PanguForCausalLM.from_pretrained(data / name)
    return load


@pytest.fixture(scope="session")
def golden(data):
    """golden(name, file): the arrays of a golden file, by key."""
    @functools.cache
    def read(name, file):
        with np.load(data / name / f"{file}.npz", allow_pickle=False) as arrays:
            return dict(arrays)
    return read


@pytest.fixture(scope="session")
def small(data):
    """small(**fields): a config as small as they come: a dense DSA layer, a sliding one with experts, one MTP depth."""
    tiny = json.loads((data / "tiny" / "config.json").read_text())
    tiny |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "dsa_layers": [0], "swa_layers": [1, 2],
             "sliding_window_list": [7, 7], "block_post_layernorm_idx": [1]}

    def config(**fields):
        from pangu_ms.config import PanguConfig
        return PanguConfig.from_dict(tiny | fields)
    return config
