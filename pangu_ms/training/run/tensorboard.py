"""The numbers of log.jsonl as TensorBoard's curves: MindFormers' section `tensorboard`."""
import os

from pangu_ms.errors import ConfigError
from pangu_ms.yaml_file import check_section

# Key of the section -> how the names begin that it leaves out where it is False.
SWITCHES = {"log_timers_to_tensorboard": ("seconds", "tokens_per_second", "tflops", "mfu"),
            "log_expert_load_to_tensorboard": ("expert_balance",)}


def check_tensorboard(section) -> dict | None:
    """The section, or None where it asks for no curves; `ConfigError` for a key or a value that it cannot have."""
    if not section:
        return None
    if not isinstance(section, dict):
        raise ConfigError(f"tensorboard: found {section!r}, wanted a section with tensorboard_dir")
    check_section("tensorboard", section, ["tensorboard_dir", "tensorboard_queue_size", *SWITCHES,
                                           "log_loss_scale_to_tensorboard"])
    directory, size = section.get("tensorboard_dir"), section.get("tensorboard_queue_size", 10)
    if directory is not None and not isinstance(directory, str):
        raise ConfigError(f"tensorboard.tensorboard_dir: found {directory!r}, wanted a directory")
    if type(size) is not int or size < 1:
        raise ConfigError(f"tensorboard.tensorboard_queue_size: found {size!r}, wanted an integer of at least 1")
    for key in SWITCHES:
        if type(section.get(key, True)) is not bool:
            raise ConfigError(f"tensorboard.{key}: found {section[key]!r}, wanted True or False")
    if section.get("log_loss_scale_to_tensorboard", False) is not False:
        raise ConfigError("tensorboard.log_loss_scale_to_tensorboard: found "
                          f"{section['log_loss_scale_to_tensorboard']!r}, wanted False: no loss is scaled here")
    return section if directory else None


class Curves:
    """Event files below `tensorboard_dir`/rank_0, where MindFormers writes them.

    Args:
        section: of `check_tensorboard`.
        start: steps that were done before. What the files hold of later ones is not shown any more.
    """

    def __init__(self, section, start):
        from tensorboardX import SummaryWriter
        self.left_out = tuple(name for key, names in SWITCHES.items() if not section.get(key, True) for name in names)
        self.writer = SummaryWriter(os.path.join(section["tensorboard_dir"], "rank_0"),
                                    max_queue=section.get("tensorboard_queue_size", 10),
                                    purge_step=start + 1 if start else None,
                                    filename_suffix=f".from_{start + 1}")       # its own name has whole seconds alone

    def write(self, line):
        """A scalar for each number of a line of log.jsonl."""
        for name, value in line.items():
            if name != "step" and value is not None and not name.startswith(self.left_out):
                self.writer.add_scalar(name, value, line["step"])

    def close(self):
        self.writer.close()
