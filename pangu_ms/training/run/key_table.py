"""Every key of a YAML file for training: what it does here, or why it is refused. Needs no MindFormers.

A key is `Applied`, by this package or by MindFormers with this package's trainer, or `Refused` unless it has a value
that asks for nothing. `python tools/train.py --list-keys` prints the table, which is configs/README.md.
"""
import dataclasses
import inspect
import re

from pangu_ms.training.data.packing import COLUMNS
from pangu_ms.training.objectives.settings import TrainingSettings
from pangu_ms.yaml_keys import (
    ANY,
    BOOL,
    MAPPING,
    NOT_NEGATIVE,
    NUMBERS,
    PATH,
    POSITIVE,
    RATIO,
    TEXT,
    Applied,
    Kind,
    Refused,
    Section,
    choice,
    context_table,
    integer,
    number,
    or_none,
)

ONE, ZERO, INTERVAL, SEED = integer(1), integer(0), integer(-1), integer(0, 2 ** 32 - 1)
_BETA = number("a number from 0 to below 1", least=0, most=1 - 1e-12)


def _numbers(count, kind):
    def read(value):
        if not isinstance(value, (list, tuple)) or count and len(value) != count:
            raise ValueError
        return [kind.read(each) for each in value]
    return read


BETAS = Kind("two numbers from 0 to below 1", _numbers(2, _BETA))
STEPS = Kind("a list of steps, each of three numbers",
             _numbers(None, Kind("three numbers", _numbers(3, number("a number")))))
HAND_WRITTEN = "the network divides itself among ranks; "
CHECKPOINTS = "checkpoints are ours, whole safetensors that any ranks read; "
NO_DATA_STAGE = "data come as the loader gives them; "
PROFILE = "with profile: "

CONTEXT = context_table(training=True)

