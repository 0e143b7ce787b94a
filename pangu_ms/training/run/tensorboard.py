"""The numbers of log.jsonl as TensorBoard's curves: MindFormers' section `tensorboard`."""
import os

# Key of the section -> how the names begin that it leaves out where it is False.
SWITCHES = {"log_timers_to_tensorboard": ("seconds", "tokens_per_second", "tflops", "mfu"),
            "log_expert_load_to_tensorboard": ("expert_balance",)}


class Curves:
    """Event files below `tensorboard_dir`/rank_0, where MindFormers writes them.

    Args:
        section: with tensorboard_dir.
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
