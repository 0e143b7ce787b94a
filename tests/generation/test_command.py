"""pangu-generate: what it prints, and that every bad input is one line on stderr and exit code 2.

The model and the engine are stood in for (conftest.py), except in the tests of the real checkpoint at the end.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import pangu_ms
from pangu_ms.generation.command import main
from pangu_ms.generation.sampling import Sampling

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(data, tmp_path):
    """The config of a tiny checkpoint and a tokenizer of single bytes, "!" = 0, "A" = 32, ..."""
    shutil.copy(data / "tiny" / "config.json", tmp_path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def run(directory, *options, new="3"):
    return main(["--model", str(directory), "--max-new-tokens", new, *options])


def test_text_goes_to_stdout(engine, directory, capsys):
    assert run(directory, "--prompt", "AB") == 0
    shown = capsys.readouterr()
    assert shown.out == "CDE\n"
    assert re.fullmatch(r"prefill 3 tokens in \d+\.\d\d s, decode 2 in \d+\.\d\d s, cache [\d,]+ bytes\n", shown.err)
    assert engine.loaded == (str(directory), "float32", False)


def test_ids_go_to_stdout_without_a_tokenizer(engine, directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert run(directory, "--token-ids", "5, 6,7", "--dtype", "float16") == 0
    assert capsys.readouterr().out == "8,9,10\n"
    assert engine.loaded == (str(directory), "float16", False)


def test_text_comes_as_it_is_made(engine, directory, tmp_path, monkeypatch):
    """Each piece has left the process, through a buffered stdout, before the next is asked for."""
    module, seen = sys.modules["pangu_ms.generation.stream"], []
    stream = module.stream_generate

    def watched(*args, **options):
        for piece in stream(*args, **options):
            seen.append((tmp_path / "out").read_text())
            yield piece

    monkeypatch.setattr(module, "stream_generate", watched)
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(directory, "--prompt", "AB") == 0
    assert seen == ["", "C", "CD"]


def test_half_a_character_comes_out_at_the_end(engine, directory, capsys):
    """Id 160 is the byte E4, which begins a character of three bytes; nothing follows."""
    assert run(directory, "--token-ids", "159", new="1") == 0
    assert capsys.readouterr().out == "\ufffd\n"


def test_json_is_one_object(engine, directory, capsys):
    assert run(directory, "--prompt", "AB", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    stats = shown.pop("stats")
    assert shown == {"token_ids": [34, 35, 36], "text": "CDE", "finish_reason": "length"}
    assert 10 * 2**20 < stats.pop("peak_memory_bytes") < 2**40
    assert 0 < stats.pop("prefill_seconds") < 10 > stats.pop("decode_seconds") > 0
    assert stats.pop("tokens_per_second") > 0 and stats.pop("cache_bytes") > 1000
    assert stats == {"prefill_tokens": 3, "decode_tokens": 2, "drafted": [], "accepted": []}


def test_json_text_is_null_without_a_tokenizer(engine, directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert run(directory, "--token-ids", "5", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["token_ids"] == [6, 7, 8] and shown["text"] is None


def test_default_is_greedy_without_drafts_and_masks_what_the_tokenizer_lacks(engine, directory):
    assert run(directory, "--prompt", "AB") == 0
    assert engine.options["sampling"] == Sampling(vocab_size=256) and engine.options["num_draft_tokens"] == 0
    (directory / "tokenizer.json").unlink()
    assert run(directory, "--token-ids", "5") == 0
    assert engine.options["sampling"] == Sampling()


def test_sampling_options_reach_the_engine(engine, directory):
    assert run(directory, "--prompt", "AB", "--num-draft-tokens", "5", "--temperature", "0.7", "--top-k", "40",
               "--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.1", "--seed", "3") == 0
    assert engine.options["sampling"] == Sampling(0.7, 40, 0.9, 0.1, 1.1, 3, 256)
    assert engine.options["num_draft_tokens"] == 5


def test_stop_strings(engine, directory, capsys):
    assert run(directory, "--prompt", "AB", "--stop", "FG", "--stop", "xyz", "--json", new="20") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "CDE" and shown["token_ids"] == [34, 35, 36, 37, 38], "the stop string has ids, no text"
    assert shown["finish_reason"] == "stop"
    assert run(directory, "--prompt", "AB", "--stop", "EF") == 0
    assert capsys.readouterr().out == "CDE\n", "what was held back comes at the end"


def test_stats_tell_of_drafts(engine, directory, capsys):
    """The first draft of each step is right, the second is not: two tokens a step behind the first."""
    assert run(directory, "--prompt", "AB", "--stats", "--num-draft-tokens", "2", new="9") == 0
    assert re.fullmatch(r"[\d.]+ tokens a second, drafts accepted: depth 1 4 of 4 \(100%\), depth 2 0 of 4 \(0%\)",
                        capsys.readouterr().err.splitlines()[-1])


def test_prompt_file(engine, directory, tmp_path):
    (tmp_path / "prompt.txt").write_text("AB")
    assert run(directory, "--prompt-file", str(tmp_path / "prompt.txt")) == 0
    assert engine.prompts == [[1, 32, 33]]


def test_ctrl_c_ends_the_command(engine, directory, capsys, press_ctrl_c):
    engine.reply = [34, press_ctrl_c, 35]
    assert run(directory, "--prompt", "AB") == 130
    shown = capsys.readouterr()
    assert shown.out == "C" and "interrupted" in shown.err and "Traceback" not in shown.err


def test_eos_ids_come_from_the_directory(engine, directory):
    assert run(directory, "--prompt", "AB") == 0
    assert engine.options["eos_token_ids"] == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert run(directory, "--prompt", "AB") == 0
    assert engine.options["eos_token_ids"] == (7, 8)


def test_defaults_come_from_the_directory_and_options_win(engine, directory, capsys):
    (directory / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 4, "typical_p": 0.5}))
    assert main(["--model", str(directory), "--prompt", "AB", "--top-p", "0.9", "--json"]) == 0
    shown = capsys.readouterr()
    assert engine.options["sampling"] == Sampling(temperature=0.6, top_p=0.9, vocab_size=256)
    assert len(json.loads(shown.out)["token_ids"]) == 4
    assert shown.err == (f"{directory}/generation_config.json: temperature 0.6, max_new_tokens 4; "
                         "left aside: typical_p 0.5\n")
    assert run(directory, "--prompt", "AB", "--temperature", "0", "--top-p", "1") == 0
    assert engine.options["sampling"] == Sampling(vocab_size=256)


def test_loading_and_prefill_show_progress_on_a_terminal(engine, directory, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(directory, "--prompt", "AB") == 0
    assert engine.loaded == (str(directory), "float32", True)
    assert "prefill: 100%" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "pangu-generate --model tests/data/tiny --token-ids 5,6,7,8" in capsys.readouterr().out


# ---- bad input

def refused(capsys, directory, *options, new="3"):
    """The one line of a refused command."""
    assert run(directory, *options, new=new) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pangu-generate: error: ") and shown.err.count("\n") == 1, shown.err
    return shown.err


@pytest.mark.parametrize("options, new, words", [
    (["--prompt", ""], "3", "--prompt is empty"),
    (["--token-ids", ""], "3", "the prompt is empty"),
    (["--token-ids", "5,six"], "3", "--token-ids is '5,six': wanted integers"),
    (["--token-ids", "5,,6"], "3", "--token-ids is '5,,6': wanted integers"),
    (["--token-ids", "5,199"], "3", "token 1 of the prompt is 199, outside the vocabulary: wanted 0 to 198"),
    (["--token-ids=-5"], "3", "token 0 of the prompt is -5, outside the vocabulary"),
    (["--token-ids", "5"], "0", "max_new_tokens is 0"),
    (["--token-ids", "5"], "512", "max_position_embeddings 512: ask for at most 511 new tokens"),
])
def test_bad_request(engine, directory, capsys, options, new, words):
    assert words in refused(capsys, directory, *options, new=new)
    assert engine.loaded is None, "refused before the weights are read"


@pytest.mark.parametrize("options, words", [
    (["--temperature", "-1"], "temperature is -1.0: wanted 0 (greedy) or a positive number"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--top-p", "0"], "top_p is 0.0: wanted"),
    (["--top-k", "-1"], "top_k is -1: wanted"),
    (["--min-p", "1"], "min_p is 1.0: wanted"),
    (["--repetition-penalty", "0"], "repetition_penalty is 0.0: wanted"),
    (["--seed", "-1"], "seed is -1: wanted"),
    (["--stop", ""], "a stop string is empty"),
    (["--num-draft-tokens", "-1"], "num_draft_tokens is -1: wanted"),
])
def test_bad_sampling(engine, directory, capsys, options, words):
    assert words in refused(capsys, directory, "--prompt", "AB", *options)
    assert engine.loaded is None, "refused before the weights are read"


def test_drafts_without_mtp_layers(engine, directory, capsys):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert "no MTP layers" in refused(capsys, directory, "--prompt", "AB", "--num-draft-tokens", "1")
    assert engine.loaded is None


def test_stop_strings_without_a_tokenizer(engine, directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert "--stop needs a tokenizer" in refused(capsys, directory, "--token-ids", "5", "--stop", "a")


@pytest.mark.parametrize("content, words", [(None, "prompt.txt: No such file"), (b"", "prompt.txt is empty"),
                                            (b"a\xff", "prompt.txt: not UTF-8 at byte 1")])
def test_bad_prompt_file(engine, directory, capsys, tmp_path, content, words):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    assert words in refused(capsys, directory, "--prompt-file", str(tmp_path / "prompt.txt"))


def test_bad_adapter(engine, directory, capsys, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    options = "--token-ids", "5", "--adapter", str(adapter)
    assert f"{adapter / 'adapter_config.json'}: no such file; give" in refused(capsys, directory, *options)
    (adapter / "adapter_config.json").write_text("{}")
    assert "peft_type: found None, wanted 'LORA'" in refused(capsys, directory, *options)
    assert engine.loaded is None, "refused before the weights are read"
    assert "holds an adapter and no model; give the model" in refused(capsys, adapter, "--token-ids", "5")


def test_no_such_directory(engine, directory, capsys):
    assert "nowhere: no such directory" in refused(capsys, directory / "nowhere", "--token-ids", "5")


@pytest.mark.parametrize("text, words", [
    (None, "config.json: no such file"),
    ("{", "config.json: cannot be read as JSON"),
    ("[]", "config.json: holds a list"),
    ('{"vocab_size": 3}', "config.json: the configuration lacks"),
])
def test_bad_config(engine, directory, capsys, text, words):
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    assert words in refused(capsys, directory, "--token-ids", "5")


def test_several_findings_are_one_line(engine, directory, capsys):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "index_topk": 0}))
    line = refused(capsys, directory, "--token-ids", "5")
    assert "is refused: hidden_act: found 'gelu'" in line and "; index_topk: found 0" in line


def test_prompt_without_a_tokenizer(engine, directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert "--token-ids" in refused(capsys, directory, "--prompt", "AB")


def test_bad_generation_config(engine, directory, capsys):
    (directory / "generation_config.json").write_text("{")
    assert "generation_config.json: wanted a JSON object" in refused(capsys, directory, "--token-ids", "5")
    assert engine.loaded is None


@pytest.mark.parametrize("options", [
    [], ["--prompt", "A"], ["--max-new-tokens", "3"], ["--prompt", "A", "--token-ids", "1", "--max-new-tokens", "3"],
    ["--prompt", "A", "--prompt-file", "f", "--max-new-tokens", "3"], ["--prompt", "A", "--max-new-tokens", "many"],
    ["--prompt", "A", "--max-new-tokens", "3", "--system", "B"], ["--chat", "--prompt", "A"],
    ["--prompt", "A", "--max-new-tokens", "3", "--thinking", "on"], ["--chat", "--max-new-tokens", "3", "--json"],
    ["--chat", "--token-ids", "1", "--max-new-tokens", "3"],
    ["--chat", "--prompt", "A", "--thinking", "no", "--max-new-tokens", "3"],
    ["--prompt", "A", "--max-new-tokens", "3", "--dtype", "int8"]])
def test_wrong_options(directory, capsys, options):
    with pytest.raises(SystemExit) as end:
        main(["--model", str(directory), *options])
    assert end.value.code == 2
    assert "pangu-generate: error: " in capsys.readouterr().err


def test_cheap_refusals_and_help_do_not_load_mindspore(data):
    code = ("import sys; from pangu_ms.generation.command import main; "
            f"code = main(['--model', {str(data / 'tiny')!r}, '--token-ids', '999', '--max-new-tokens', '3']); "
            "print(code, 'mindspore' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "2 False\n"


# ---- the real model

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def with_tensors(path, change):
    """Rewrites the weights as `change` leaves the dict of tensors, without an index."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    (path / INDEX).unlink()


