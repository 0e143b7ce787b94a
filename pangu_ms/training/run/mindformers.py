"""openPangu inside MindFormers: what a YAML file names by `type`, and the run of such a file.

The only file that imports MindFormers. Importing it registers, by their names: the model (the model_type and
architectures of each member of the family), the loader PanguJsonlLoader, the optimizer PanguMuon, the wrapper
PanguTrainStep, the callbacks PanguMonitor and PanguCheckpoint, and PanguTrainer, MindFormers' trainer with the
overrides that its methods explain.
MindFormers writes a log directory when it is imported: `pangu_ms.training.run.command` says where, before.
"""
import copy
import difflib
import inspect
import os
import sys
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindformers import Trainer, build_context
from mindformers.models import PretrainedConfig, PreTrainedModel
from mindformers.parallel_core.utils.model_mixin import ModelMixin, TrainModelMixin
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS, ConfigTemplate, GeneralConfig
from mindformers.tools.utils import get_real_rank
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore import ops

from pangu_ms.architectures import ARCHITECTURES, config_class, config_from_dict
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.pretrained import PanguForCausalLM
from pangu_ms.training.data.loader import COLUMNS, Epochs, PanguJsonlLoader, source_of
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.adapters import (
    add_adapter, check_adapter_ranks, share_trained, take_adapter, weights_of,
)
from pangu_ms.training.run.callbacks import PanguCheckpoint, PanguMonitor, Run, split_parameters
from pangu_ms.training.run.fields import complete, kept_fields
from pangu_ms.training.run.ranks import find_ranks
from pangu_ms.training.run.state import check_fields, read_checkpoint
from pangu_ms.training.step import TrainStep
from pangu_ms.yaml_file import check_section

MindFormerRegister.register_cls(PanguJsonlLoader, MindFormerModuleType.DATASET_LOADER)
for callback in (PanguMonitor, PanguCheckpoint):
    MindFormerRegister.register_cls(callback, MindFormerModuleType.CALLBACK)


@MindFormerRegister.register(MindFormerModuleType.CONFIG, legacy=False,
                             search_names={member.model_type for member in ARCHITECTURES.values()})
class PanguModelConfig(PretrainedConfig):
    """`model.model_config`: the fields of config.json under their names; what MindFormers adds to them is ignored."""

    def __init__(self, pangu_training=None, pangu_weights=None, pangu_seed=0, pangu_ranks=None, pangu_adapter=None,
                 **fields):
        member = config_class(fields)
        super().__init__(architectures=list(member.architectures))
        known = {name: fields[name] for name in member.given_fields() if name in fields}
        self.fields = {name: dict(value) if isinstance(value, dict) else value for name, value in known.items()}
        self.pangu_training, self.pangu_weights, self.pangu_seed = pangu_training or {}, pangu_weights, pangu_seed
        self.pangu_ranks, self.pangu_adapter = pangu_ranks, pangu_adapter


@MindFormerRegister.register(MindFormerModuleType.MODELS, legacy=False, search_names=set(ARCHITECTURES))
class PanguNetwork(TrainModelMixin, PreTrainedModel, ModelMixin):
    """The objective as MindFormers calls a network in training.

    `construct` gives what its own wrappers add up: (lm, mtp, auxiliary, indexer) losses with their weights, float32 [1]
    each. PanguTrainStep takes `objective` out of it.
    """

    config_class = PanguModelConfig
    base_model_prefix = "model"
    weight_mapping = []

    def __init__(self, config):
        super().__init__(config, auto_prefix=False)
        settings = TrainingSettings.from_dict(config.pangu_training)
        if config.pangu_weights:
            model = load(config.pangu_weights, config.fields, config.pangu_ranks)
        else:
            model = PanguForCausalLM(config_from_dict(config.fields), config.pangu_ranks)
            initialize(model, config.pangu_seed, settings)
        if config.pangu_adapter:
            add_adapter(model, config.pangu_adapter, config.pangu_weights, config.pangu_seed)
        self.objective = Pretraining(model, settings)
        trained = {id(parameter) for parameter in self.objective.trained_parameters()}
        for parameter in model.get_parameters():                                # MindFormers asks for trainable ones
            parameter.requires_grad = id(parameter) in trained
        self.transformer_config = SimpleNamespace(
            mtp_num_layers=len(model.plan.mtp_layers), num_moe_experts=self.objective.experts,
            enable_expert_relocation=False, print_expert_load=False)
        kinds = [0 if name == "lm" else 1 if name.startswith("mtp") else 3 if name == "indexer_kl" else 2
                 for name in self.objective.part_names]
        self.columns = ms.Tensor(np.eye(4, dtype=np.float32)[kinds])            # [P, 4]

    def construct(self, input_ids, labels=None, loss_mask=None, position_ids=None):
        total, parts, _ = self.objective(input_ids, labels, loss_mask, position_ids)
        losses = ops.matmul(ops.expand_dims(parts * self.objective.weights, 0), self.columns)     # [1, 4]
        # The parts carry no gradient: it all goes through the first, whose value stays its own.
        first = losses[:, 0] + total - ops.stop_gradient(total)
        return first, losses[:, 1], losses[:, 2], losses[:, 3]