TOP = {
    "seed": Applied("of data order and initial values", SEED),
    "output_dir": Applied("log.jsonl, checkpoints/ and mindformers/ go there", TEXT),
    "run_mode": Applied("finetune and eval want weights to start from", choice("train", "finetune", "eval")),
    "use_parallel": Applied("whether msrun's processes share the run", BOOL),
    "load_checkpoint": Applied("a checkpoint or a run whose weights the run starts from", PATH),
    "pretrained_model_dir": Applied("the same, where load_checkpoint is not given", PATH),
    "train_precision_sync": Applied("deterministic operators", or_none(BOOL)),
    "lr_scale": Applied("multiplies the rate by devices * batch_size / lr_scale_factor", BOOL),
    "lr_scale_factor": Applied("with lr_scale", POSITIVE),
    "profile": Applied("MindSpore's profiler, by MindFormers' ProfileMonitor", BOOL),
    "profile_start_step": Applied(PROFILE + "its first step", ZERO),
    "profile_stop_step": Applied(PROFILE + "its last step", ZERO),
    "init_start_profile": Applied(PROFILE + "whether it starts at once", BOOL),
    "profile_communication": Applied(PROFILE + "communication too", BOOL),
    "profile_memory": Applied(PROFILE + "memory too", BOOL),
    "profile_rank_ids": Applied(PROFILE + "these ranks alone"),
    "profile_pipeline": Applied(PROFILE + "one rank of each pipeline stage, of which there is one", BOOL),
    "profile_output": Applied(PROFILE + "where it is written", TEXT),
    "profiler_level": Applied(PROFILE + "how much", choice(0, 1, 2)),
    "with_stack": Applied(PROFILE + "Python's stack too", BOOL),
    "data_simplification": Applied(PROFILE + "whether raw files are removed", BOOL),
    "mstx": Applied(PROFILE + "marks of steps", BOOL),
    "do_eval": Applied("held-out losses while it trains, by PanguMonitor", BOOL),
    "eval_step_interval": Applied("evaluates after so many steps; -1: not", INTERVAL),
    "eval_epoch_interval": Applied("evaluates after so many epochs; -1: not", INTERVAL),
    "eval_steps": Refused("give eval_dataset.num_samples"),
    "eval_callbacks": Refused("PanguMonitor shows and logs what evaluation finds", ([],)),
    "metric": Refused("held-out losses and the perplexity are what is told", ({},)),
    "monitor_config": Refused("norms and losses are in log.jsonl", ({
        "monitor_on": False, "dump_path": "./dump", "target": None, "invert": False, "step_interval": 1,
        "local_loss_format": None, "local_norm_format": None, "device_local_norm_format": None,
        "device_local_loss_format": None, "optimizer_state_format": None, "weight_state_format": None,
        "max_attention_logit_format": None, "throughput_baseline": None, "print_struct": False,
        "check_for_global_norm": False, "global_norm_spike_threshold": 3.0, "global_norm_spike_count_threshold": 10,
        "stable_rank_config": None, "health_checkpoint": None},)),
    "load_optimizer": Applied("takes moments and selection biases of load_checkpoint too", BOOL),
    "resume_training": Refused("pangu-train --resume goes on from the newest checkpoint in output_dir", (False,)),
    "ignore_data_skip": Refused("a resumed run goes on with the sequences that it has not had", (False,)),
    "data_skip_steps": Refused("a resumed run goes on with the sequences that it has not had", (0,)),
    "checkpoint": Refused("it is for MindFormers' checkpoints; load_checkpoint reads ours, and PanguCheckpoint of "
                          "callbacks writes them", ({},)),
    "auto_trans_ckpt": Refused(CHECKPOINTS + "leave it out", (False, True)),
    "load_ckpt_format": Refused(CHECKPOINTS + "convert others by pangu-convert", ("safetensors",)),
    "load_ckpt_async": Refused(CHECKPOINTS + "leave it out", (False,)),
    "use_legacy_format": Refused(CHECKPOINTS + "leave it out", (True,)),
    "transform_process_num": Refused(CHECKPOINTS + "leave it out", (1,)),
    "src_strategy_path_or_dir": Refused(CHECKPOINTS + "leave it out", ("",)),
    "only_save_strategy": Refused(CHECKPOINTS + "there are no strategies", (False,)),
    "remove_redundancy": Refused(CHECKPOINTS + "they hold everything once", (False,)),
    "balanced_load": Refused(CHECKPOINTS + "each rank reads its part", (False,)),
    "reshard_worker_num": Refused(CHECKPOINTS + "each rank reads its part", (1,)),
    "mindio_pool_capacity": Refused(CHECKPOINTS + "MindIO is not used", (128,)),
    "resume_by_last_timestamp_ckpt": Refused("pangu-train --resume takes the newest complete one", (False,)),
    "use_checkpoint_health_monitor": Refused("a number that is not finite ends the run before it is saved", (False,)),
    "check_for_nan_in_loss_and_grad": Refused("PanguMonitor ends a run whose numbers are not finite", (False,)),
    "use_skip_data_by_global_norm": Refused("give pangu_training.skip_nonfinite", (False,)),
    "use_graceful_exit": Refused("it needs a callback of MindFormers that is not used here", (False,)),
    "print_separate_loss": Refused("log.jsonl has every part of the loss", (True,)),
    "calculate_per_token_loss": Refused("losses are means over the tokens of a batch", (False,)),
    "micro_batch_interleave_num": Refused("give runner_config.gradient_accumulation_steps", (1,)),
    "grouped_lr_schedule": Refused("all parameters have the rate of lr_schedule", ({},)),
    "layer_scale": Refused("all layers have the rate of lr_schedule", (False,)),
    "layer_decay": Refused("all layers have the rate of lr_schedule", (0.65,)),
    "auto_tune": Refused(NO_DATA_STAGE + "there is nothing to tune", (False,)),
    "filepath_prefix": Refused(NO_DATA_STAGE + "there is nothing to tune", ("./autotune",)),
    "autotune_per_step": Refused(NO_DATA_STAGE + "there is nothing to tune", (10,)),
    "profile_level": Refused("ProfileMonitor reads profiler_level", (1,)),
    "swap_config": Refused("nothing is moved to the host's memory; recompute_config.recompute saves memory", (
        {"swap": False, "layer_swap": None, "op_swap": None, "default_prefetch": 1},)),
    "moe_config": Refused("model.model_config says what the experts are", ({},)),
    "use_legacy": Refused("the model is none of MindFormers' legacy models", (False,)),
    "generation_config": Refused("it is for predict: pangu-generate --config", ({},)),
    "processor": Refused("the tokenizer is train_dataset.data_loader.tokenizer", ({},)),
    "input_data": Refused("it is for predict: pangu-generate", ("",)),
    "predict_batch_size": Refused("it is for predict: pangu-generate"),
    "adapter_id": Refused("it is for predict: pangu-generate"),
    "infer_precision_sync": Refused("it is for predict: pangu-generate", (False,)),
    "postprocess_use_numpy": Refused("it is for predict: pangu-generate", (False,)),
    "save_file": Refused("it is for predict: pangu-generate"),
    "exclude_cann_cpu": Refused("MindFormers 1.9 does nothing with it", (False,)),
    "remote_save_url": Refused("copy output_dir yourself", ("",)),
    "push_to_hub": Refused("nothing is sent anywhere", (False,)),
    "hub_model_id": Refused("nothing is sent anywhere", ("",)),
    "trust_remote_code": Refused("no code is fetched", (False,)),
}

