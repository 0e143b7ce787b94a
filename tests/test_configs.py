"""configs/*: the files build the models that they name."""
from pathlib import Path

import pytest

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe import PanguProMoEConfig
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.architectures.pangu_ultra_moe import PanguUltraMoEConfig
from pangu_ms.yaml_file import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"


def model_config(name, folder="openpangu_v2"):
    return config_from_dict(read_yaml(str(CONFIGS / folder / name))["model"]["model_config"])


@pytest.mark.parametrize("name", ["pretrain_flash_92b.yaml", "finetune_flash_92b_sft.yaml", "predict_flash_92b.yaml"])
def test_flash_is_flash(name):
    assert model_config(name) == PanguConfig.flash_92b(compute_dtype="bfloat16")


def test_the_toy_is_small_and_has_every_kind_of_layer():
    config = model_config("pretrain_toy_cpu.yaml")
    assert config.parameter_count()["trunk_and_mtp"] < 10_000_000
    assert {layer.attention.kind for layer in config.plan.layers} == {"dsa", "swa"}
    assert [layer.attention.window for layer in config.plan.mtp_layers] == [128] * 3


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_embedded_is_embedded(size):
    wanted = getattr(PanguEmbeddedConfig, f"embedded_{size}")(compute_dtype="bfloat16")
    for name in (f"predict_embedded_{size}.yaml", f"finetune_embedded_{size}_sft.yaml"):
        assert model_config(name, "pangu_embedded") == wanted
    toy = model_config("pretrain_toy_cpu.yaml", "pangu_embedded")
    assert toy.parameter_count()["trunk"] < 2_000_000 and toy.plan.tied_head and toy.plan.layers[0].attention.bias


@pytest.mark.parametrize("name", ["predict_pro_moe_72b.yaml", "finetune_pro_moe_72b_sft.yaml"])
def test_pro_moe_is_pro_moe(name):
    assert model_config(name, "pangu_pro_moe") == PanguProMoEConfig.pro_moe_72b(compute_dtype="bfloat16")


def test_the_toy_of_pro_moe_is_small():
    toy = model_config("pretrain_toy_cpu.yaml", "pangu_pro_moe")
    assert toy.parameter_count()["trunk"] < 4_000_000 and all(layer.feed_forward.groups for layer in toy.plan.layers)


@pytest.mark.parametrize("name", ["predict_r_72b.yaml", "finetune_r_72b_sft.yaml"])
def test_r_72b_is_r_72b(name):
    assert model_config(name, "pangu_pro_moe_v2") == PanguProMoEV2Config.r_72b(compute_dtype="bfloat16")


def test_its_toy_is_small_and_has_what_it_has():
    plan = (config := model_config("pretrain_toy_cpu.yaml", "pangu_pro_moe_v2")).plan
    assert config.parameter_count()["trunk_and_mtp"] < 5_000_000
    assert [layer.moe for layer in plan.layers] == [False, True, True, True, True] and len(plan.mtp_layers) == 1


@pytest.mark.parametrize("name", ["predict_ultra_moe_718b.yaml", "finetune_ultra_moe_718b_sft.yaml"])
def test_ultra_is_ultra(name):
    wanted = PanguUltraMoEConfig.ultra_moe_718b(compute_dtype="bfloat16")
    assert model_config(name, "pangu_ultra_moe") == wanted
    toy = model_config("pretrain_toy_cpu.yaml", "pangu_ultra_moe")
    assert toy.parameter_count()["trunk_and_mtp"] < 5_000_000
    assert [layer.moe for layer in toy.plan.layers] == [False, True, True, True]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_readme_says_what_each_file_is_for(path):
    assert f"| `{path.name}` |" in (path.parent / "README.md").read_text()
