"""What a file says of the course of a run, where its sections do not go together. Needs no MindFormers."""
from pangu_ms.errors import ConfigError
from pangu_ms.training.objectives.settings import TrainingSettings


def check_schedules(fields):
    """`ConfigError` for what would be ignored, or would break the weights, in a file whose sections are complete."""
    settings, wrapper = TrainingSettings.from_dict(fields["pangu_training"]), fields["runner_wrapper"].get("type")
    for key in ("router_bias_update_rate", "batch_ramp", "skip_nonfinite"):
        if wrapper != "PanguTrainStep" and getattr(settings, key):
            raise ConfigError(f"runner_wrapper.type: found {wrapper}, wanted PanguTrainStep, which alone does what "
                              f"pangu_training.{key} asks")
    steps = fields["runner_config"].get("gradient_accumulation_steps") or 1
    if settings.batch_ramp and steps != 1:
        raise ConfigError(f"runner_config.gradient_accumulation_steps: found {steps} with pangu_training.batch_ramp, "
                          "wanted 1: the ramp says how many sequences a step has, as many as fit go at once")
    schedule = fields.get("lr_schedule") or {}
    begins_with = "warmup_steps" if schedule.get("warmup_ratio") is None else "warmup_ratio"
    if schedule.get("type") == "WarmUpStableDecayLR" and not schedule.get(begins_with) \
            and (schedule.get("decay_start_steps") or schedule.get("decay_start_ratio")):
        # Theirs multiplies and divides the stable rate by the step, which is 0 in the first one.
        raise ConfigError(f"lr_schedule.{begins_with}: found {schedule.get(begins_with)} with WarmUpStableDecayLR, "
                          "whose stable rate in step 0 is no number; give warmup_steps: 1 and warmup_lr_init: the rate")


def check_total_steps(schedule, steps):
    """`ConfigError` for a decay that would end before the run's `steps` do, where the rate falls on below zero."""
    total = (schedule or {}).get("total_steps") or -1
    if (schedule or {}).get("type") == "WarmUpStableDecayLR" and -1 < total < steps:
        raise ConfigError(f"lr_schedule.total_steps: found {total}, but the run has {steps} steps, and behind its "
                          "total WarmUpStableDecayLR falls below 0; leave it out or give as many")
