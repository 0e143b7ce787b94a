"""openPangu-2.0 inside MindFormers: what a YAML file names by `type`, and the run of such a file.

The only file that imports MindFormers. Importing it registers, by their names: the model (model_type openpangu_v2), the
loader PanguJsonlLoader, the optimizer PanguMuon, the wrapper PanguTrainStep, the callbacks PanguMonitor and
PanguCheckpoint, and PanguTrainer, MindFormers' trainer with the overrides that its methods explain.
MindFormers writes a log directory when it is imported: `pangu_ms.training.command` says where, before.
"""
import copy
import difflib
import inspect
import json
import os
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
from mindspore.dataset import GeneratorDataset

from pangu_ms.checkpoint.load import read_config
from pangu_ms.config import PanguConfig
from pangu_ms.errors import ConfigError, PanguError, check_section
from pangu_ms.model.causal_lm import PanguForCausalLM
from pangu_ms.model.parallel import Parallel
from pangu_ms.training.callbacks import PanguCheckpoint, PanguMonitor, Run, source_of, split_parameters
from pangu_ms.training.chat_data import read_chats
from pangu_ms.training.data import read_texts
from pangu_ms.training.forward import TrainingForward
from pangu_ms.training.initial_values import initialize
from pangu_ms.training.optimizer import PanguMuon
from pangu_ms.training.packing import PackedDataset
from pangu_ms.training.parallel import find_parallel
from pangu_ms.training.settings import TrainingSettings
from pangu_ms.training.state import check_fields, checkpoints, flatten, read_checkpoint
from pangu_ms.training.step import TrainStep

COLUMNS = ["input_ids", "labels", "loss_mask", "position_ids"]
MODEL_KEYS = [name for name in PanguConfig.__dataclass_fields__ if name not in ("extra", "implied")]
# A resumed run may have these otherwise: they change where things are written and computed, not what.
FREE_KEYS = ("output_dir", "callbacks", "use_parallel", "parallel", "parallel_config", "runner_config.batch_size",
             "runner_config.gradient_accumulation_steps")

for callback in (PanguMonitor, PanguCheckpoint):
    MindFormerRegister.register_cls(callback, MindFormerModuleType.CALLBACK)


@MindFormerRegister.register(MindFormerModuleType.CONFIG, legacy=False, search_names="openpangu_v2")
class PanguModelConfig(PretrainedConfig):
    """`model.model_config`: the fields of PanguConfig under their names; what MindFormers adds to them is ignored."""

    model_type = "openpangu_v2"

    def __init__(self, pangu_training=None, pangu_weights=None, pangu_seed=0, pangu_parallel=None, **fields):
        super().__init__(architectures=["OpenPanguV2ForCausalLM"])
        known = {name: fields[name] for name in MODEL_KEYS if name in fields}
        self.fields = {name: dict(value) if isinstance(value, dict) else value for name, value in known.items()}
        self.pangu_training, self.pangu_weights, self.pangu_seed = pangu_training or {}, pangu_weights, pangu_seed
        self.pangu_parallel = pangu_parallel


@MindFormerRegister.register(MindFormerModuleType.MODELS, legacy=False)
class OpenPanguV2ForCausalLM(TrainModelMixin, PreTrainedModel, ModelMixin):
    """`TrainingForward` as MindFormers calls a network in training.

    `construct` gives what its own wrappers add up: (lm, mtp, auxiliary, indexer) losses with their weights, float32 [1]
    each. PanguTrainStep takes `training_forward` out of it.
    """

    config_class = PanguModelConfig
    base_model_prefix = "model"
    weight_mapping = []

    def __init__(self, config):
        super().__init__(config, auto_prefix=False)
        settings = TrainingSettings.from_dict(config.pangu_training)
        if config.pangu_weights:
            model = load(config.pangu_weights, config.fields, config.pangu_parallel)
        else:
            model = PanguForCausalLM(PanguConfig.from_dict(config.fields), config.pangu_parallel)
            initialize(model, config.pangu_seed, settings)
        self.training_forward = TrainingForward(model, settings)
        self.transformer_config = SimpleNamespace(
            mtp_num_layers=model.config.num_nextn_predict_layers, num_moe_experts=model.config.n_routed_experts,
            enable_expert_relocation=False, print_expert_load=False)
        kinds = [0 if name == "lm" else 1 if name.startswith("mtp") else 3 if name == "indexer_kl" else 2
                 for name in self.training_forward.part_names]
        self.columns = ms.Tensor(np.eye(4, dtype=np.float32)[kinds])            # [P, 4]

    def construct(self, input_ids, labels=None, loss_mask=None, position_ids=None):
        total, parts, _ = self.training_forward(input_ids, labels, loss_mask, position_ids)
        losses = ops.matmul(ops.expand_dims(parts * self.training_forward.weights, 0), self.columns)     # [1, 4]
        # The parts carry no gradient: it all goes through the first, whose value stays its own.
        first = losses[:, 0] + total - ops.stop_gradient(total)
        return first, losses[:, 1], losses[:, 2], losses[:, 3]


