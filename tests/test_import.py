"""`import pangu_ms` is light, and its names arrive when they are first used."""
import subprocess
import sys

import pytest

import pangu_ms


def test_import_loads_no_framework():
    code = ("import sys, pangu_ms; pangu_ms.__version__; "
            "print(sorted({'mindspore', 'mindformers', 'transformers', 'torch'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_config_is_there_without_mindspore():
    code = "import sys, pangu_ms; print(pangu_ms.PanguConfig.__name__, 'mindspore' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "PanguConfig False"


def test_every_public_name_is_listed_and_arrives():
    assert {"PanguConfig", "PanguForCausalLM", "Sampling", "generate", "read_config",
            "stream_generate"} <= set(dir(pangu_ms))
    for name in pangu_ms.__all__:
        assert callable(getattr(pangu_ms, name)), name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PanguModel'"):
        pangu_ms.PanguModel
