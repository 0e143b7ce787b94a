"""The `pangu_training` section."""
import pytest

from pangu_ms.errors import ConfigError
from pangu_ms.training.by_step import ByStep
from pangu_ms.training.objectives.settings import TrainingSettings


def test_defaults_train_the_language_model_alone():
    settings = TrainingSettings.from_dict({})
    assert settings == TrainingSettings() and settings.indexer_loss == "off" and settings.mtp_loss_weight == 1.0
    assert settings.balance_loss_coeff is None                                  # what config.json says
    assert settings.z_loss_coeff == settings.router_bias_update_rate == 0.0
    assert settings.batch_ramp is None and settings.skip_nonfinite == 0


def test_whole_numbers_become_floats():
    settings = TrainingSettings.from_dict({"mtp_loss_weight": 2, "indexer_loss": "sparse"})
    assert settings.mtp_loss_weight == 2.0 and type(settings.mtp_loss_weight) is float
    assert settings.indexer_loss == "sparse"


def test_values_by_step():
    settings = TrainingSettings.from_dict({"router_bias_update_rate": [[0, 1e-3], [9, 0]], "batch_ramp": [[0, 8]]})
    assert settings.router_bias_update_rate == ByStep((0, 9), (1e-3, 0)) and settings.batch_ramp == ByStep((0,), (8,))


@pytest.mark.parametrize("fields, message", [
    ({"router_bias_update_rate": "1e-3"}, "pangu_training.router_bias_update_rate: found '1e-3', wanted a number"),
    ({"router_bias_update_rate": [[0, -1]]}, r"router_bias_update_rate: found \[0, -1\], wanted \[step, value\]"),
    ({"batch_ramp": 8}, r"pangu_training.batch_ramp: found 8, wanted a list of \[step, value\]"),
    ({"batch_ramp": [[0, 1.5]]}, r"batch_ramp: found \[0, 1.5\], wanted .* a whole number of at least 1"),
    ({"skip_nonfinite": True}, "pangu_training.skip_nonfinite: found True, wanted a whole number of at least 0"),
    ({"skip_nonfinite": -1}, "pangu_training.skip_nonfinite: found -1, wanted a whole number of at least 0"),
    ({"mtp_weight": 1}, "pangu_training.mtp_weight: no such key; did you mean mtp_loss_weight"),
    ({"indexer_los": "off"}, "pangu_training.indexer_los: no such key; did you mean indexer_loss"),
    ({"z_loss_coeff": -1e-3}, "pangu_training.z_loss_coeff: found -0.001, wanted a number of at least 0"),
    ({"z_loss_coeff": "1e-3"}, "pangu_training.z_loss_coeff: found '1e-3', wanted a number"),
    ({"balance_loss_coeff": -1}, "pangu_training.balance_loss_coeff: found -1, wanted a number of at least 0"),
    ({"moe_init_std": float("nan")}, "pangu_training.moe_init_std: found nan, wanted a number"),
    ({"mtp_loss_weight": float("inf")}, "pangu_training.mtp_loss_weight: found inf"),
    ({"mtp_loss_weight": True}, "pangu_training.mtp_loss_weight: found True"),
    ({"post_norm_init": 0}, "pangu_training.post_norm_init: found 0, wanted a positive number or depth_scaled"),
    ({"post_norm_init": "scaled"}, "pangu_training.post_norm_init: found 'scaled', wanted a positive number or depth"),
    ({"post_norm_init": [1]}, r"pangu_training.post_norm_init: found \[1\], wanted a positive number"),
    ({"initializer": "small"}, "pangu_training.initializer: found 'small', wanted one of normal, tiny"),
    ({"initializer": "tiny", "moe_init_std": 0.02}, "pangu_training.moe_init_std: found 0.02 with initializer tiny"),
    ({"indexer_loss": False}, "pangu_training.indexer_loss: found False, wanted one of off, dense, sparse .*quotes"),
    ({"indexer_loss": "warm"}, "pangu_training.indexer_loss: found 'warm', wanted one of off, dense, sparse"),
])
def test_a_wrong_setting_is_one_line_that_names_it(fields, message):
    with pytest.raises(ConfigError, match=message) as raised:
        TrainingSettings.from_dict(fields)
    assert "\n" not in str(raised.value)
