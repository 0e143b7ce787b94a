"""pangu-generate --config: what a YAML file for predict stands for, and that nothing of it is dropped in silence."""
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pangu_ms import device
from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.errors import ConfigError, PanguError
from pangu_ms.generation.command import build_parser, main
from pangu_ms.generation.config_file import OPTIONS, PredictFile, find_predict_file, read_predict_file

FLASH = Path(__file__).parents[2] / "configs" / "openpangu_v2" / "predict_flash_92b.yaml"


@pytest.fixture
def file(tmp_path):
    """file(fields): the path of a file for predict with these sections besides its run_mode."""
    def write(fields):
        fields = yaml.safe_load(fields) if isinstance(fields, str) else fields
        (tmp_path / "predict.yaml").write_text(yaml.safe_dump({"run_mode": "predict"} | fields))
        return str(tmp_path / "predict.yaml")
    return write


def options(path, *argv):
    """What pangu-generate makes of a file and the words beside it."""
    return build_parser().parse_args([*read_predict_file(path).options, *argv])


def test_the_file_gives_options_and_the_command_line_wins():
    given = options(FLASH, "--chat", "--max-new-tokens", "7")
    assert (given.model, given.dtype, given.num_draft_tokens, given.max_new_tokens, given.chat) == \
        ("openPangu-2.0-Flash", "bfloat16", 3, 7, True)
    assert (given.tensor_parallel, given.expert_parallel) == (8, 1)


def test_every_key_of_generation_config_is_an_option(file):
    given = options(file({"pretrained_model_dir": "here", "generation_config": dict.fromkeys(OPTIONS, 2)}))
    assert given.model == "here" and all(getattr(given, name) == 2 for name in OPTIONS)


@pytest.mark.parametrize("fields, seed", [("seed: 3", 3), ("{seed: 3, generation_config: {seed: 4}}", 4),
                                          ("{seed: 3, generation_config: {seed: null}}", 3)])
def test_the_seed_is_that_of_sampling(file, fields, seed):
    assert options(file({"load_checkpoint": "x", "generation_config": {"max_new_tokens": 1}} | yaml.safe_load(fields)),
                   "--max-new-tokens", "1").seed == seed


def test_do_sample_false_is_greedy_whatever_the_checkpoint_asks_for(file):
    fields = {"load_checkpoint": "x", "generation_config": {"max_new_tokens": 1, "do_sample": False}}
    assert options(file(fields)).temperature == 0 and options(file({"load_checkpoint": "x"})).temperature is None


def test_without_a_file_nothing_is_asked_for(data):
    nothing = find_predict_file(["--model", "x"])
    assert nothing == PredictFile() and nothing.options == () and nothing.context == {}
    nothing.check(PanguConfig.from_pretrained(data / "tiny"), "x")


# ---- the device and the processes

def test_the_context_is_handed_on():
    assert read_predict_file(FLASH).context == {"device_target": "Ascend", "max_device_memory": "58GB"}


def test_the_device_id_is_of_one_process(file):
    fields = {"context": {"device_id": 3, "device_target": "CPU"}, "parallel_config": {"model_parallel": 4}}
    assert read_predict_file(file(fields)).context == {"device_id": 3, "device_target": "CPU"}
    shared = read_predict_file(file(fields | {"use_parallel": True}))
    assert shared.context == {"device_target": "CPU"} and "--tensor-parallel" in shared.options


def test_parallel_config_counts_where_use_parallel_does(file):
    fields = {"load_checkpoint": "x", "generation_config": {"max_new_tokens": 1},
              "parallel_config": {"data_parallel": 2, "model_parallel": 4, "expert_parallel": 2}}
    given = options(file(fields))
    assert (given.tensor_parallel, given.expert_parallel) == (1, 1)
    given = options(file(fields | {"use_parallel": True}))
    assert (given.tensor_parallel, given.expert_parallel) == (4, 2)


# ---- the model

def test_flash_is_what_its_file_says():
    read_predict_file(FLASH).check(PanguConfig.flash_92b(), "somewhere")