RUNNER = {
    "epochs": Applied("passes over the data", ONE),
    "batch_size": Applied("sequences of a device that go through the network at once", ONE),
    "gradient_accumulation_steps": Applied("batches whose gradients make one step", or_none(ONE)),
    "sink_mode": Refused("log, checkpoints and data are looked after at every step", (False,)),
    "sink_size": Refused("it goes with sink_mode, which must be False", (1, -1)),
    "num_classes": Refused("it is for images", (1,)),
    "stop_step": Refused("MindFormers 1.9 does not pass it on; give the callback TrainCallBack", (0,)),
}

PARALLEL = {
    "parallel_mode": Refused("ranks share the network by collectives of its own, for data_parallel, model_parallel and "
                             "expert_parallel", (0,)),
    "enable_parallel_optimizer": Applied("ranks that hold the same parameters share PanguMuon's states", BOOL),
    "gradients_mean": Refused("gradients are means over ranks", (True,)),
    "full_batch": Refused("each rank reads its own sequences", (False,)),
    "dataset_strategy": Refused("each rank reads its own sequences"),
    "search_mode": Refused(HAND_WRITTEN + "nothing is searched for", ("sharding_propagation",)),
    "enable_alltoall": Refused(HAND_WRITTEN + "experts have their own collectives", (False,)),
    "strategy_ckpt_save_file": Refused(HAND_WRITTEN + "there are no strategies", ("./ckpt_strategy.ckpt",)),
    "strategy_ckpt_config": Refused(HAND_WRITTEN + "there are no strategies", ({},)),
    "parallel_optimizer_config": Refused("states are shared whole rows at a time", ({},)),
    "pipeline_config": Refused("there are no pipeline stages", ({},)),
    "auto_pipeline": Refused("there are no pipeline stages", (False,)),
    "loss_repeated_mean": Refused("losses are means over ranks"),
}

