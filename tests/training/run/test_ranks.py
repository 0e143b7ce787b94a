"""How a YAML file's parallel_config becomes ranks; what they then compute is in tests/parallel."""
import copy
import json

import pytest

from pangu_ms.errors import ConfigError
from pangu_ms.training.run.ranks import find_ranks


@pytest.fixture
def fields(data, monkeypatch):
    """Of a run of four processes."""
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    model = json.loads((data / "tiny" / "config.json").read_text()) | {"num_attention_heads": 4, "vocab_size": 96}
    return {"use_parallel": True, "parallel_config": {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2},
            "model": {"model_config": model}, "runner_wrapper": {"type": "PanguTrainStep"},
            "train_dataset": {"data_loader": {"type": "PanguJsonlLoader"}}, "optimizer": {"type": "PanguMuon"}}


def test_expert_ranks_are_data_parallel_ranks(fields):
    found = find_ranks(fields)
    assert (found.tensor, found.expert, found.data, found.batch, found.count) == (2, 2, 1, 2, 4)
    fields["parallel_config"] = {"data_parallel": 4, "expert_parallel": 2}
    found = find_ranks(fields)
    assert (found.tensor, found.expert, found.data, found.batch, found.count) == (1, 2, 2, 4, 4)
    assert find_ranks(fields | {"use_parallel": False}).count == 1


@pytest.mark.parametrize("change, message", [
    ({"parallel_config": {"data_parallel": 2}}, "makes 2 processes, and this run has 4: start it .*num=2"),
    ({"parallel_config": {"data_parallel": 4, "expert_parallel": 3}}, "expert_parallel: 3 does not divide data_pa.* 4"),
    ({"parallel_config": {"model_parallel": 4}, "model": {"model_config": {"vocab_size": 90}}},
     "tensor parallel 4 does not divide 90 rows .model.embed_tokens.weight.*: take one of 1, 2$"),
    ({"parallel_config": {"data_parallel": 0}}, "data parallel is 0: wanted a whole number"),
    ({"parallel_config": {"model_parallel": "2"}}, "tensor parallel is '2': wanted a whole number"),
    ({"parallel": {"enable_parallel_optimizer": True}, "optimizer": {"type": "AdamW"}},
     "optimizer.type: found AdamW, wanted PanguMuon, .*parallel.enable_parallel_optimizer"),
    ({"runner_wrapper": {"type": "MFTrainOneStepCell"}}, "runner_wrapper.type: found MFTrain.*, wanted PanguTrainStep"),
    ({"train_dataset": {"data_loader": {"type": "MindDataset"}}}, "data_loader.type: found MindDataset, wanted Pangu"),
])
def test_what_cannot_be_is_refused(fields, change, message):
    fields = copy.deepcopy(fields)
    for section, values in change.items():
        if section == "model":
            fields["model"]["model_config"] |= values["model_config"]
        else:
            fields[section] = values
    with pytest.raises(ConfigError, match=message) as raised:
        find_ranks(fields)
    assert "\n" not in str(raised.value)
