"""What MindFormers sees of this package. Importing it takes seconds, so these tests share one process."""
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.errors import PanguError
from pangu_ms.parallel.ranks import Ranks
from pangu_ms.text.tokenizer import Tokenizer
from pangu_ms.training.data import loader as loader_module
from pangu_ms.training.data.packing import Sequence
from pangu_ms.training.run.fields import complete
from pangu_ms.training.run.keys import check_keys
from pangu_ms.yaml_file import read_yaml

CONFIGS = Path(__file__).parents[3] / "configs"
TOY = read_yaml(str(CONFIGS / "openpangu_v2" / "pretrain_toy_cpu.yaml"))


def changed(**values):
    """The toy file with values by dotted key ("__" for the dot); None takes a key out."""
    fields = copy.deepcopy(TOY)
    for key, value in values.items():
        section, *inner = fields, *key.split("__")
        for name in inner[:-1]:
            section = section[int(name) if isinstance(section, list) else name]
        section[inner[-1]] = value
    return fields


@pytest.mark.parametrize("values, message", [
    ({"model__model_config__hiden_size": 1}, "model.model_config.hiden_size: no such key; did you mean hidden_size?"),
    ({"pangu_training__mtp_weight": 1}, "pangu_training.mtp_weight: .*did you mean mtp_loss_weight?"),
    ({"pangu_trainig": {}}, "pangu_trainig: no such section; did you mean pangu_training?"),
    ({"lr_schedul": {}}, "lr_schedul: no such section; did you mean lr_schedule?"),
    ({"train_dataset__data_loader__seq_len": 1}, "data_loader.seq_len: no such key; did you mean seq_length?"),
    ({"train_dataset__data_loader__type": "PanguJsonLoader"}, "no PanguJsonLoader; did you mean PanguJsonlLoader?"),
    ({"train_dataset__data_loader": {"type": "PanguIndexedLoader", "path": "a"}}, "loader.path: no such key; did you .*"
                                                                                  "data_path"),
    ({"optimizer__weight_decy": 1}, "optimizer.weight_decy: no such key; did you mean weight_decay?"),
    ({"runner_wrapper__max_norm": 1}, "runner_wrapper.max_norm: no such key; did you mean max_grad_norm?"),
    ({"callbacks__1__save_steps": 1}, "callbacks.PanguCheckpoint.save_steps: .*did you mean save_checkpoint_steps?"),
    ({"trainer__type": "CausalLanguageModelingTrainer"}, "trainer.type: found CausalLang.*wanted PanguTrainer"),
    ({"train_dataset__input_columns": ["input_ids"]}, "input_columns: found .*wanted"),
    ({"runner_wrapper": {"type": "MFTrainOneStepCell"}}, "runner_wrapper.type: found MFTrainOneStepCell, wanted P"),
    ({"runner_wrapper": {"type": "Mine", "auto_register": "mine.Mine"}}, "found Mine, but callbacks name PanguChe"),
    ({"lr_schedule__warmup_epochs": 1}, "warmup_epochs: .*give warmup_steps or warmup_ratio"),
    ({"do_eval": True, "callbacks": [{"type": "PanguCheckpoint"}]}, "do_eval: callbacks do not name PanguMonitor"),
    ({"tensorboard": {"tensorbord_dir": "x"}}, "tensorbord_dir: no such key; did you mean tensorboard_dir?"),
    ({"eval_dataset__data_loader__seq_len": 1}, "eval_dataset.data_loader.seq_len: .*did you mean seq_length?"),
    ({"eval_step_interval": "all"}, "eval_step_interval: found 'all', wanted an integer of at least -1"),
    ({"callbacks__0__devise": "x"}, "callbacks.PanguMonitor.devise: no such key; did you mean device?"),
    ({"optimizer": None}, "optimizer: found None, wanted a section"),
    ({"run_mode": "finetune"}, "run_mode: found finetune without weights"),
    ({"model__model_config__compute_dtype": "float16"}, "compute_dtype: found float16, wanted bfloat16 or float32"),
    ({"load_optimizer": True}, "load_optimizer: found True without load_checkpoint"),
    ({"pangu_training__batch_ramp": [[0, 4], [9, 8]], "runner_config__gradient_accumulation_steps": 2},
     "gradient_accumulation_steps: found 2 with pangu_training.batch_ramp, wanted 1"),
])
def test_a_wrong_key_is_named_with_its_neighbour(mindformers, tmp_path, values, message):
    with pytest.raises(PanguError, match=message) as raised:
        mindformers.train(changed(**values), str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_mindformers_takes_every_file(mindformers, data, tmp_path, path):
    """Its template refuses what it does not know in runner_config, parallel_config and recompute_config."""
    fields = read_yaml(str(path))
    if fields["run_mode"] == "predict":
        mindformers.ConfigTemplate.apply_template(fields)
        return
    if fields["load_checkpoint"]:
        fields["load_checkpoint"] = str(data / {"openpangu_v2": "tiny"}.get(path.parent.name, "pro_moe"))
    fields = complete(fields)
    if "toy" in path.name:  # the others' sizes are not those of tests/data
        check_keys(fields)
    config = mindformers.mindformers_config(fields, str(tmp_path))
    assert [callback["type"] for callback in config.callbacks] == ["PanguMonitor", "PanguCheckpoint"]
    assert config.output_dir == str(tmp_path / "mindformers") and config.load_checkpoint == ""


def test_sizes_come_from_a_checkpoint(mindformers, data):
    fields = complete(changed(load_checkpoint=str(data / "tiny"), model={"model_config": {}}))
    check_keys(fields)
    kept = mindformers.PanguModelConfig(**fields["model"]["model_config"], use_past=False).fields
    assert PanguConfig.from_dict(kept).plan == PanguConfig.from_pretrained(data / "tiny").plan
    kept["hidden_size"] = 64
    with pytest.raises(PanguError, match="model.model_config.hidden_size: found 64, but .*tiny has 48"):
        mindformers.load(str(data / "tiny"), kept)


def test_the_architecture_of_a_file_decides_what_its_model_may_have(mindformers, data):
    fields = read_yaml(str(CONFIGS / "pangu_embedded" / "pretrain_toy_cpu.yaml"))
    network = mindformers.PanguNetwork(mindformers.PanguModelConfig(**fields["model"]["model_config"]))
    assert network.objective.causal_lm.plan.tied_head and network.objective.part_names == ("lm",)
    fields["model"]["model_config"]["kv_lora_rank"] = 16
    with pytest.raises(PanguError, match="model_config.kv_lora_rank: no such key"):
        check_keys(complete(fields))
    with pytest.raises(PanguError, match="architectures: found .*'Other'.*, wanted one of OpenPanguV2ForCausalLM"):
        complete(changed(model__model_config__architectures=["Other"]))


def test_a_run_stands_for_its_newest_checkpoint(mindformers, data, tmp_path):
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step_{step:06}").mkdir(parents=True)
        PanguConfig.from_pretrained(data / "tiny").save_pretrained(tmp_path / "checkpoints" / f"step_{step:06}")
    assert complete(changed(load_checkpoint=str(tmp_path)))["load_checkpoint"].endswith("step_000010")


def test_a_whole_accumulation_is_one_step(mindformers, monkeypatch):
    """Losses are the mean over its parts, the load their sum; norm and squares are the last one's, which updates; of
    the largest logits, which come where they are asked for, the largest."""
    calls = []

    def once(self, ids, mask):
        calls.append((ids.asnumpy().tolist(), mask.asnumpy().tolist()))
        n = len(calls)
        return tuple(ms.Tensor(np.array(v, np.float32))
                     for v in (n, [n, 2 * n], 7 * (n == 2), [[n, 1]], [n], [[n, -n]]))

    monkeypatch.setattr(mindformers.TrainStep, "__call__", once)
    step = mindformers.PanguTrainStep.__new__(mindformers.PanguTrainStep)
    for name, value in (("accumulates", True), ("sequences", 2)):
        object.__setattr__(step, name, value)
    batch = (ms.Tensor(np.arange(4, dtype=np.int32)), ms.Tensor(np.ones(4, np.float32)))
    total, parts, norm, load, squares, largest = (output.asnumpy().tolist()
                                                  for output in type(step).__call__(step, *batch))
    assert calls == [([0, 1], [1, 1]), ([2, 3], [1, 1])]
    assert (total, parts, norm, load, squares) == (1.5, [1.5, 3.0], 7.0, [[3.0, 2.0]], [2.0])
    assert largest == [[2.0, -1.0]]


def test_what_saves_is_called_last(mindformers):
    """Of all callbacks: the log has a step's line before its checkpoint is there."""
    trainer, run = object.__new__(mindformers.PanguTrainer), object()
    trainer.run = run
    checkpoint, monitor, other = mindformers.PanguCheckpoint(), mindformers.PanguMonitor(), ms.Callback()
    assert trainer.sort_callbacks([checkpoint, monitor, other]) == [monitor, other, checkpoint]
    assert checkpoint.run is monitor.run is run


def test_the_loader_gives_epochs_one_behind_the_other(mindformers, monkeypatch):
    documents = SimpleNamespace(largest_id=90)
    seen = []

    class Packed:
        def __init__(self, *arguments):
            seen.append(arguments)

        def __len__(self):
            return 2

        def __getitem__(self, n):
            ids = np.full(4, n, np.int32)
            return Sequence(ids, ids, np.ones(4, np.float32), ids)

        def documents(self, n):
            return [f"d{n}"]

    monkeypatch.setattr(loader_module, "PackedDataset", Packed)
    monkeypatch.setattr(loader_module, "Tokenizer", lambda directory: directory)
    monkeypatch.setattr(loader_module, "read_chats", lambda path, tokenizer: documents)
    loader = mindformers.PanguJsonlLoader("c.jsonl", "t", 4, documents="chats", seed=9, epochs=3, dataset_dir=None)
    rows = [row["input_ids"][0] for row in loader.create_dict_iterator(num_epochs=1, output_numpy=True)]
    assert rows == [0, 1, 2, 3, 4, 5] and seen == [(documents, 4, 9, None, None)]
    own = mindformers.PanguJsonlLoader("c.jsonl", "t", 4, documents="chats", epochs=3, tensor_parallel=2, num_shards=4,
                                       shard_id=3)                              # with shard 2, of the second half
    assert [row["input_ids"][0] for row in own.create_dict_iterator(num_epochs=1, output_numpy=True)] == [1, 3, 5]
    uneven = mindformers.PanguJsonlLoader("c.jsonl", "t", 4, documents="chats", epochs=3, num_shards=4, shard_id=1)
    assert [row["input_ids"][0] for row in uneven.create_dict_iterator(num_epochs=1, output_numpy=True)] == [1]
    source = mindformers.source_of(loader.skip(2).batch(2))
    assert (source.documents(5), source.largest_id) == (["d5"], 90)
    with pytest.raises(PanguError, match="data_loader.documents: found 'books', wanted texts or chats"):
        mindformers.PanguJsonlLoader("c.jsonl", "t", 4, documents="books")
    mindformers.PanguJsonlLoader("c.jsonl", "t", 4, documents="chats", min_document_length=2, max_document_length=9)
    assert seen[-1] == (documents, 4, 0, 2, 9)


def test_a_checkpoint_is_evaluated_on_the_data_of_the_file(mindformers, data, tokenizer_directory, jsonl, tmp_path,
                                                          monkeypatch):
    """The model is stood in for by its objective: the loss of a token is its id."""
    class Objective(ms.nn.Cell):
        part_names, causal_lm = ("lm",), SimpleNamespace(ranks=Ranks())

        def construct(self, input_ids, labels, loss_mask, position_ids):
            lm = ops.sum(ops.cast(labels, ms.float32) * loss_mask) / ops.maximum(ops.sum(loss_mask), 1.0)
            return lm, ops.stack((lm,)), ops.zeros((0, 1), ms.float32)

    loaded = SimpleNamespace(config=SimpleNamespace(vocab_size=300))
    monkeypatch.setattr(mindformers, "build_context", lambda config: None)
    monkeypatch.setattr(mindformers, "load", lambda directory, fields, ranks: loaded)
    monkeypatch.setattr(mindformers, "forward_objective", lambda model: Objective())
    text = "the user " * 9
    loader = {"path": str(jsonl([{"text": text}])), "tokenizer": str(tokenizer_directory), "seq_length": 7}
    fields = changed(run_mode="eval", load_checkpoint=str(data / "tiny"), model={"model_config": {}})
    fields["eval_dataset"]["data_loader"] |= loader
    line = mindformers.evaluate(fields, str(tmp_path))
    ids = [*Tokenizer(tokenizer_directory).encode(text), 277]
    found = json.loads((tmp_path / "eval.json").read_text())
    assert (found["lm"], found["tokens"]) == (pytest.approx(np.mean(ids[1:]), rel=1e-6), len(ids) - 1)
    assert found["sequences"] == -(-len(ids) // 7) > 4 and line.startswith(f"{data / 'tiny'}: held-out lm ")
    with pytest.raises(PanguError, match="run_mode: found eval without weights; give load_checkpoint"):
        mindformers.evaluate(changed(run_mode="eval"), str(tmp_path))


@pytest.mark.slow
def test_four_losses_add_up_to_ours(mindformers, data):
    """What MindFormers' own wrappers do with the network: the sum is the total, and so is its gradient."""
    fields = PanguConfig.from_pretrained(data / "tiny").to_dict() | {
        "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "dsa_layers": [0], "swa_layers": [1, 2],
        "sliding_window_list": [7, 7], "block_post_layernorm_idx": [1]}
    settings = {"balance_loss_coeff": 0.5, "z_loss_coeff": 0.25, "mtp_loss_weight": 0.3}
    network = mindformers.PanguNetwork(mindformers.PanguModelConfig(settings, pangu_seed=3, **fields))
    draw = np.random.default_rng(0)
    ids, labels = (ms.Tensor(draw.integers(0, 199, (2, 12)), ms.int32) for _ in range(2))
    batch = (ids, labels, ms.Tensor(np.ones((2, 12)), ms.float32), ms.Tensor(np.tile(np.arange(12), (2, 1)), ms.int32))
    weights = ms.ParameterTuple([p for p in network.trainable_params() if p.name in
                                 ("model.norm.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight")])
    assert len(weights) == 3
    (total, parts, _), wanted = ms.value_and_grad(network.objective, None, weights, has_aux=True)(*batch)
    losses, found = ms.value_and_grad(_Sum(network), None, weights, has_aux=True)(*batch)
    four = [loss.asnumpy().item() for loss in losses[1:]]
    parts = dict(zip(network.objective.part_names, parts.asnumpy().tolist()))
    assert four == pytest.approx([parts["lm"], 0.3 * parts["mtp_1"], 0.5 * parts["balance"] + 0.25 * parts["z"], 0.0])
    assert losses[0].asnumpy().item() == pytest.approx(total.asnumpy().item())
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-4, atol=1e-6)


class _Sum(ms.nn.Cell):
    """What MindFormers' wrappers minimise."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *batch):
        first, second, third, fourth = self.network(*batch)
        return (first + second + third + fourth)[0], first, second, third, fourth
