"""Every command of the documents, as written, in a directory where a small model and small data have its names."""
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from toy_tokenizer import train_tokenizer

from pangu_ms.architectures import config_class, config_from_dict
from pangu_ms.architectures.tensors import parameters
from pangu_ms.checkpoint.directory import checkpoints
from pangu_ms.conversion.command import main as convert
from pangu_ms.generation.command import main as generate
from pangu_ms.training.run.command import main as train
from pangu_ms.training.run.state import read_checkpoint
from pangu_ms.yaml_file import read_yaml
from tests.launch import msrun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "configs/openpangu_v2/README.md", "configs/openpangu_v2/CLUSTER.md",
             *(f"configs/{member}/README.md" for member in ("pangu_embedded", "pangu_pro_moe", "pangu_pro_moe_v2",
                                                            "pangu_ultra_moe")))
# A fresh clone runs these before this test, another test that, and no machine here has the devices for the others.
ELSEWHERE = re.compile(r"make (demo|test)$|python3.11 -m venv|.venv/bin/pip|python examples/toy_corpus.py"
                       r"|python examples/family_chats.py|msrun --worker_num=(8|64) |python tools/bench.py ")
COMMANDS = {"pangu-generate": generate, "pangu-train": train, "pangu-convert": convert}


def commands(document):
    """Each command: an indented line, which may go on in the next and end in a comment."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^    (\S.*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines
            if not re.match(r"\w+/", line)]                                     # a line of the drawing of directories


@pytest.fixture(scope="module")
def directory(tmp_path_factory, data, one_layer, family):
    """As a clone with data in it; the toy, its data and the sizes in its YAML files are smaller."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("tools", "tests"):
        (directory / name).symlink_to(ROOT / name)
    texts = [" ".join(f"word{word}" for word in row)
             for row in np.random.default_rng(0).integers(0, 50, (30, 16)).tolist()]
    chats = [{"thinking": False, "messages": [{"role": role, "content": text[:12]} for role in ("user", "assistant")]}
             for text in texts]
    pages = [{"text": text} for text in texts]
    shutil.copytree(family("embedded"), directory / "data" / "family" / "tokenizer")
    for name, lines in (("pretrain", pages), ("heldout", pages), ("chats", chats), ("family/chats", chats)):
        (directory / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer(texts, 268, directory / "data" / "tokenizer")

    model = one_layer | {"bos_token_id": 260, "eos_token_id": 261, "pad_token_id": 261}
    words = {name: model[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    # Without its MTP layer it trains in half of the time, nearly all of which is compiling.
    small = {"openpangu_v2": model | {"num_nextn_predict_layers": 0, "swa_layers": [], "sliding_window_list": []}}
    for folder, name, layers in (("pangu_embedded", "embedded_tied", {}), ("pangu_pro_moe", "pro_moe", {}),
                                 ("pangu_pro_moe_v2", "pro_moe_v2", {}),
                                 ("pangu_ultra_moe", "ultra_moe", {"num_dense_layers": 0})):
        given = json.loads((data / name / "config.json").read_text())
        small[folder] = given | layers | words | {"num_hidden_layers": 1}
    for path in (ROOT / "configs").glob("*/*.yaml"):
        fields = read_yaml(str(path))
        if path.stem.endswith("cpu"):
            if not fields.get("load_checkpoint"):
                given = fields["model"]["model_config"]
                # What goes with another tokenizer stays.
                own = {} if fields["train_dataset"]["data_loader"]["tokenizer"] == "data/tokenizer" else \
                    {name: given[name] for name in (*words, "tie_word_embeddings")}
                known = config_class(given).given_fields()
                fields["model"]["model_config"] = {name: value for name, value in
                                                   (small[path.parent.name] | own).items() if name in known}
            fields["train_dataset"]["data_loader"]["seq_length"] = 64
            fields["callbacks"][1]["save_checkpoint_steps"] = 4
        written = directory / path.relative_to(ROOT)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(fields))

    toy, random, config = directory / "examples" / "toy", np.random.default_rng(0), config_from_dict(model)
    train_tokenizer(texts, 268, toy)
    config.save_pretrained(toy)
    save_file({name: random.normal("norm" in name, 0.2, p.shape).astype(np.float32)
               for name, p in parameters(config).items()}, toy / "model.safetensors")
    return directory


def run(words):
    """The exit code of a command, in this process if it is not to run in several."""
    if words[0] == "msrun":
        return msrun(words[1:], stdout=subprocess.DEVNULL).returncode
    if words[0] != "python":
        return COMMANDS[words[0]](words[1:])
    name = words[1 + (words[1] == "-m")]
    sys.argv = words[words.index(name):]
    try:
        (runpy.run_module if words[1] == "-m" else runpy.run_path)(name, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def interrupt(words):
    """Makes of the run that a command will resume one that was interrupted: its end is not there."""
    output = next((word for word in words if word.startswith("output_dir=")), "output_dir=output/pretrain")
    shutil.rmtree(checkpoints(output.partition("=")[2])[-1])


def test_commands(directory, monkeypatch):
    """All documents in turn, a command that stands in two of them once."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", sys.argv)
    lines = dict.fromkeys(line for document in DOCUMENTS for line in commands(document))
    for line in lines:
        if ELSEWHERE.match(line):
            continue
        words = shlex.split(line)
        if "--resume" in words:
            interrupt(words)
        monkeypatch.setattr(sys, "stdin", io.StringIO("word1 word2\n/exit\n"))
        assert run(words) == 0, line
    printed = [Path(f"logs/worker_{rank}.log").read_text(errors="replace").count("decode 39 in") for rank in (0, 1)]
    assert printed == [1, 0], "the first of two ranks speaks for both"
    one, two = (log(f"output/{name}") for name in ("pretrain", "shared"))
    assert len(one) == len(two) > 4
    for found, wanted in zip(two, one):                                         # of two ranks, and of one
        for name in ("loss", "lm", "grad_norm", "expert_balance"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-3), (found["step"], name)
    for found, wanted in zip(*(read_checkpoint(checkpoints(f"output/{name}")[-1]) for name in ("shared", "pretrain"))):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-2 * abs(values).max(), err_msg=name)


def log(directory):
    return [json.loads(line) for line in Path(directory, "log.jsonl").read_text().splitlines()]


def test_python_of_the_readme(directory, monkeypatch):
    monkeypatch.chdir(directory)
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, found := {})
    assert found["logits"].shape[1] == len(found["prompt"]) and found["response"].finish_reason in ("stop", "length")
