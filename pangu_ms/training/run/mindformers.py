"""openPangu inside MindFormers: what a YAML file names by `type`, and the run of such a file.

The only file that imports MindFormers. Importing it registers, by their names: the model (the model_type and
architectures of each member of the family), the loaders PanguJsonlLoader and PanguIndexedLoader, the optimizer
PanguMuon, the wrapper PanguTrainStep, the callbacks PanguMonitor and PanguCheckpoint, and PanguTrainer, MindFormers'
trainer with the overrides that its methods explain.
MindFormers writes a log directory when it is imported: `pangu_ms.training.run.command` says where, before.
"""
import copy
import os
import sys
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindformers import Trainer, build_context
from mindformers.dataset.dataloader.build_dataloader import build_dataset_loader
from mindformers.models import PretrainedConfig, PreTrainedModel
from mindformers.parallel_core.utils.model_mixin import ModelMixin, TrainModelMixin
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.register.template import ConfigTemplate
from mindformers.tools.utils import get_real_rank
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore import ops

from pangu_ms import device
from pangu_ms.architectures import ARCHITECTURES, config_class, config_from_dict
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.parallel import collectives
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.pretrained import PanguForCausalLM
from pangu_ms.training.data import LOADERS
from pangu_ms.training.data.loader import Epochs, PanguIndexedLoader, PanguJsonlLoader, source_of
from pangu_ms.training.data.packing import COLUMNS
from pangu_ms.training.data.ramp import ramped
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.objectives.pretraining import Pretraining
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.training.optimizer.pangu_muon import PanguMuon
from pangu_ms.training.run.adapters import add_adapter, share_trained
from pangu_ms.training.run.callbacks import PanguCheckpoint, PanguMonitor, Run
from pangu_ms.training.run.evaluation import Evaluation, forward_objective, report
from pangu_ms.training.run.fields import prepare
from pangu_ms.training.run.held_out import read_held_out
from pangu_ms.training.run.restore import begin_stage, restore
from pangu_ms.training.run.schedules import check_total_steps
from pangu_ms.training.step import TrainStep