def with_bytes(path, change):
    (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))


def with_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def put(tensors, name, *shape):
    tensors[name] = np.zeros(shape, np.float32)


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1:]


NORM = "model.norm.weight"
DAMAGES = {
    "no weights": (lambda p: ((p / WEIGHTS).unlink(), (p / INDEX).unlink()), WEIGHTS),
    "missing shard": (lambda p: with_index(p, lambda m: m.update({NORM: "model-00002.safetensors"})),
                      "model-00002.safetensors"),
    "shard outside": (lambda p: with_index(p, lambda m: m.update({NORM: "../tiny/model.safetensors"})),
                      "../tiny/model.safetensors"),
    "index is no JSON": (lambda p: (p / INDEX).write_text("{"), INDEX),
    "index lacks a tensor": (lambda p: with_index(p, lambda m: m.pop(NORM)), NORM),
    "truncated header": (lambda p: with_bytes(p, lambda b: b[:1000]), WEIGHTS),
    "truncated data": (lambda p: with_bytes(p, lambda b: b[:-100]), WEIGHTS),
    "flipped header length": (lambda p: with_bytes(p, lambda b: flip(b, 5)), WEIGHTS),
    "flipped header": (lambda p: with_bytes(p, lambda b: flip(b, 8)), WEIGHTS),
    "missing tensor": (lambda p: with_tensors(p, lambda t: t.pop(NORM)), NORM),
    "extra tensor": (lambda p: with_tensors(p, lambda t: put(t, "model.more.weight", 3)), "model.more.weight"),
    "wrong shape": (lambda p: with_tensors(p, lambda t: put(t, NORM, 47)), NORM),
}