PARALLEL_CONFIG = {
    "data_parallel": Applied("ranks with sequences of their own, expert_parallel among them", ONE),
    "model_parallel": Applied("ranks that share heads, widths and the vocabulary", ONE),
    "expert_parallel": Applied("ranks that share the routed experts", ONE),
    "pipeline_stage": Refused("there are no pipeline stages", (1,)),
    "context_parallel": Refused("a sequence is on one device", (1,)),
    "context_parallel_algo": Refused("a sequence is on one device", ("colossalai_cp",)),
    "ulysses_degree_in_cp": Refused("a sequence is on one device", (1,)),
    "seq_split_num": Refused("a sequence is on one device", (1,)),
    "use_seq_parallel": Refused("ranks of model_parallel all have the whole sequence between heads", (False,)),
    "micro_batch_num": Refused("there are no pipeline stages; give runner_config.gradient_accumulation_steps", (1,)),
    "vocab_emb_dp": Refused("ranks of model_parallel share the vocabulary", (False,)),
    "optimizer_shard": Refused("give parallel.enable_parallel_optimizer", (False,)),
    "gradient_aggregation_group": Refused("gradients are not put together in groups", (4,)),
    "mem_coeff": Refused("nothing is estimated by it", (0.1,)),
}

WHOLE_LAYERS = "whole layers are computed again, or none; give recompute_config.recompute"
RECOMPUTE = {
    "recompute": Applied("layers are computed again in the backward pass", BOOL),
    "select_recompute": Refused(WHOLE_LAYERS, (False,)),
    "select_recompute_exclude": Refused(WHOLE_LAYERS, (False,)),
    "select_comm_recompute": Refused(WHOLE_LAYERS, (False,)),
    "select_comm_recompute_exclude": Refused(WHOLE_LAYERS, (False,)),
    "mp_comm_recompute": Refused("a layer's collectives are computed again with it", (True,)),
    "parallel_optimizer_comm_recompute": Refused("the optimizer's collectives stand outside layers", (False,)),
    "recompute_slice_activation": Refused("what is kept of a layer is not sliced", (False,)),
}

PET = {
    "pet_type": Applied("the kind of adapter", choice("lora"), needed=True),
    "lora_rank": Applied("of A and B", ONE),
    "lora_alpha": Applied("their product is scaled by alpha / rank", POSITIVE),
    "lora_dropout": Applied("of what A takes", _BETA),
    "target_modules": Applied("a regular expression of whole Hugging Face names of modules", Kind(
        r"a regular expression, such as .*\.self_attn\.\w+_proj", TEXT.read), needed=True),
    "lora_a_init": Refused("A is drawn as PEFT does, uniform up to the root of 1 / inputs"),
    "lora_b_init": Refused("B is zero"),
    "param_init_type": Refused("A and B have the dtype of the model"),
    "compute_dtype": Refused("A and B have the dtype of the model"),
    "exclude_layers": Refused("say in target_modules what is wanted"),
    "freeze_include": Refused("all of the base is frozen"),
    "freeze_exclude": Refused("all of the base is frozen"),
}
MODEL = {
    "model_config": Applied("the fields of the released config.json, and compute_dtype", or_none(MAPPING)),
    "pet_config": Section("an adapter, trained in place of the model", PET),
    "arch": Refused("model.model_config.architectures says it", ({},)),
}

_OF_LOADERS = {
    "tokenizer": Applied("a directory with a tokenizer", PATH),
    "seq_length": Applied("tokens of a sequence", ONE, needed=True),
    "documents": Applied("what a line is: a text or a chat", choice("texts", "chats")),
    "seed": Applied("of the order, where it is not the run's", SEED),
    "min_document_length": Applied("documents with fewer tokens are left out", or_none(ONE)),
    "max_document_length": Applied("documents with more tokens are left out", or_none(ONE)),
}
DATASET = {
    "data_loader": Section("where sequences come from", types={
        "PanguJsonlLoader": {
            "path": Applied("a JSONL file", PATH),
            **_OF_LOADERS},
        "PanguIndexedLoader": {
            "data_path": Applied("Megatron's .bin and .idx by their common path, or weights and such paths in turn"),
            **_OF_LOADERS},
        **dict.fromkeys(("MindDataset", "TFRecordDataset", "BlendedMegatronDatasetDataLoader", "HFDataLoader",
                         "CommonDataLoader", "TrainingDataLoader", "SFTDataLoader", "MultiSourceDataLoader"))}),
    "input_columns": Applied("of the loader, all four", Kind(str(COLUMNS), choice(COLUMNS).read), needed=True),
    "construct_args_key": Applied("the same", or_none(Kind(str(COLUMNS), choice(COLUMNS).read))),
    "num_parallel_workers": Applied("threads that put batches together", ONE),
    "prefetch_size": Applied("batches that are made in advance", ONE),
    "numa_enable": Applied("binds threads to a NUMA node", BOOL),
    "drop_remainder": Refused("all steps have as many sequences", (True,)),
    "python_multiprocessing": Refused("the loader reads in one process", (False,)),
    "batch_size": Refused("give runner_config.batch_size"),
    "seed": Refused("give seed at the top of the file, or in data_loader"),
    "repeat": Refused("give runner_config.epochs", (1,)),
    "output_columns": Refused("the network takes the columns as they are"),
    "shuffle": Refused("data_loader.seed decides the order"),
    "dynamic_batch": Refused("sequences have one length", (False,)),
    "eod_reset": Refused("PanguJsonlLoader's documents do not see each other", (False,)),
    "token_monitor": Refused("tokens are not counted", (False,)),
}