for loader in (PanguJsonlLoader, PanguIndexedLoader):
    MindFormerRegister.register_cls(loader, MindFormerModuleType.DATASET_LOADER)
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
        outputs = self.objective(input_ids, labels, loss_mask, position_ids)
        total, parts = outputs[0], outputs[1]
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
        accumulation, bias_update_rate, skips, sequences: from the trainer; `sequences` go through the network at once.
    """

    def __init__(self, network, optimizer, use_clip_grad=True, max_grad_norm=1.0, accumulation=1, bias_update_rate=0.0,
                 skips=False, sequences=1, **_):
        super().__init__(_ours(network).objective, optimizer, accumulation,
                         max_grad_norm if use_clip_grad else None, bias_update_rate, skips)
        self.sequences = sequences

    def __call__(self, *batch):
        if not self.accumulates:
            return super().__call__(*batch)
        self.accumulation = len(batch[0]) // self.sequences                     # which grows with the batch
        columns = [np.split(column.asnumpy(), self.accumulation) for column in batch]
        outputs = [super(PanguTrainStep, self).__call__(*(ms.Tensor(column) for column in part))
                   for part in zip(*columns)]
        total, parts, norm, load, squares, *largest = ([output.asnumpy() for output in outputs]
                                                       for outputs in zip(*outputs))
        means = (np.mean(total), np.mean(parts, 0), norm[-1], np.sum(load, 0), squares[-1],
                 *(np.max(each, 0) for each in largest))
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
        load_optimizer: the optimizer's states start from `weights` too.
        adapter (Adapter): trained in place of the model.
    """

    def __init__(self, model_name=None, run=None, resume=None, weights=None, ranks=Ranks(), shard_states=False,
                 load_optimizer=False, adapter=None):
        super().__init__(model_name)
        self.adapter = adapter
        self.run, self.resume, self.weights, self.ranks = run, resume, weights, ranks
        self.shard_states, self.load_optimizer, self.source = shard_states, load_optimizer, None

    def _check_grad_accumulation_steps(self):
        """Theirs resets accumulation to 1 unless parallel_mode is semi_auto_parallel; ours is in `TrainStep`."""
        runner, wrapper = self.config.runner_config, self.config.runner_wrapper
        if wrapper.type == "PanguTrainStep":
            settings = TrainingSettings.from_dict(self.config.pangu_training)
            wrapper.bias_update_rate, wrapper.skips = settings.router_bias_update_rate, settings.skip_nonfinite > 0
            wrapper.accumulation = runner.gradient_accumulation_steps or 1
            wrapper.sequences = runner.batch_size
            if settings.batch_ramp:
                wrapper.accumulation = self._batches(settings.batch_ramp).largest
            else:
                runner.batch_size *= wrapper.accumulation
            runner.gradient_accumulation_steps = 1
        super()._check_grad_accumulation_steps()

    def _batches(self, ramp):
        """How many batches a step has of those that go through the network at once, a `ByStep`."""
        at_once = self.config.runner_wrapper.sequences * self.ranks.batch
        if wrong := [value for value in ramp.values if value % at_once]:
            raise ConfigError(f"pangu_training.batch_ramp: found {wrong[0]}, wanted multiples of {at_once}, the "
                              "sequences of runner_config.batch_size on all devices")
        return ramp.divided(at_once)

    def _train_dataset_postprocess(self, dataset, config):
        """A resumed run skips the sequences it has had. Theirs resumes from `rank_*` files of a parallel run alone,
        behind a barrier, for which a CPU has no kernel."""
        dataset = super()._train_dataset_postprocess(dataset, config)
        source, vocab_size = source_of(dataset), config.model.model_config.vocab_size
        if isinstance(source, Epochs) and source.largest_id >= vocab_size:
            raise ConfigError(f"{config.train_dataset.data_loader.tokenizer}: gives the token "
                              f"{source.largest_id}, but model.model_config.vocab_size is {vocab_size}; train "
                              "with the tokenizer of the model")
        if isinstance(source, Epochs):
            source.vocab_size, self.source = vocab_size, source
        else:
            dataset = dataset.repeat(config.runner_config.epochs)
        config.runner_config.epochs = 1
        # Theirs counts every device's batch; tensor parallel ranks have the same one.
        batch, ramp = self.global_batch_size // self.ranks.tensor, self.run.batch_ramp
        self.run.steps, self.run.sequences_per_step = dataset.get_dataset_size(), batch
        if ramp:
            self.run.steps = self._batches(ramp).steps_within(self.run.steps)
        if not self.run.steps:
            raise ConfigError(f"train_dataset: has fewer sequences than the global batch of {batch}; lower "
                              "runner_config.batch_size or bring more data")
        if self.run.start and self.run.sequences != self.run.sequences_before(self.run.start + 1):
            raise ConfigError(f"runner_config.batch_size: makes steps of {batch} sequences on all devices, but those "
                              f"of {self.resume} had {self.run.sequences // self.run.start}; give as many")
        if self.run.start >= self.run.steps:
            raise PanguError(f"{self.resume}: the run has made all of its {self.run.steps} steps; to train on, begin "
                             "another with load_checkpoint")
        check_total_steps(config.lr_schedule, self.run.steps)
        if config.lr_schedule and config.lr_schedule.total_steps in (None, -1):
            config.lr_schedule.total_steps = self.run.steps
        if self.run.start and isinstance(source, Epochs):
            source.first = self.run.sequences                                   # skip would read them
        elif self.run.start:
            dataset = dataset.skip(self._batches(ramp).total(self.run.start) if ramp else self.run.start)
        if ramp:
            return ramped(dataset, self._batches(ramp), self.run.start, self.run.steps)
        return dataset.take(self.run.steps - self.run.start) if self.run.start else dataset

    def training_process(self, *arguments, **named):
        """What is wrong with the data is one line, not MindSpore's report of it."""
        try:
            super().training_process(*arguments, **named)
        except RuntimeError:
            if self.source is not None and self.source.error:
                raise self.source.error from None
            raise

    def create_network(self, default_args=None):
        """The network is told what belongs to it besides `model_config`, and which layers to compute again."""
        own = {"pangu_training": self.config.pangu_training, "pangu_weights": self.weights, "pangu_seed": self.run.seed,
               "pangu_ranks": self.ranks, "pangu_adapter": self.adapter}
        network = super().create_network({**(default_args or {}), **own})
        if self.config.recompute_config and self.config.recompute_config.recompute:
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
        """Ours are told of the run, since MindFormers makes callbacks from the file's keys alone. The one that saves is
        called last: a run that goes on from what it saved does not get a line of the log again."""
        for callback in default_callbacks:
            if isinstance(callback, PanguMonitor | PanguCheckpoint):
                callback.run = self.run
        return sorted(super().sort_callbacks(default_callbacks), key=lambda each: isinstance(each, PanguCheckpoint))

    def create_model_wrapper(self, network, optimizer):
        """In a resumed run the step gets every parameter back, in a new stage all but the count of steps. Evaluation in
        training is ours, see `PanguMonitor`."""
        step = super().create_model_wrapper(network, optimizer)
        if self.resume:
            restore(step, self.resume, self.ranks)
        elif self.load_optimizer:
            begin_stage(step, self.weights, self.ranks)
        if self.run.held_out:
            self.run.evaluation = make_evaluation(self.run.held_out, step.causal_lm)
        return step