# Fields that say how to compute or to store, or what MindFormers calls the model.
ANY_VALUE = ("compute_dtype", "dtype", "torch_dtype", "model_type", "architectures")


def load(directory, fields, ranks=None):
    """The model of a checkpoint directory; `ConfigError` when `fields` say otherwise than its config.json."""
    config = read_config(directory)
    for name, value in fields.items():
        value, found = tuple(value) if isinstance(value, list) else value, getattr(config, name, None)
        if name not in ANY_VALUE and value != found:
            raise ConfigError(f"model.model_config.{name}: found {value!r}, but {directory} has {found!r}; leave out "
                              "of model_config what the checkpoint says")
    dtype = fields.get("compute_dtype", "float32")
    return PanguForCausalLM.from_pretrained(directory, dtype=dtype, ranks=ranks)


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER, alias="PanguMuon")
class _PanguMuon:
    """Our optimizer for MindFormers, which groups parameters by decay; ours decides that by their names."""

    def __new__(cls, params, config, **options):
        return PanguMuon([parameter for group in params for parameter in group["params"]], config, **options)


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class PanguTrainStep(TrainStep):
    """`TrainStep` for a whole batch of the dataset, `accumulation` times what goes through the network at once.

    Args:
        use_clip_grad, max_grad_norm: gradients are scaled down to that norm.
        accumulation, bias_update_rate: from the trainer.
    """

    def __init__(self, network, optimizer, use_clip_grad=True, max_grad_norm=1.0, accumulation=1, bias_update_rate=0.0,
                 **_):
        super().__init__(_ours(network).objective, optimizer, accumulation,
                         max_grad_norm if use_clip_grad else None, bias_update_rate)

    def __call__(self, *batch):
        if self.accumulation == 1:
            return super().__call__(*batch)
        columns = [np.split(column.asnumpy(), self.accumulation) for column in batch]
        outputs = [super(PanguTrainStep, self).__call__(*(ms.Tensor(column) for column in part))
                   for part in zip(*columns)]
        total, parts, norm, load = ([output.asnumpy() for output in outputs] for outputs in zip(*outputs))
        means = np.mean(total), np.mean(parts, 0), norm[-1], np.sum(load, 0)
        return tuple(ms.Tensor(values, ms.float32) for values in means)


