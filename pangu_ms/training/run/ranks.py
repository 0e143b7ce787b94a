"""How a YAML file's `parallel_config` becomes ranks. Needs no MindSpore.

Gradients of ranks that have the same sequences need nothing more than the collectives in the layers: behind every
`Copy` they have the same gradient of the same values, so what they all hold stays the same on all of them, and of what
is sharded each has the gradient of its part. Ranks with other sequences take means (`pangu_ms.training.step`).
"""
import os
from dataclasses import replace

from pangu_ms.architectures import config_from_dict
from pangu_ms.architectures.tensors import check_ranks
from pangu_ms.errors import ConfigError
from pangu_ms.parallel.ranks import Ranks, check_processes
from pangu_ms.training.data import LOADERS


def find_ranks(fields):
    """How `parallel_config` shares a model and a batch, before this process knows its rank.

    data_parallel counts sets of sequences, as in MindFormers, where expert parallel ranks are data parallel ranks too.

    Raises:
        ConfigError: what cannot be shared so, or not by the processes that there are.
    """
    given, context = fields.get("parallel_config") or {}, fields.get("parallel") or {}
    if not fields.get("use_parallel"):
        return Ranks()
    data, tensor, expert = (given.get(f"{name}_parallel", 1) for name in ("data", "model", "expert"))
    ranks = Ranks(tensor, expert, data, batch_sharded=True)
    wrapper, loader = fields["runner_wrapper"].get("type"), fields["train_dataset"]["data_loader"].get("type")
    if wrapper != "PanguTrainStep" and tensor * expert > 1:
        raise ConfigError(f"runner_wrapper.type: found {wrapper}, wanted PanguTrainStep, which knows what other "
                          "devices hold of a model")
    if context.get("enable_parallel_optimizer") and fields["optimizer"].get("type") != "PanguMuon":
        raise ConfigError(f"optimizer.type: found {fields['optimizer'].get('type')}, wanted PanguMuon, which shards "
                          "its states as parallel.enable_parallel_optimizer asks")
    if loader not in LOADERS and tensor > 1:
        raise ConfigError(f"train_dataset.data_loader.type: found {loader}, wanted {' or '.join(LOADERS)}, which give "
                          "the same sequences to all ranks of model_parallel")
    if data % expert:
        raise ConfigError(f"parallel_config.expert_parallel: {expert} does not divide data_parallel {data}, whose "
                          "ranks share the experts")
    ranks = replace(ranks, data=data // expert)
    check_ranks(config_from_dict(fields["model"]["model_config"]), ranks)
    check_processes(ranks)
    if "MS_WORKER_NUM" not in os.environ:
        raise ConfigError("use_parallel: found True, but msrun has not started this process; set it to False for one "
                          "process, or start by msrun --worker_num=1 --local_worker_num=1")
    return ranks
