"""What a YAML file says of evaluation: MindFormers' keys `do_eval` and `eval_*`. Needs no MindSpore."""
from dataclasses import dataclass

from pangu_ms.errors import ConfigError


@dataclass(frozen=True)
class HeldOut:
    """What a file says of evaluation.

    Attributes:
        loader: `eval_dataset.data_loader`.
        batch_size: sequences of one rank that go through the network at once.
        num_samples: sequences at most; None: all.
        step_interval, epoch_interval: evaluate whenever so many have passed, or not where it is not above 0.
    """

    loader: dict
    batch_size: int = 1
    num_samples: int | None = None
    step_interval: int = 100
    epoch_interval: int = -1

    def due(self, step: int, steps: int, epochs: int) -> bool:
        """Behind step `step` of `steps`, which make `epochs`; always behind the last."""
        intervals = [self.step_interval] * (self.step_interval > 0)
        intervals += [self.epoch_interval * steps / epochs] * (self.epoch_interval > 0)
        return step == steps or any(step // each > (step - 1) // each for each in intervals)


def read_held_out(fields: dict) -> HeldOut | None:
    """What the sections of a file say, once they are complete; None where it asks for no evaluation.

    Raises:
        ConfigError: it asks for one, and names no data.
    """
    if not fields.get("do_eval") and fields.get("run_mode") != "eval":
        return None
    dataset = fields.get("eval_dataset") or {}
    if not dataset.get("data_loader"):
        raise ConfigError("eval_dataset.data_loader: not there; give the section of a loader, as in train_dataset")
    intervals = {name: fields[f"eval_{name}"] for name in ("step_interval", "epoch_interval")
                 if fields.get(f"eval_{name}") is not None}
    return HeldOut(dataset["data_loader"], fields["runner_config"].get("batch_size", 1), dataset.get("num_samples"),
                   **intervals)
