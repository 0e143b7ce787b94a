"""Adapter directories in PEFT's layout, and checkpoints read and converted with one merged in."""
import json

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from pangu_ms.architectures.adapters import Adapter, adapter_tensors
from pangu_ms.architectures.tensors import extended, parameters
from pangu_ms.checkpoint.adapter import by_name, by_source, peft_fields
from pangu_ms.checkpoint.layout import sliced
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.conversion.command import main
from pangu_ms.errors import PanguError
from pangu_ms.parallel.ranks import Ranks
from tests.checkpoint import generate

PATTERN = r".*(self_attn\.(q_a|q_b|kv_b|o)_proj|experts\.\d+\.\w+_proj|eh_proj)"
ADAPTER = Adapter(2, 3.0, 0.1, PATTERN)


@pytest.fixture
def config(data):
    return generate.config(data, **generate.SMALL | generate.SLICEABLE | {"n_routed_experts": 4})


@pytest.fixture
def base(config, tmp_path):
    return generate.write(tmp_path / "base", config, generate.tensors(config), 2)


def arrays(config):
    """Eighths, of which products and sums are exact in whatever order."""
    draw = np.random.default_rng(3)
    return {name: draw.integers(-4, 5, p.shape).astype(np.float32) / 8
            for name, p in adapter_tensors(config, ADAPTER).items()}


@pytest.fixture
def adapter(config, base, tmp_path):
    """A directory as PEFT writes it."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(peft_fields(ADAPTER, str(base))))
    known = extended(config, adapter_tensors(config, ADAPTER))
    save_file({name: np.ascontiguousarray(values) for name, values in by_source(arrays(config), known).items()},
              directory / "adapter_model.safetensors")
    return directory


def merged(weight, stored, module):
    """By hand: the matrix of a module with its pair, of tensors as they lie in PEFT's file."""
    down, up = (stored.get(f"base_model.model.{module}.lora_{kind}.weight") for kind in "AB")
    weight = weight.astype(np.float32)
    return weight if down is None else weight + np.float32(1.5) * (up @ down)


def test_names_are_those_of_peft(config, adapter):
    """As PEFT's documents have them: base_model.model., the module, lora_A.weight [r, in] or lora_B.weight [out, r]."""
    stored = load_file(adapter / "adapter_model.safetensors")
    expert, attention = ("base_model.model.model.layers.1." + name for name in
                         ("mlp.experts.3.gate_proj.lora_A.weight", "self_attn.q_a_proj.lora_B.weight"))
    assert stored[expert].shape == (2, config.hidden_size) and stored[attention].shape == (config.q_lora_rank, 2)
    known = extended(config, adapter_tensors(config, ADAPTER))
    back, wanted = by_name(stored, known), arrays(config)
    assert back.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(back[name], wanted[name])
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3.0, "lora_dropout": 0.1,
            "target_modules": PATTERN, "bias": "none"}.items() <= fields.items()


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(tensor=2, expert=2, rank=3)])
def test_an_adapter_is_merged_while_its_base_is_read(config, base, adapter, ranks):
    stored, found = load_file(adapter / "adapter_model.safetensors"), generate.tensors(config)
    with read_parameters(base, config, "bfloat16", ranks=ranks, adapter=adapter) as read:
        for name, values in read:
            p = parameters(config)[name]
            each = [merged((found[source].view(bfloat16) if found[source].dtype == np.uint16 else found[source]),
                           stored, source.removesuffix(".weight")) for source in p.sources]
            wanted = sliced(p, ranks).part_of(np.stack(each) if p.stacked else each[0])
            if values.dtype == np.uint16:
                wanted = wanted.astype(bfloat16).view(np.uint16)                # rounded once
            np.testing.assert_array_equal(values, wanted, name)


@pytest.mark.parametrize("ours", [False, True])
def test_merge_lora(config, base, adapter, tmp_path, capsys, ours):
    """In the layout of the base, and in its formats; what has no pair is there bit by bit."""
    source, out = base, tmp_path / "out"
    if ours:
        source = tmp_path / "ours"
        assert main(["hf2ms", str(base), str(source)]) == 0
    assert main(["merge-lora", str(source), str(adapter), str(out), "--verify"]) == 0
    assert "merge: " in capsys.readouterr().out
    stored, found = load_file(adapter / "adapter_model.safetensors"), generate.tensors(config)
    written = generate.read(out)
    names = {p.name for p in parameters(config).values()} if ours else found.keys()
    assert written.keys() == names
    for name, (dtype, shape, raw) in written.items():
        p = parameters(config).get(name)
        sources = p.sources if ours else (name,)
        for source, part in zip(sources, np.frombuffer(raw, {"F32": "<f4", "BF16": "<u2"}[dtype]).reshape(
                len(sources), *found[sources[0]].shape)):
            before, module = found[source], source.removesuffix(".weight")
            if f"base_model.model.{module}.lora_A.weight" not in stored:
                np.testing.assert_array_equal(part, before, source)
                continue
            assert dtype == "BF16"
            wanted = merged(before.view(bfloat16), stored, module).astype(bfloat16).view(np.uint16)
            np.testing.assert_array_equal(part, wanted, source)
            assert np.mean(part != before) > 0.5


@pytest.mark.parametrize("change, message", [
    ({"r": 3}, r"is no adapter of this model: .*lora_A.weight is F32 \[2, 8\], wanted \[3, 8\] \(and \d+ more\)"),
    ({"r": None}, "r: found None, wanted a positive integer"),
    ({"lora_alpha": "2"}, "lora_alpha: found '2', wanted a number"),
    ({"peft_type": "IA3"}, "peft_type: found 'IA3', wanted 'LORA'"),
    ({"use_rslora": True}, "use_rslora: found 'True', wanted False"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: found .*lm_head.*, wanted None"),
])
def test_what_adapter_config_says_wrong(config, base, adapter, change, message):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(fields | change))
    with pytest.raises(PanguError, match=message) as raised:
        read_parameters(base, config, adapter=adapter)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("old, new, message", [
    ("layers.1.self_attn.q_a_proj.lora_A", "layers.9.self_attn.q_a_proj.lora_A", r"model.layers.1.self_attn.q_a_proj "
     r"lacks its lora_A.weight \(and 1 more\)"),
    ("layers.1.self_attn.q_a_proj", "layers.1.self_attn.q_a_layernorm", r"q_a_layernorm.lora_A.weight has no place"),
    ("layers.1.mlp.experts.3", "layers.1.mlp.experts.4", r"experts.4.down_proj.lora_A.weight has no place in it"),
])
def test_an_adapter_of_another_model_is_refused(config, base, adapter, capsys, old, new, message):
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace(old, new): values for name, values in load_file(path).items()}, path)
    with pytest.raises(PanguError, match=message) as raised:
        read_parameters(base, config, adapter=adapter)
    assert "\n" not in str(raised.value)
    assert main(["merge-lora", str(base), str(adapter), str(base.parent / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (base.parent / "out").exists()


def test_an_adapter_is_no_model(base, adapter, tmp_path, capsys):
    assert main(["hf2ms", str(adapter), str(tmp_path / "out")]) == 2
    assert "adapter: holds an adapter and no model; give the model that" in capsys.readouterr().err
    assert main(["merge-lora", str(base), str(base), str(tmp_path / "out")]) == 2
    assert "base/adapter_config.json: no such file; give a directory" in capsys.readouterr().err
