"""Fixtures that every test may use."""
import os
from pathlib import Path

import pytest

# MindSpore logs warnings about its own operators by default; a test run shows errors only.
os.environ.setdefault("GLOG_v", "3")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of golden checkpoints: one folder each, with config.json, model.safetensors and T*.npz."""
    return Path(__file__).parent / "data"
