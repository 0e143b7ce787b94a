"""What a file says of the course of a run, where its sections do not go together."""
import pytest

from pangu_ms.errors import ConfigError
from pangu_ms.training.run.schedules import check_schedules, check_total_steps

FIELDS = {"pangu_training": {}, "runner_wrapper": {"type": "PanguTrainStep"}, "runner_config": {}, "lr_schedule": {}}
DECAY = {"type": "WarmUpStableDecayLR", "learning_rate": 1e-3}


@pytest.mark.parametrize("change", [
    {}, {"lr_schedule": None}, {"lr_schedule": DECAY | {"warmup_steps": 0, "decay_start_steps": 0}},
    {"lr_schedule": DECAY | {"warmup_steps": 1, "decay_start_ratio": 0.9}},
    {"lr_schedule": DECAY | {"warmup_ratio": 0.1, "decay_start_ratio": 0.9}},
    {"lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 0}},
    {"pangu_training": {"batch_ramp": [[0, 4]]}, "runner_config": {"gradient_accumulation_steps": 1}},
])
def test_what_goes_together(change):
    check_schedules(FIELDS | change)


@pytest.mark.parametrize("change, message", [
    ({"lr_schedule": DECAY | {"warmup_steps": 0, "decay_start_steps": 9}},
     "lr_schedule.warmup_steps: found 0 with WarmUpStableDecayLR, .* give warmup_steps: 1 and warmup_lr_init"),
    ({"lr_schedule": DECAY | {"warmup_ratio": 0.0, "decay_start_ratio": 0.9}}, "lr_schedule.warmup_ratio: found 0.0"),
    ({"pangu_training": {"skip_nonfinite": 1}, "runner_wrapper": {"type": "MFTrainOneStepCell"}},
     "runner_wrapper.type: found MFTrainOneStepCell, wanted PanguTrainStep, .* pangu_training.skip_nonfinite asks"),
])
def test_what_does_not(change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_schedules(FIELDS | change)
    assert "\n" not in str(raised.value)


def test_a_decay_ends_with_the_run():
    for schedule in (None, DECAY, DECAY | {"total_steps": -1}, DECAY | {"total_steps": 9}, {"total_steps": 3}):
        check_total_steps(schedule, 9)
    with pytest.raises(ConfigError, match="lr_schedule.total_steps: found 8, but the run has 9 steps, .* below 0"):
        check_total_steps(DECAY | {"total_steps": 8}, 9)