def train(fields, output_dir, resume=None, state=None):
    """Runs the contents of a YAML file.

    Args:
        fields: MindFormers' sections, and `pangu_training`.
        output_dir: an absolute path; what MindFormers writes goes to mindformers/ in it.
        resume, state: the checkpoint to go on from, and its `RunState`.

    Raises:
        PanguError: an unknown key of one of our sections, or what model, data and callbacks refuse.
    """
    given, fields, ranks, adapter = prepare(fields, resume, state)
    check_device(fields)
    load_optimizer = not state and fields.get("load_optimizer", False)
    # MindSpore's own way of sharding them, behind the same key, is for its own optimizers.
    shard_states = (fields.get("parallel") or {}).pop("enable_parallel_optimizer", False)
    settings = TrainingSettings.from_dict(fields["pangu_training"])
    run = Run(output_dir, given, fields["seed"], steps=0, start=state.step if state else 0, sequences_per_step=0,
              sequences=state.sequences if state else 0,
              tokenizer=fields["train_dataset"]["data_loader"].get("tokenizer"), batch_ramp=settings.batch_ramp,
              skip_nonfinite=settings.skip_nonfinite, epochs=fields["runner_config"].get("epochs", 1),
              held_out=read_held_out(fields), tensorboard=fields.get("tensorboard"))
    config = mindformers_config(copy.deepcopy(fields), output_dir)
    weights = fields.get("load_checkpoint") or fields.get("pretrained_model_dir")
    build_context(config)
    ranks = collectives.start(ranks)
    config.trainer.update(run=run, resume=resume, weights=weights, ranks=ranks, shard_states=shard_states,
                          load_optimizer=load_optimizer, adapter=adapter)
    if config.train_dataset.data_loader.type in LOADERS:
        config.train_dataset.data_loader.tensor_parallel = ranks.tensor
    run.rank = get_real_rank()
    if adapter and run.rank == 0:
        print(share_trained(config_from_dict(fields["model"]["model_config"]), adapter), file=sys.stderr)
    Trainer(config).train()


def evaluate(fields, output_dir):
    """Evaluates `load_checkpoint` on `eval_dataset`: writes eval.json in `output_dir` and returns a line that says what
    is in it; None on all ranks but the first.

    Raises:
        PanguError: as `train`, and when the file names no checkpoint.
    """
    _, fields, ranks, _ = prepare(fields)
    check_device(fields)
    weights = fields.get("load_checkpoint") or fields.get("pretrained_model_dir")
    config = mindformers_config(copy.deepcopy(fields) | {"run_mode": "train"}, output_dir)
    build_context(config)
    ranks = collectives.start(ranks)
    model = load(weights, PanguModelConfig(**fields["model"]["model_config"]).fields, ranks)
    return report(make_evaluation(read_held_out(fields), model), weights, output_dir)


def make_evaluation(held_out, causal_lm):
    """The `Evaluation` of a model as a `HeldOut` says; every rank reads all of its data."""
    dataset = build_dataset_loader(MindFormerConfig(**held_out.loader)).project(COLUMNS)
    return Evaluation(forward_objective(causal_lm), held_out, causal_lm.config.vocab_size,
                      lambda: dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))


def check_device(fields):
    """`ConfigError` when this process has not the device; MindFormers' own default is Ascend."""
    wanted = (fields.get("context") or {}).get("device_target", "Ascend")
    if not device.available(wanted):
        raise ConfigError(f"context.device_target: {device.NO_ASCEND}")


def mindformers_config(fields, output_dir):
    """What MindFormers reads of a file, with the keys changed that would set something of its own going."""
    fields |= {"use_legacy": False, "output_dir": os.path.join(output_dir, "mindformers"), "load_checkpoint": "",
               "pretrained_model_dir": ""}
    for name in ("do_eval", "eval_dataset", "eval_dataset_task", "eval_step_interval", "eval_epoch_interval",
                 "tensorboard"):
        fields.pop(name, None)                                                  # ours, see `Run`
    fields["parallel"] = {**(fields.get("parallel") or {}), "parallel_mode": 0}  # theirs divides graphs
    callbacks = fields.pop("callbacks")
    ConfigTemplate.apply_template(fields)
    fields["callbacks"] = callbacks                                             # its template adds MFLossMonitor
    fields["train_dataset"].setdefault("drop_remainder", True)
    return MindFormerConfig(**fields)