@pytest.mark.parametrize("change, message", [
    ({"num_hidden_layers": 40}, "num_hidden_layers: found 46, but config.json of somewhere has 40; leave out of"),
    ({"swa_window_includes_self": False}, None),  # the file does not speak of it
    ({"rope_theta": 1e4}, "rope_theta: found 6400000.0, but config.json of somewhere has 10000.0"),
])
def test_another_size_is_one_line(change, message):
    """Built past the checks of a config, which such a single change would not pass."""
    config = dataclasses.replace(PanguConfig.flash_92b())
    for name, value in change.items():
        object.__setattr__(config, name, value)
    if message is None:
        return read_predict_file(FLASH).check(config, "somewhere")
    with pytest.raises(ConfigError, match=f"predict_flash_92b.yaml: model.model_config.{message}") as error:
        read_predict_file(FLASH).check(config, "somewhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, message", [
    ({"hidden_size": 64, "compute_dtype": "bfloat16", "params_dtype": "bfloat16", "dtype": "float16"}, None),
    ({"swa_layers": [1]}, r"swa_layers: found \[1\], but config.json of tiny has \("),
    ({"rope_interleaved": False, "own_field": {"a": 1}, "block_size": 32, "rotary_dtype": "float32"}, None),
    ({"rope_interleaved": True}, "rope_interleaved: found True, but config.json of tiny has False"),
    ({"own_field": 3}, "own_field: found 3, but config.json of tiny has {'a': 1}"),
    ({"hiden_size": 64}, "hiden_size: no such key; did you mean hidden_size?"),
    ({"rotary_dtype": "bfloat16"}, "rotary_dtype: found 'bfloat16', wanted 'float32': pangu-generate does nothing"),
    ({"compute_dtype": "bfloat16", "params_dtype": "float32"}, "params_dtype: found 'float32', wanted 'bfloat16'"),
    ({"seq_pipe": True}, "seq_pipe: pangu-generate does not know what to do with it; leave it out"),
])
def test_model_config_against_a_checkpoint(file, data, fields, message):
    config = json.loads((data / "tiny" / "config.json").read_text()) | {"hidden_size": 64, "own_field": {"a": 1}}
    found, config = read_predict_file(file({"model": {"model_config": fields}})), PanguConfig.from_dict(config)
    if message is None:
        return found.check(config, "tiny")
    with pytest.raises(ConfigError, match=f"predict.yaml: model.model_config.{message}"):
        found.check(config, "tiny")


def test_the_command_compares_before_it_loads(file, engine, data, capsys):
    path = file({"load_checkpoint": str(data / "tiny"), "generation_config": {"max_new_tokens": 2},
                 "model": {"model_config": {"num_hidden_layers": 3}}})
    assert main(["--config", path, "--token-ids", "5"]) == 2
    error = capsys.readouterr().err
    assert "model.model_config.num_hidden_layers: found 3, but" in error and error.count("\n") == 1
    assert engine.loaded is None


