"""`model.pet_config` of a YAML file: its keys, their defaults, and what does not go with an adapter."""
import copy
from pathlib import Path

import pytest

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.adapters import Adapter
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.training.run.adapters import check_adapter_ranks, share_trained, take_adapter, weights_of
from pangu_ms.training.run.fields import complete
from pangu_ms.yaml_file import read_yaml

FILE = Path(__file__).parents[3] / "configs" / "openpangu_v2" / "finetune_toy_lora_cpu.yaml"
PATTERN = r".*\.self_attn\.\w+_proj\w*"


@pytest.fixture
def fields(data):
    return complete(read_yaml(str(FILE)) | {"load_checkpoint": str(data / "tiny")})


def test_the_file_trains_attention(fields, data):
    given = copy.deepcopy(fields["model"]["pet_config"])
    adapter = take_adapter(fields)
    assert adapter == Adapter(8, 16, 0.05, PATTERN) and "pet_config" not in fields["model"]
    del given["lora_rank"], given["lora_alpha"], given["lora_dropout"]          # MindFormers' place and defaults
    fields["model"]["model_config"]["pet_config"] = given
    assert take_adapter(fields) == Adapter(8, 16, 0.01, PATTERN)
    assert "pet_config" not in fields["model"]["model_config"] and take_adapter(fields) is None


@pytest.mark.parametrize("change, message", [
    ({"lora_rnk": 4}, "model.pet_config.lora_rnk: no such key; did you mean lora_rank?"),
    ({"lora_a_init": "normal"}, "model.pet_config.lora_a_init: found 'normal', wanted none: A is drawn as PEFT does"),
    ({"freeze_include": ["*"]}, "model.pet_config.freeze_include: found .* wanted none: all of the base is frozen"),
    ({"pet_type": "slora"}, "model.pet_config.pet_type: found 'slora', wanted 'lora'"),
    ({"lora_rank": 0}, "model.pet_config.lora_rank: found 0, wanted an integer of at least 1"),
    ({"lora_alpha": True}, "model.pet_config.lora_alpha: found True, wanted a number above 0"),
    ({"lora_dropout": 1}, "model.pet_config.lora_dropout: found 1, wanted a number from 0 to below 1"),
    ({"target_modules": ["q_proj"]}, r"pet_config.target_modules: found \['q_proj'\], wanted a regular expression"),
    ({"target_modules": ".*wq"}, "model.pet_config.target_modules: '.*wq' matches the whole name of no module"),
])
def test_a_wrong_key_is_named(fields, change, message):
    fields["model"]["pet_config"] |= change
    with pytest.raises(ConfigError, match=message) as raised:
        take_adapter(fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change, message", [
    ({"load_checkpoint": ""}, "model.pet_config: found without weights"),
    ({"load_optimizer": True}, "load_optimizer: found True beside model.pet_config"),
    ({"run_mode": "eval"}, "model.pet_config: found with run_mode eval; evaluate what pangu-convert merge-lora makes"),
    ({"pangu_training": {"router_bias_update_rate": 0.01}}, "router_bias_update_rate: found 0.01, wanted 0 beside"),
    ({"pangu_training": {"indexer_loss": "sparse"}}, "indexer_loss: found 'sparse', wanted 'off' beside"),
])
def test_what_would_change_the_base_is_refused(fields, change, message):
    with pytest.raises(ConfigError, match=message):
        take_adapter(fields | change)


def test_ranks_that_share_the_model_are_refused():
    check_adapter_ranks(Ranks(data=2))
    for ranks in (Ranks(tensor=2), Ranks(expert=2)):
        with pytest.raises(ConfigError, match="model_parallel or expert_parallel above 1"):
            check_adapter_ranks(ranks)


def test_it_says_how_much_is_trained(one_layer):
    config = config_from_dict(one_layer)
    found = share_trained(config, Adapter(2, 4, 0.0, r".*\.0\.self_attn\.q_a_proj"))
    assert found.startswith(f"{2 * (config.hidden_size + config.q_lora_rank)} parameters of the adapter are trained, ")


def test_a_resumed_run_wants_its_base(tmp_path):
    assert weights_of(str(tmp_path)) == str(tmp_path)                           # no adapter's
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "/nowhere"}')
    with pytest.raises(ConfigError, match="base_model_name_or_path: /nowhere is no directory; put the model there"):
        weights_of(str(tmp_path))