HELD_OUT = {
    "data_loader": DATASET["data_loader"],
    "input_columns": DATASET["input_columns"],
    "num_samples": Applied("sequences at most", or_none(ONE)),
    "drop_remainder": Refused("all sequences are evaluated", (False,)),
    "batch_size": DATASET["batch_size"],
    "repeat": Refused("they are evaluated once", (1,)),
}

TASK = {"CausalLanguageModelDataset": {"dataset_config": Applied("train_dataset itself, by a YAML alias",
                                                                 or_none(MAPPING))}}

THE_RATE = Refused("the rate is lr_schedule's")
ADAMW = {"betas": Applied("of the moments", BETAS), "eps": Applied("in the denominator", POSITIVE),
         "weight_decay": Applied("decoupled", NOT_NEGATIVE), "amsgrad": Applied("the largest second moment", BOOL),
         "maximize": Applied("climbs", BOOL), "use_fused": Applied("Ascend's fused operator", BOOL),
         "swap": Applied("moments in the host's memory", BOOL)}
MUON = {"weight_decay": Applied("decoupled", NOT_NEGATIVE), "momentum": Applied("Muon's", _BETA),
        "ns_coefficients": Applied("of the Newton-Schulz steps", STEPS),
        "adamw_betas": Applied("of AdamW's moments", BETAS), "adamw_eps": Applied("in AdamW's denominator", POSITIVE),
        "muon": Applied("False: AdamW for all parameters", BOOL)}
OPTIMIZERS = {
    "PanguMuon": MUON, "AdamW": ADAMW,
    **dict.fromkeys(("Adam", "adam", "AdamWeightDecay", "AdaFactor", "adafactor", "Adagrad", "adagrad", "AdaMax",
                     "Adadelta", "AdamOffload", "ASGD", "Came", "FTRL", "Lamb", "LARS", "LazyAdam", "Momentum",
                     "ProximalAdagrad", "RMSProp", "Rprop", "SGD", "sgd")),
    **dict.fromkeys(("Muon", "PmaAdamW"), Refused("it reads parts of MindFormers' own models; take PanguMuon"))}

WARMUP = {"learning_rate": Applied("the highest rate", NOT_NEGATIVE, needed=True),
          "warmup_steps": Applied("steps until that is reached", or_none(ZERO)),
          "warmup_ratio": Applied("in place of warmup_steps, as a part of total_steps", or_none(RATIO)),
          "warmup_lr_init": Applied("the rate it begins with", NOT_NEGATIVE),
          "total_steps": Applied("where the schedule ends; -1: where the run ends", or_none(ONE, -1))}