def test_the_device_is_started_with_the_context(file, engine, data, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(device, "start", lambda **context: started.append(context))
    context = {"device_target": "CPU", "max_call_depth": 20000, "jit_config": {"jit_level": "O0", "infer_boost": "on"}}
    fields = {"load_checkpoint": str(data / "tiny"), "generation_config": {"max_new_tokens": 2}, "context": context}
    assert main(["--config", file(fields), "--token-ids", "5"]) == 0
    assert started == [context | {"jit_config": {"jit_level": "O0"}}]
    context["device_target"] = "Ascend"
    assert main(["--config", file(fields), "--token-ids", "5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "predict.yaml: context.device_target: found Ascend, but MindSpore has none here; give CPU" in error


# ---- what MindFormers' own files hold

MINDFORMERS = """
seed: 0
output_dir: './output'
load_checkpoint: ''
auto_trans_ckpt: True
use_parallel: True
use_legacy: False
load_ckpt_format: 'safetensors'
trainer: {type: CausalLanguageModelingTrainer, model_name: 'qwen3'}
runner_config: {epochs: 5, batch_size: 8, sink_mode: True}
callbacks: [{type: MFLossMonitor}]
parallel_config: {data_parallel: 1, model_parallel: 2, pipeline_stage: 1, micro_batch_num: 1, vocab_emb_dp: True}
pretrained_model_dir: 'somewhere'
model:
  model_config: {type: Qwen3Config, position_embedding_type: "rope", compute_dtype: "bfloat16",
                 layernorm_compute_dtype: "float32", params_dtype: "bfloat16", block_size: 32, num_blocks: 1024,
                 normalization: "RMSNorm", add_bias_linear: False, gated_linear_unit: True}
context: {mode: 0, enable_graph_kernel: False, ascend_config: {precision_mode: "must_keep_origin_dtype"},
          max_device_memory: "59GB", save_graphs: False, save_graphs_path: "./graph", affinity_cpu_list: None}
parallel: {parallel_mode: "MANUAL_PARALLEL", enable_alltoall: False}
generation_config: {do_sample: False, use_past: True, max_new_tokens: 5}
"""


def test_a_file_like_mindformers_own_is_read(file, data):
    found = read_predict_file(file(MINDFORMERS))
    assert found.context == {"max_device_memory": "59GB", "save_graphs": False, "save_graphs_path": "./graph",
                             "ascend_config": {"precision_mode": "must_keep_origin_dtype"}}
    given = build_parser().parse_args(found.options)
    assert (given.model, given.dtype, given.tensor_parallel, given.seed) == ("somewhere", "bfloat16", 2, 0)
    found.check(PanguConfig.from_pretrained(data / "tiny"), "tiny")


def test_mindformers_own_files_are_read_or_refused_in_one_line():
    read = 0
    for path in sorted((Path(find_spec("mindspore").origin).parents[1] / "configs").glob("*/predict_*.yaml")):
        try:
            read_predict_file(str(path))
            read += 1
        except ConfigError as error:
            assert "\n" not in str(error)
    assert read >= 5


@pytest.mark.parametrize("fields, message", [
    ("generation_config: {temprature: 1}", "generation_config.temprature: no such key; did you mean temperature?"),
    ("generation_config: {max_length: 10}", "generation_config.max_length: pangu-generate does not know what to do"),
    ("generation_config: {do_sample: true}", "do_sample: found True, but temperature is 0, which is greedy"),
    ("generation_config: {do_sample: false, temperature: 0.5}", "do_sample: found False, but temperature is 0.5"),
    ("generation_config: {num_beams: 4}", "generation_config.num_beams: found 4, wanted 1: pangu-generate does"),
    ("model: 3", "model holds 3, wanted keys"),
    ("model: {model_config: 3}", "model.model_config holds 3, wanted keys"),
    ("context: {mode: 1}", "context.mode: found 1, wanted 0 or 'GRAPH_MODE': the network is"),
    ("context: {device_targets: CPU}", "context.device_targets: no such key; did you mean device_target?"),
    ("context: {device_target: 3}", "context.device_target: found 3, wanted Ascend or CPU"),
    ("context: {device_id: -1}", "context.device_id: found -1, wanted a number of at least 0"),
    ("context: {max_device_memory: 58}", "context.max_device_memory: found 58, wanted such as 58GB"),
    ("context: {ascend_config: {precision_mode: fp16}}", "context.ascend_config.precision_mode: found 'fp16'"),
    ("context: {affinity_cpu_list: {device0: [0-1]}}", "affinity_cpu_list: found {'device0': ['0-1']}, wanted 'None' or"),
    ("context: {jit_config: {jit_levl: O0}}", "context.jit_config.jit_levl: no such key; did you mean jit_level?"),
    ("context: {jit_config: {jit_level: O2}}", "context.jit_config.jit_level: found 'O2', wanted 'O0'"),
    ("{use_parallel: true, parallel_config: {pipeline_stage: 2}}", "parallel_config.pipeline_stage: found 2, wanted 1"),
    ("{use_parallel: true, parallel_config: {data_parallel: 2}}", "data_parallel: found 2, wanted 1 or expert_"),
    ("{use_parallel: true, parallel: {parallel_mode: 1}}", "parallel.parallel_mode: found 1, wanted 0 or "),
    ("{load_checkpoint: a, pretrained_model_dir: b}", "load_checkpoint is 'a', pretrained_model_dir 'b'; give one"),
    ("load_ckpt_format: ckpt", "load_ckpt_format: found 'ckpt', wanted 'safetensors'"),
    ("processor: {tokenizer: {type: X}}", "processor: found {'tokenizer': {'type': 'X'}}, wanted None or {}"),
    ("input_data: Hello", "input_data: found 'Hello', wanted None or ''"),
    ("generation_confg: {}", "generation_confg: no such key; did you mean generation_config?"),
    ("lora: {rank: 8}", "lora: pangu-generate does not know what to do with it; leave it out"),
])
def test_what_is_not_done_is_refused_by_name(file, fields, message):
    path = file(fields)
    with pytest.raises(ConfigError) as error:
        read_predict_file(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_wrong_files_are_one_line(tmp_path, file, capsys):
    assert main(["--config", file({"run_mode": "train"}), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert "run_mode is 'train', wanted predict; pangu-train" in error and error.count("\n") == 1
    with pytest.raises(PanguError, match="No such file"):
        find_predict_file(["--config", str(tmp_path / "none.yaml")])