def _ours(network):
    """Our network inside MindFormers' cells, one of which orders the columns by name."""
    while not isinstance(network, PanguNetwork):
        network = network.network
    return network


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class PanguTrainer(CausalLanguageModelingTrainer):
    """MindFormers' trainer, of which some steps are done otherwise; each override says why.

    Args:
        run: the `Run`, as far as it is known before data and network are.
        resume: the directory of the checkpoint to go on from.
        weights: a checkpoint directory whose weights the model starts from.
        ranks (Ranks): with this process's place.
        shard_states: ranks that hold the same parameters share the optimizer's states.
        adapter (Adapter): trained in place of the model.
    """

    def __init__(self, model_name=None, run=None, resume=None, weights=None, ranks=Ranks(), shard_states=False,
                 adapter=None):
        super().__init__(model_name)
        self.adapter = adapter
        self.run, self.resume, self.weights, self.ranks = run, resume, weights, ranks
        self.shard_states = shard_states

    def _check_grad_accumulation_steps(self):
        """Theirs resets accumulation to 1 unless parallel_mode is semi_auto_parallel; ours is in `TrainStep`."""
        runner, wrapper = self.config.runner_config, self.config.runner_wrapper
        if wrapper.type == "PanguTrainStep":
            wrapper.accumulation = runner.gradient_accumulation_steps or 1
            wrapper.bias_update_rate = TrainingSettings.from_dict(self.config.pangu_training).router_bias_update_rate
            runner.batch_size *= wrapper.accumulation
            runner.gradient_accumulation_steps = 1
        super()._check_grad_accumulation_steps()

    def _train_dataset_postprocess(self, dataset, config):
        """A resumed run skips the sequences it has had. Theirs resumes from `rank_*` files of a parallel run alone,
        behind a barrier, for which a CPU has no kernel."""
        dataset = super()._train_dataset_postprocess(dataset, config)
        source, vocab_size = source_of(dataset), config.model.model_config.vocab_size
        if isinstance(source, Epochs) and source.largest_id >= vocab_size:
            raise ConfigError(f"{config.train_dataset.data_loader.tokenizer}: gives the token "
                              f"{source.largest_id}, but model.model_config.vocab_size is {vocab_size}; train "
                              "with the tokenizer of the model")
        if not isinstance(source, Epochs):
            dataset = dataset.repeat(config.runner_config.epochs)
        config.runner_config.epochs = 1
        # Theirs counts every device's batch; tensor parallel ranks have the same one.
        batch = self.global_batch_size // self.ranks.tensor
        self.run.steps, self.run.sequences_per_step = dataset.get_dataset_size(), batch
        if not self.run.steps:
            raise ConfigError(f"train_dataset: has fewer sequences than the global batch of {batch}; lower "
                              "runner_config.batch_size or bring more data")
        if self.run.start and self.run.sequences != self.run.start * batch:
            raise ConfigError(f"runner_config.batch_size: makes steps of {batch} sequences on all devices, but those "
                              f"of {self.resume} had {self.run.sequences // self.run.start}; give as many")
        if self.run.start >= self.run.steps:
            raise PanguError(f"{self.resume}: the run has made all of its {self.run.steps} steps; to train on, begin "
                             "another with load_checkpoint")
        if config.lr_schedule and config.lr_schedule.total_steps in (None, -1):
            config.lr_schedule.total_steps = self.run.steps
        return dataset.skip(self.run.start) if self.run.start else dataset

    def create_network(self, default_args=None):
        """The network is told what belongs to it besides `model_config`, and which layers to compute again."""
        own = {"pangu_training": self.config.pangu_training, "pangu_weights": self.weights, "pangu_seed": self.run.seed,
               "pangu_ranks": self.ranks, "pangu_adapter": self.adapter}
        network = super().create_network({**(default_args or {}), **own})
        recompute = self.config.recompute_config.recompute if self.config.recompute_config else False
        if type(recompute) is not bool:
            raise ConfigError(f"recompute_config.recompute: found {recompute!r}, wanted True or False")
        if recompute:
            for layer in _ours(network).objective.causal_lm.model.layers:
                layer.recompute()
        return network

    def create_optimizer_scheduler(self, network, model_params):
        """Ours reads sizes of heads from the model's config, and which of them are on other devices."""
        if self.config.optimizer.type == "PanguMuon":
            self.config.optimizer.config = _ours(network).objective.causal_lm.config
            self.config.optimizer.ranks = self.ranks
            self.config.optimizer.shard_states = self.shard_states
        return super().create_optimizer_scheduler(network, model_params)

    def sort_callbacks(self, default_callbacks):
        """Ours are told of the run, since MindFormers makes callbacks from the file's keys alone."""
        for callback in default_callbacks:
            if isinstance(callback, PanguMonitor | PanguCheckpoint):
                callback.run = self.run
        return super().sort_callbacks(default_callbacks)

    def create_model_wrapper(self, network, optimizer):
        """In a resumed run the step gets every parameter back."""
        step = super().create_model_wrapper(network, optimizer)
        if self.resume:
            restore(step, self.resume, self.ranks)
        return step


def restore(step, directory, ranks):
    """A `TrainStep` as it was when it was saved; `ConfigError` when another version of this package saved it."""
    optimizer = step.optimizer
    sharded = optimizer.sharded_names if isinstance(optimizer, PanguMuon) else set()
    saved = read_checkpoint(directory, ranks.model, step.causal_lm.config)
    for parameters, arrays, others in zip(split_parameters(step), saved, (set(), sharded)):
        wanted = parameters.keys() | others
        if wanted != arrays.keys():
            name = min(wanted ^ arrays.keys())
            raise ConfigError(f"{directory}: {name} is {'not' if name in wanted else 'only'} there; another version of "
                              "this package wrote it: begin a new run with load_checkpoint")
        for name, parameter in parameters.items():
            tensor = ms.Tensor(arrays[name])
            parameter.set_data(tensor.view(ms.bfloat16) if parameter.dtype == ms.bfloat16 else tensor)
    if sharded:
        optimizer.set_gathered_states(saved[1])