END = {"lr_end": Applied("the last rate", NOT_NEGATIVE)}
CYCLES = {"num_cycles": Applied("waves of the cosine", POSITIVE)}
DECAY = {"decay_steps": Applied("how long it falls", or_none(ONE))}
DECAY_RATIO = {"decay_ratio": Applied("in place of decay_steps, as a part of total_steps", or_none(RATIO))}
STEEP = {"power": Applied("of the polynomial", POSITIVE)}
STABLE = {"decay_start_steps": Applied("where it begins to fall", or_none(ZERO)),
          "decay_start_ratio": Applied("in place of decay_start_steps, as a part of total_steps", or_none(RATIO))}
ANNEAL = {"base_lr": Applied("the highest rate", NOT_NEGATIVE, needed=True),
          "eta_min": Applied("the lowest", NOT_NEGATIVE),
          "total_steps": Refused("it goes on for as long as the run", (-1,))}
SCHEDULES = {
    ("ConstantWarmUpLR", "constant_with_warmup"): WARMUP,
    ("LinearWithWarmUpLR", "linear"): WARMUP,
    ("CosineWithWarmUpLR", "cosine"): WARMUP | END | CYCLES | DECAY | DECAY_RATIO,
    ("CosineWithRestartsAndWarmUpLR", "cosine_with_restarts"): WARMUP | END | CYCLES | DECAY,
    ("PolynomialWithWarmUpLR", "polynomial"): WARMUP | END | DECAY | STEEP,
    ("WarmUpStableDecayLR",): WARMUP | END | STABLE,
    ("ConstantWithCoolDownLR",): WARMUP | CYCLES | DECAY | DECAY_RATIO | {
        "keep_steps": Applied("steps of the highest rate", ZERO),
        "lr_end1": Applied("the cosine's last", NOT_NEGATIVE),
        "final_steps": Applied("steps of a linear end", ZERO),
        "lr_end2": Applied("the last rate", or_none(NOT_NEGATIVE))},
    ("CosineAnnealingLR", "cosine_annealing"): ANNEAL | {"t_max": Applied("steps of half a wave", ONE, needed=True)},
    ("CosineAnnealingWarmRestarts", "cosine_annealing_warm_restarts"): ANNEAL | {
        "t_0": Applied("steps of the first wave", ONE, needed=True), "t_mult": Applied("growth of the waves", ONE)},
}
# MindFormers' schedules take any key, and ignore those of other schedules.
_ALL = {key for keys in SCHEDULES.values() for key in keys}
LR_TYPES = {name: keys | dict.fromkeys(sorted(_ALL - keys.keys()), Refused(f"{name} does not read it"))
            for names, keys in SCHEDULES.items() for name in names}
NO_WARMUP = ("CosineWithWarmUpLR", "cosine")  # need not say how long it is

CLIP = {"use_clip_grad": Applied("whether gradients are scaled down", BOOL),
        "max_grad_norm": Applied("to this norm", POSITIVE)}
WRAPPERS = {"PanguTrainStep": CLIP, **dict.fromkeys(
    ("MFTrainOneStepCell", "mf_wrapper", "MFPipelineWithLossScaleCell", "pipeline_wrapper"),
    Refused("it reads sizes that MindFormers' own models have"))}

