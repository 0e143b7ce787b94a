"""What a file says of the course of a run, where its sections do not go together. Needs no MindFormers."""
import os

from pangu_ms.errors import ConfigError
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.run.state import OPTIMIZER_FILE


def check_schedules(fields):
    """`ConfigError` for what would be ignored, or would break the weights, in a file whose sections are complete."""
    settings, wrapper = TrainingSettings.from_dict(fields["pangu_training"]), fields["runner_wrapper"].get("type")
    for key in ("router_bias_update_rate", "batch_ramp", "skip_nonfinite", "qk_clip_threshold"):
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


def check_load_optimizer(fields):
    """`ConfigError` where `load_optimizer` of a file whose sections are complete has no states to take."""
    directory = fields.get("load_checkpoint")
    if not fields.get("load_optimizer"):
        return
    if not directory:
        raise ConfigError("load_optimizer: found True without load_checkpoint; give the run that this one continues")
    if not os.path.isfile(os.path.join(directory, OPTIMIZER_FILE)):
        raise ConfigError(f"load_optimizer: {directory} holds no {OPTIMIZER_FILE}, weights alone; give a checkpoint "
                          "that pangu-train wrote, or leave load_optimizer out")
    if fields["optimizer"].get("type") != "PanguMuon":
        raise ConfigError(f"load_optimizer: found True with optimizer.type {fields['optimizer'].get('type')}, wanted "
                          "PanguMuon, which counts the steps of its schedule and of its moments apart; it has muon: "
                          "False for AdamW")