def load(directory, fields, parallel=None):
    """The model of a checkpoint directory; `ConfigError` when `fields` say otherwise than its config.json."""
    config = read_config(directory)
    for name, value in fields.items():
        value, found = tuple(value) if isinstance(value, list) else value, getattr(config, name)
        if name not in ("compute_dtype", "dtype", "torch_dtype") and value != found:
            raise ConfigError(f"model.model_config.{name}: found {value!r}, but {directory} has {found!r}; leave out "
                              "of model_config what the checkpoint says")
    dtype = fields.get("compute_dtype", "float32")
    return PanguForCausalLM.from_pretrained(directory, dtype=dtype, parallel=parallel)


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class PanguJsonlLoader:
    """Packed sequences of a JSONL file, all epochs of it, in an order that `seed` and the epoch decide.

    Args:
        path: the file.
        tokenizer: a directory with tokenizer.json, and chat_template.jinja for chats.
        seq_length: tokens in a sequence.
        documents: "texts" or "chats": what the lines hold, see `pangu_ms.training.data` and `.chat_data`.
        seed: of the order; the run's where it is not given.
        epochs, tensor_parallel, num_shards, shard_id: from the trainer. Tensor parallel ranks get the same sequences.
    """

    def __new__(cls, path, tokenizer, seq_length, documents="texts", seed=0, epochs=1, tensor_parallel=1,
                num_shards=None, shard_id=None, **_):
        if documents not in ("texts", "chats"):
            raise ConfigError(f"train_dataset.data_loader.documents: found {documents!r}, wanted texts or chats")
        read = read_texts if documents == "texts" else read_chats
        source = _Epochs(read(path, tokenizer), seq_length, seed, epochs)
        if num_shards is not None:
            num_shards, shard_id = num_shards // tensor_parallel, shard_id // tensor_parallel
            source.length -= source.length % num_shards                         # or some sequences would come again
        return GeneratorDataset(source, COLUMNS, shuffle=False, num_parallel_workers=1, python_multiprocessing=False,
                                num_shards=num_shards, shard_id=shard_id)


class _Epochs:
    """The epochs of a `PackedDataset` one behind the other, so that a step's number says which sequences it has."""

    def __init__(self, documents, seq_length, seed, epochs):
        self.packed = PackedDataset(documents, seq_length, seed)
        self.length, self.largest_id = epochs * len(self.packed), documents.ids.max().item()

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        return self.packed[int(n)]

    def documents(self, n):
        return self.packed.documents(n)


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
        super().__init__(_ours(network).training_forward, optimizer, accumulation,
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
    while not isinstance(network, OpenPanguV2ForCausalLM):
        network = network.network
    return network


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class PanguTrainer(CausalLanguageModelingTrainer):
    """MindFormers' trainer, of which some steps are done otherwise; each override says why.

    Args:
        run: the `Run`, as far as it is known before data and network are.
        resume: the directory of the checkpoint to go on from.
        weights: a checkpoint directory whose weights the model starts from.
        parallel (Parallel): this process's place.
        divide_states: ranks that hold the same parameters divide the optimizer's states among them.
    """

    def __init__(self, model_name=None, run=None, resume=None, weights=None, parallel=Parallel(), divide_states=False):
        super().__init__(model_name)
        self.run, self.resume, self.weights, self.parallel = run, resume, weights, parallel
        self.divide_states = divide_states

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
        if isinstance(source, _Epochs) and source.largest_id >= vocab_size:
            raise ConfigError(f"{config.train_dataset.data_loader.tokenizer}: gives the token "
                              f"{source.largest_id}, but model.model_config.vocab_size is {vocab_size}; train "
                              "with the tokenizer of the model")
        if not isinstance(source, _Epochs):
            dataset = dataset.repeat(config.runner_config.epochs)
        config.runner_config.epochs = 1
        # Theirs counts every device's batch; tensor parallel ranks have the same one.
        batch = self.global_batch_size // self.parallel.tensor
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
               "pangu_parallel": self.parallel}
        network = super().create_network({**(default_args or {}), **own})
        recompute = self.config.recompute_config.recompute if self.config.recompute_config else False
        if type(recompute) is not bool:
            raise ConfigError(f"recompute_config.recompute: found {recompute!r}, wanted True or False")
        if recompute:
            for layer in _ours(network).training_forward.causal_lm.model.layers:
                layer.recompute()
        return network

    def create_optimizer_scheduler(self, network, model_params):
        """Ours reads sizes of heads from the model's config, and which of them are on other devices."""
        if self.config.optimizer.type == "PanguMuon":
            self.config.optimizer.config = _ours(network).training_forward.causal_lm.config
            self.config.optimizer.parallel = self.parallel
            self.config.optimizer.divide_states = self.divide_states
        return super().create_optimizer_scheduler(network, model_params)

    def create_model_wrapper(self, network, optimizer):
        """The step carries the run's record for the callbacks and, in a resumed run, gets every parameter back."""
        step = super().create_model_wrapper(network, optimizer)
        step.run = self.run
        if not self.resume:
            return step
        divided = optimizer.divided_names if isinstance(optimizer, PanguMuon) else set()
        saved = read_checkpoint(self.resume, self.parallel.grid, self.parallel.model_rank)
        for parameters, arrays, others in zip(split_parameters(step), saved, (set(), divided)):
            wanted = parameters.keys() | others
            if wanted != arrays.keys():
                name = min(wanted ^ arrays.keys())
                raise ConfigError(f"{self.resume}: {name} is {'not' if name in wanted else 'only'} there; another "
                                  "version of this package wrote it: begin a new run with load_checkpoint")
            for name, parameter in parameters.items():
                tensor = ms.Tensor(arrays[name])
                parameter.set_data(tensor.view(ms.bfloat16) if parameter.dtype == ms.bfloat16 else tensor)
        if divided:
            optimizer.set_divided_states(saved[1])
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
    given = {key: value for key, value in flatten(fields).items()
             if key not in FREE_KEYS and key.partition(".")[0] not in FREE_KEYS}
    given = json.loads(json.dumps(given, default=str))                          # as a checkpoint gives them back
    if state:
        check_fields(resume, state, given)
        fields = fields | {"load_checkpoint": resume, "pretrained_model_dir": ""}
    fields = complete(fields)
    check_keys(fields)
    parallel = find_parallel(fields)
    # MindSpore's own way of dividing them, behind the same key, is for its own optimizers.
    divide_states = (fields.get("parallel") or {}).pop("enable_parallel_optimizer", False)
    run = Run(output_dir, given, fields["seed"], steps=0, start=state.step if state else 0, sequences_per_step=0,
              sequences=state.sequences if state else 0,
              tokenizer=fields["train_dataset"]["data_loader"].get("tokenizer"))
    config = mindformers_config(copy.deepcopy(fields), output_dir)
    weights = fields.get("load_checkpoint") or fields.get("pretrained_model_dir")
    if fields["run_mode"] == "finetune" and not weights:
        raise ConfigError("run_mode: found finetune without weights; give load_checkpoint or pretrained_model_dir")
    build_context(config)
    parallel = parallel.start()
    config.trainer.update(run=run, resume=resume, weights=weights, parallel=parallel, divide_states=divide_states)
    if config.train_dataset.data_loader.type == "PanguJsonlLoader":
        config.train_dataset.data_loader.tensor_parallel = parallel.tensor
    run.rank = get_real_rank()
    Trainer(config).train()