@pytest.mark.parametrize("damage, name", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint(data, tmp_path, capsys, damage, name):
    for file in ("config.json", WEIGHTS, INDEX):
        shutil.copy(data / "tiny" / file, tmp_path)
    damage(tmp_path)
    assert name in refused(capsys, tmp_path, "--token-ids", "5")


@pytest.mark.slow
def test_prints_what_full_forwards_give(data, tmp_path):
    """The whole command as a user runs it; stdout holds the JSON object and nothing else."""
    shown = subprocess.run([sys.executable, ROOT / "tools" / "generate.py", "--model", data / "tiny", "--token-ids",
                            "5,6,7,8", "--max-new-tokens", "32", "--json"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)

    import mindspore as ms
    model, ids = pangu_ms.PanguForCausalLM.from_pretrained(data / "tiny"), [5, 6, 7, 8]
    while len(ids) < 36 and ids[-1] != 2:  # 2 ends a text of this checkpoint
        padded = ids + [0] * (36 - len(ids))  # one length, one graph: later rows change nothing
        ids.append(int(model(ms.Tensor([padded], ms.int32)).asnumpy()[0, len(ids) - 1].argmax()))
    assert result["token_ids"] == ids[4:] and result["text"] is None
    assert result["stats"]["prefill_tokens"] == 4 and result["stats"]["cache_bytes"] > 0
