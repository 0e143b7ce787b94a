"""Fixtures that every test may use."""
import functools
import gc
import json
import os
import re
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
def family(data, tmp_path_factory):
    """family(name): a directory with the config of a golden checkpoint of that name, fitted to a small tokenizer.model
    of the family, which lies in it; without weights and without a chat template."""
    @functools.cache
    def make(name):
        from tests.text.family_texts import save_family_tokenizer
        path = tmp_path_factory.mktemp(name)
        vocab_size = save_family_tokenizer(path)
        config = json.loads((data / name / "config.json").read_text())
        config |= {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
        (path / "config.json").write_text(json.dumps(config))
        return path
    return make


@pytest.fixture(scope="session")
def small(data):
    """small(**fields): a config as small as they come: a dense DSA layer, a sliding one with experts, one MTP depth."""
    tiny = json.loads((data / "tiny" / "config.json").read_text())
    tiny |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "dsa_layers": [0], "swa_layers": [1, 2],
             "sliding_window_list": [7, 7], "block_post_layernorm_idx": [1]}

    def config(**fields):
        from pangu_ms.architectures.openpangu_v2 import PanguConfig
        return PanguConfig.from_dict(tiny | fields)
    return config


@pytest.fixture(scope="session")
def one_layer(data):
    """model_config of what is trained in seconds: a DSA layer with experts and a sliding MTP layer."""
    from pangu_ms.architectures.openpangu_v2 import PanguConfig
    tiny = json.loads((data / "tiny" / "config.json").read_text())
    tiny |= {"vocab_size": 268, "num_attention_heads": 4, "num_hidden_layers": 1, "num_nextn_predict_layers": 1,
             "first_k_dense_replace": 0, "dsa_layers": [0], "swa_layers": [1], "sliding_window_list": [7],
             "block_post_layernorm_idx": [0]}
    return {name: value for name, value in tiny.items() if name in PanguConfig.given_fields()}


@pytest.fixture
def on_ascend(monkeypatch):
    """Forms are chosen as on an Ascend."""
    from pangu_ms import device
    monkeypatch.setattr(device, "target", lambda: "Ascend")


@pytest.fixture
def inferred_graph(tmp_path, monkeypatch):
    """inferred_graph(cell, *inputs) -> primitives, shapes: of a graph whose types and shapes all pass inference.

    Without an Ascend it is refused behind that, because an operator in it has no kernel here; any other refusal fails
    the test. Shapes as text, "-1" for what is open.
    """
    import mindspore as ms
    monkeypatch.chdir(tmp_path)                                                 # MindSpore may write into it
    monkeypatch.setenv("MS_DEV_DUMP_IR_PASSES", "validate")
    missing = r"Unsupported op \[\w+\] on CPU|Select CPU operator\[\w+\] fail! Unsupported data type"

    def compiled(cell, *inputs):
        ms.set_context(save_graphs=1, save_graphs_path=str(tmp_path))
        try:
            cell.compile(*inputs)
        except Exception as error:  # it raises of every kind
            if not re.search(missing, str(error)):
                pytest.fail(f"refused, not for want of a kernel: {error}")
        else:
            if ms.get_context("device_target") == "CPU":
                pytest.fail("a CPU has kernels for all of it: no operator of an Ascend is in the graph")
        finally:
            ms.set_context(save_graphs=0)
        file, = tmp_path.rglob("*_validate_*.ir")
        text = file.read_text()
        return set(re.findall(r"Prim(?:Func)?_(\w+)\(", text)), re.findall(r"<Tensor\[\w+\], \(([-\d, ]*)\)", text)
    return compiled


# Files that one of the processes that share the tests takes together: they have steps of the same models, and compiling
# those is what takes time. The longest come first, so that they do not leave one process alone at the end.
TOGETHER = (("test_documented_commands.py",), ("parallel/test_parallel.py",), ("training/run/test_run.py",),
            ("generation/test_speculative.py", "generation/test_fixed_shapes.py", "generation/test_prefix.py",
             "generation/test_engine.py", "generation/test_sampling.py", "generation/test_stream.py"),
            ("test_bench.py",), ("model/test_ascend.py",))


def place(path):
    return next((n for n, names in enumerate(TOGETHER) if path.endswith(names)), len(TOGETHER))


def pytest_collection_finish():
    """MindSpore collects garbage before it compiles; what has been imported is none and need not be looked through."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place(str(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return path if place(path) == len(TOGETHER) else str(place(path))
    return Together(config, log)