def complete(fields):
    """The sections as given, with defaults where a section of ours would otherwise depend on MindFormers'."""
    fields = {"seed": 0, "run_mode": "train", "pangu_training": {}, "runner_wrapper": {"type": "PanguTrainStep"},
              "callbacks": [{"type": "PanguMonitor"}, {"type": "PanguCheckpoint"}]} | copy.deepcopy(fields)
    for section in ("trainer", "train_dataset", "optimizer", "runner_config"):
        if not isinstance(fields.get(section), dict):
            raise ConfigError(f"{section}: found {fields.get(section)!r}, wanted a section; see configs/openpangu_v2")
    loader = fields["train_dataset"].setdefault("data_loader", {})
    if loader.get("type") == "PanguJsonlLoader":
        loader.setdefault("seed", fields["seed"])
        loader["epochs"] = fields["runner_config"].get("epochs", 1)
    for key in ("load_checkpoint", "pretrained_model_dir"):
        if newest := checkpoints(fields.get(key) or ""):                        # a run of ours
            fields[key] = newest[-1]
    model = fields["model"] = fields.get("model") or {}
    directory = fields.get("pretrained_model_dir") or fields.get("load_checkpoint")
    known = read_config(directory).to_dict() if directory else {}
    model["model_config"] = known | (model.get("model_config") or {})
    model["model_config"] |= {"model_type": "openpangu_v2", "architectures": ["OpenPanguV2ForCausalLM"]}
    return fields


def check_keys(fields):
    """`ConfigError` names an unknown key of a section of ours, and the nearest known one."""
    sections = [*CONFIG_NAME_TO_CLASS, *GeneralConfig.keys(), "pangu_training"]
    for name in fields.keys() - set(sections):  # MindFormers reads others too, which it lists nowhere
        if near := difflib.get_close_matches(name, sections, 1, 0.8):
            raise ConfigError(f"{name}: no such section; did you mean {near[0]}?")
    TrainingSettings.from_dict(fields["pangu_training"])
    directory = fields.get("pretrained_model_dir") or fields.get("load_checkpoint")
    extra = read_config(directory).extra if directory else {}
    check_section("model.model_config", fields["model"]["model_config"], [*MODEL_KEYS, *extra])
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