def train(fields, output_dir, resume=None, state=None):
    """Runs the contents of a YAML file.

    Args:
        fields: MindFormers' sections, and `pangu_training`.
        output_dir: an absolute path; what MindFormers writes goes to mindformers/ in it.
        resume, state: the checkpoint to go on from, and its `RunState`.

    Raises:
        PanguError: an unknown key of one of our sections, or what model, data and callbacks refuse.
    """
    given = kept_fields(fields)
    if state:
        check_fields(resume, state, given)
        fields = fields | {"load_checkpoint": weights_of(resume), "pretrained_model_dir": ""}
    fields = complete(fields)
    adapter = take_adapter(fields)
    check_keys(fields)
    ranks = find_ranks(fields)
    if adapter:
        check_adapter_ranks(ranks)
    # MindSpore's own way of sharding them, behind the same key, is for its own optimizers.
    shard_states = (fields.get("parallel") or {}).pop("enable_parallel_optimizer", False)
    run = Run(output_dir, given, fields["seed"], steps=0, start=state.step if state else 0, sequences_per_step=0,
              sequences=state.sequences if state else 0,
              tokenizer=fields["train_dataset"]["data_loader"].get("tokenizer"))
    config = mindformers_config(copy.deepcopy(fields), output_dir)
    weights = fields.get("load_checkpoint") or fields.get("pretrained_model_dir")
    if fields["run_mode"] == "finetune" and not weights:
        raise ConfigError("run_mode: found finetune without weights; give load_checkpoint or pretrained_model_dir")
    build_context(config)
    ranks = collectives.start(ranks)
    config.trainer.update(run=run, resume=resume, weights=weights, ranks=ranks, shard_states=shard_states,
                          adapter=adapter)
    if config.train_dataset.data_loader.type == "PanguJsonlLoader":
        config.train_dataset.data_loader.tensor_parallel = ranks.tensor
    run.rank = get_real_rank()
    if adapter and run.rank == 0:
        print(share_trained(config_from_dict(fields["model"]["model_config"]), adapter), file=sys.stderr)
    Trainer(config).train()


def check_keys(fields):
    """`ConfigError` names an unknown key of a section of ours, and the nearest known one."""
    sections = [*CONFIG_NAME_TO_CLASS, *GeneralConfig.keys(), "pangu_training"]
    for name in fields.keys() - set(sections):  # MindFormers reads others too, which it lists nowhere
        if near := difflib.get_close_matches(name, sections, 1, 0.8):
            raise ConfigError(f"{name}: no such section; did you mean {near[0]}?")
    TrainingSettings.from_dict(fields["pangu_training"])
    directory = fields.get("pretrained_model_dir") or fields.get("load_checkpoint")
    extra = read_config(directory).extra if directory else {}
    model_config = fields["model"]["model_config"]
    check_section("model.model_config", model_config, [*config_class(model_config).given_fields(), *extra])
    typed = [("train_dataset.data_loader", fields["train_dataset"]["data_loader"]), ("optimizer", fields["optimizer"]),
             ("runner_wrapper", fields["runner_wrapper"])]
    typed += [(f"callbacks.{given.get('type')}", given) for given in fields["callbacks"]]
    for section, given in typed:
        if owner := OWN.get(given.get("type")):
            check_section(section, given, ["type", *inspect.signature(owner).parameters])
        elif near := difflib.get_close_matches(str(given.get("type")), OWN, 1, 0.8):
            raise ConfigError(f"{section}.type: no {given['type']}; did you mean {near[0]}?")
    if fields["trainer"].get("type") != "PanguTrainer":
        raise ConfigError(f"trainer.type: found {fields['trainer'].get('type')}, wanted PanguTrainer, which is "
                          "MindFormers' CausalLanguageModelingTrainer with checkpoints of ours")
    ours = {"PanguMonitor", "PanguCheckpoint"} & {given.get("type") for given in fields["callbacks"]}
    if ours and fields["runner_wrapper"].get("type") != "PanguTrainStep":
        raise ConfigError(f"runner_wrapper.type: found {fields['runner_wrapper'].get('type')}, but callbacks name "
                          f"{min(ours)}, which reads what PanguTrainStep gives; take that or other callbacks")
    if "warmup_epochs" in (fields.get("lr_schedule") or {}):
        raise ConfigError("lr_schedule.warmup_epochs: all epochs are one here, of which a resumed run sees the rest; "
                          "give warmup_steps or warmup_ratio")
    columns = fields["train_dataset"].get("input_columns")
    if columns != COLUMNS:
        raise ConfigError(f"train_dataset.input_columns: found {columns}, wanted {COLUMNS}")


OWN = {"PanguJsonlLoader": PanguJsonlLoader.__new__, "PanguMuon": PanguMuon, "PanguTrainStep": PanguTrainStep,
       "PanguMonitor": PanguMonitor, "PanguCheckpoint": PanguCheckpoint}


def mindformers_config(fields, output_dir):
    """What MindFormers reads of a file, with the keys changed that would set something of its own going."""
    fields |= {"use_legacy": False, "output_dir": os.path.join(output_dir, "mindformers"), "load_checkpoint": "",
               "pretrained_model_dir": ""}
    callbacks = fields.pop("callbacks")
    ConfigTemplate.apply_template(fields)
    fields["callbacks"] = callbacks                                             # its template adds MFLossMonitor
    fields["train_dataset"].setdefault("drop_remainder", True)
    return MindFormerConfig(**fields)
