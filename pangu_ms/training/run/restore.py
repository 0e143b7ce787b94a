"""What a training step takes from a checkpoint: everything, to go on with a run, or all but the count of steps."""
import mindspore as ms

from pangu_ms.errors import ConfigError
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.callbacks import split_parameters
from pangu_ms.training.run.state import read_checkpoint


def restore(step, directory, ranks):
    """A `TrainStep` as it was when it was saved; `ConfigError` when another version of this package saved it."""
    _take(step, directory, ranks, "another version of this package wrote it: begin a new run with load_checkpoint")


def begin_stage(step, directory, ranks):
    """A `TrainStep` with weights, moments and biases of a checkpoint, whose optimizer counts its steps from 0.

    The powers of AdamW's betas go on: they belong to the moments. Schedules follow the count.

    Raises:
        ConfigError: that run trained other parameters, or kept other states of them.
    """
    _take(step, directory, ranks, "its run trained other parameters, or by another optimizer or compute_dtype: leave "
                                  "out load_optimizer, which keeps the weights alone")
    count = step.optimizer.global_step
    count.set_data(ms.ops.zeros_like(count))


def _take(step, directory, ranks, mend):
    optimizer = step.optimizer
    sharded = optimizer.sharded_names if isinstance(optimizer, PanguMuon) else set()
    saved = read_checkpoint(directory, ranks.model, step.causal_lm.config)
    split = split_parameters(step)
    for parameters, arrays, others in zip(split, saved, (set(), sharded)):
        wanted = parameters.keys() | others
        if wanted != arrays.keys():
            name = min(wanted ^ arrays.keys())
            raise ConfigError(f"{directory}: {name} is {'not' if name in wanted else 'only'} there; {mend}")
    for parameters, arrays in zip(split, saved):
        for name, parameter in parameters.items():
            tensor = ms.Tensor(arrays[name])
            parameter.set_data(tensor.view(ms.bfloat16) if parameter.dtype == ms.bfloat16 else tensor)
    if sharded:
        optimizer.set_gathered_states(saved[1])