OUTPUTS = "it would take the numbers of a PanguTrainStep for others; take PanguMonitor"
CALLBACKS = {
    "PanguMonitor": {"device": Applied("a name of `tools/estimate.py --device`, for the share of its peak",
                                       or_none(TEXT))},
    "PanguCheckpoint": {"save_checkpoint_steps": Applied("a checkpoint after so many steps", ONE),
                        "keep_checkpoint_max": Applied("how many of the newest stay", ONE),
                        "async_save": Applied("a thread writes while training goes on", BOOL)},
    "TrainCallBack": {"stop_step": Applied("ends this process after so many steps", ONE)},
    "TimeMonitor": {"data_size": Applied("steps of an epoch", or_none(ONE)),
                    "data_time": Applied("times of the data too", BOOL)},
    "StressDetectCallBack": {"detection_interval": Applied("steps between tests of the hardware", ONE, needed=True),
                             "num_detections": Applied("tests in a row", ONE, needed=True)},
    "SDCMonitor": {"step_interval": Applied("steps between looks at the device's log", ONE),
                   "strike_window_time": Applied("minutes", ONE), "strike_num": Applied("errors", ONE),
                   "checksum_time": Applied("minutes", ONE), "checksum_cooldown_time": Applied("minutes", ONE)},
    **dict.fromkeys(("MFLossMonitor", "TrainingStateMonitor", "LossMonitor", "SummaryMonitor", "SummaryCollector",
                     "MoEDropRateCallback", "History", "EarlyStopping", "ReduceLROnPlateau", "BackupAndRestore",
                     "ModelCheckpoint", "FlopsUtilizationCollector", "TrainFaultTolerance", "OnRequestExit"),
                    Refused(OUTPUTS)),
    **dict.fromkeys(("ColdHotExpertMonitor", "ExpertMigrateCallback"),
                    Refused("it moves experts of MindFormers' own models; leave it out")),
    "CheckpointMonitor": Refused("it writes MindFormers' checkpoints; take PanguCheckpoint"),
    "TopkBiasBalanceCallback": Refused("give pangu_training.router_bias_update_rate, which moves selection biases"),
    "MaxLogitsMonitor": Refused("it resets logits of MindFormers' own models; leave it out"),
    "EvalCallBack": Refused("MindFormers makes it itself, for do_eval"),
    "ProfileMonitor": Refused("give profile: True at the top of the file, which makes it"),
    "StressTestModelMonitor": Refused("it starts a run of MindFormers' own beside this one; leave it out"),
}

CURVES = {"tensorboard_dir": Applied("where event files go", or_none(TEXT), needed=True),
          "tensorboard_queue_size": Applied("numbers that are written at once", ONE),
          "log_timers_to_tensorboard": Applied("seconds and speeds too", BOOL),
          "log_expert_load_to_tensorboard": Applied("the balance of experts too", BOOL),
          "log_loss_scale_to_tensorboard": Refused("no loss is scaled", (False,))}

# The first sentence about each attribute.
_SAID = {name: " ".join(said.split()).split(". ")[0].removesuffix(".") for name, said in
         re.findall(r"^    (\w+): (.+?)(?=\n    \w|\n\n)", inspect.getdoc(TrainingSettings) or "", re.M | re.S)}
KEYS = TOP | {
    "trainer": Section("MindFormers' trainer", types={
        "PanguTrainer": {"model_name": Applied("a name in MindFormers' log", or_none(TEXT))},
        "CausalLanguageModelingTrainer": Refused("PanguTrainer is it, with checkpoints of ours")}),
    "runner_config": Section("batches and epochs", RUNNER),
    "context": CONTEXT,
    "parallel": Section("where use_parallel is True", PARALLEL),
    "parallel_config": Section("where use_parallel is True", PARALLEL_CONFIG),
    "recompute_config": Section("memory for time", RECOMPUTE),
    "model": Section("the network", MODEL),
    "train_dataset": Section("the data", DATASET),
    "eval_dataset": Section("held-out data", HELD_OUT),
    "eval_dataset_task": Section("MindFormers' data pipeline", types=TASK),
    "tensorboard": Section("curves, of every number of log.jsonl", CURVES),
    "train_dataset_task": Section("MindFormers' data pipeline", types=TASK),
    "optimizer": Section("the optimizer", {"learning_rate": THE_RATE}, types=OPTIMIZERS),
    "lr_schedule": Section("the learning rate", {"warmup_epochs": Refused(
        "all epochs are one here, of which a resumed run sees the rest; give warmup_steps or warmup_ratio")}, LR_TYPES),
    "runner_wrapper": Section("a step", types=WRAPPERS),
    "callbacks": Section("what happens after each step", types=CALLBACKS, many=True),
    "pangu_training": Section("losses and initial values", {
        each.name: Applied(_SAID.get(each.name, ""), NUMBERS if "float" in str(each.type) else ANY)
        for each in dataclasses.fields(TrainingSettings)}),
}
