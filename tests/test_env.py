"""python -m pangu_ms.env: answers on a machine with nothing Ascend, with a fake one, and without MindSpore."""
import builtins
import json

import pytest

from pangu_ms import env


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No CANN, no driver, no npu-smi."""
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(env, "ASCEND", tmp_path / "Ascend")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_a_laptop(bare, capsys):
    assert env.main([]) == 0
    shown = capsys.readouterr().out
    assert "cann              not there" in shown and "npus              not there" in shown
    assert env.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device_target"] == "CPU"
    assert set(found["versions"]) == {"python", "mindspore", "mindformers", "numpy"}
    assert found["operators"]["top_k"] == {"float32": "plain", "bfloat16": "plain"}
    assert found["operators"]["rms_norm"]["float32"] == ("compiled" if found["compiled_library"] else "plain")
    assert {forms["bfloat16"] for forms in found["operators"].values()} == {"plain"}


def test_forms_on_an_ascend(on_ascend):
    from pangu_ms import ops
    forms = {name: {dtype: env.form(ops, ops.compiled, name, dtype, "Ascend") for dtype in ("float32", "bfloat16")}
             for name in ("rms_norm", "linear", "expanded_attention", "choose", "many_tokens", "decoding_experts")}
    made = "plain, of ascend's small ones"
    assert forms == {"rms_norm": {"float32": "ascend", "bfloat16": "ascend"},
                     "linear": {"float32": "plain", "bfloat16": "plain"},
                     "expanded_attention": {"float32": made, "bfloat16": "ascend"},
                     "choose": {"float32": made, "bfloat16": "ascend"},
                     "many_tokens": {"float32": "ascend", "bfloat16": "ascend"},
                     "decoding_experts": {"float32": made, "bfloat16": made}}


def test_cann_driver_and_devices(bare, monkeypatch):
    for name, text in (("driver/version.info", "Version=25.2.0\nascendhal_version=7.35.23\n"),
                       ("ascend-toolkit/latest/version.cfg", "runtime_running_version=[8.3.RC1:8.3]\n")):
        path = bare / "Ascend" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    smi = bare / "bin" / "npu-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho '\tTotal Count                    : 8'\n")
    smi.chmod(0o755)
    assert env.ascend() == {"ASCEND_HOME_PATH": None, "cann": "8.3.RC1:8.3", "driver": "25.2.0", "npus": "8"}
    smi.write_text("#!/bin/sh\nexit 3\n")
    assert env.ascend()["npus"] == "npu-smi info -l: exit code 3, no count"
    (bare / "home").mkdir()
    (bare / "home" / "version.info").write_text("Version=9.0.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(bare / "home"))
    assert env.ascend()["cann"] == "9.0.0"


def test_without_mindspore(bare, monkeypatch, capsys):
    def refuse(name, *rest):
        if name == "mindspore":
            raise ImportError("no mindspore here")
        return real(name, *rest)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert env.main([]) == 0
    assert "MindSpore cannot be used: ImportError: no mindspore here" in capsys.readouterr().out


@pytest.mark.parametrize("name,found,ok", [("python", "3.11.9", True), ("python", "3.12.1", False),
                                           ("numpy", "1.26.4", True), ("numpy", "2.0.0", False),
                                           ("mindspore", "2.9.0", True), ("mindspore", "2.8.0", False),
                                           ("mindformers", None, False)])
def test_versions(name, found, ok):
    assert env.fits(name, found) is ok


def test_an_unknown_option():
    assert env.main(["--all"]) == 2
