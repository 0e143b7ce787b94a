"""configs/openpangu_v2: the files build the models that they name."""
from pathlib import Path

import pytest

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.yaml_file import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs" / "openpangu_v2"


def model_config(name):
    return PanguConfig.from_dict(read_yaml(str(CONFIGS / name))["model"]["model_config"])


@pytest.mark.parametrize("name", ["pretrain_flash_92b.yaml", "finetune_flash_92b_sft.yaml", "predict_flash_92b.yaml"])
def test_flash_is_flash(name):
    assert model_config(name) == PanguConfig.flash_92b(compute_dtype="bfloat16")


def test_the_toy_is_small_and_has_every_kind_of_layer():
    config = model_config("pretrain_toy_cpu.yaml")
    assert config.parameter_count()["trunk_and_mtp"] < 10_000_000
    assert {layer.attention.kind for layer in config.plan.layers} == {"dsa", "swa"}
    assert [layer.attention.window for layer in config.plan.mtp_layers] == [128] * 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_readme_says_what_each_file_is_for(path):
    assert f"| `{path.name}` |" in (CONFIGS / "README.md").read_text()
