"""python -m pangu_ms.env: answers on a machine with nothing Ascend, with a fake one, and without MindSpore."""
import builtins
import json
from importlib import metadata

import pytest

from pangu_ms import device, env


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No CANN, no driver, no npu-smi."""
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(env, "ASCEND", tmp_path / "Ascend")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def answer(capsys):
    assert env.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_laptop(bare, capsys):
    found = answer(capsys)
    assert found["ascend"] == {"ASCEND_HOME_PATH": None, "cann": None, "driver": None, "npus": None}
    assert found["device_target"] == "CPU"
    assert {"rms_norm", "linear", "moe", "ring_update", "softmax"} <= found["formulas"].keys()
    assert found["formulas"]["softmax"] == {"float32": "formula", "bfloat16": "formula"}
    assert {forms["bfloat16"] for forms in found["formulas"].values()} == {"formula"}
    assert env.main([]) == 0
    assert "rms_norm" in capsys.readouterr().out


def test_compiled_forms_can_be_turned_off(monkeypatch):
    from pangu_ms.ops.cpu import available
    built = "compiled" if available(None) else "formula"
    assert env.formulas()["formulas"]["rms_norm"]["float32"] == built
    monkeypatch.setenv("PANGU_MS_COMPILED_OPS", "0")
    assert {forms["float32"] for forms in env.formulas()["formulas"].values()} == {"formula"}


def test_forms_of_an_ascend(monkeypatch):
    monkeypatch.setattr(device, "target", lambda: "Ascend")
    found = env.formulas()
    assert found["device_target"] == "Ascend"
    forms = {name: (each["float32"], each["bfloat16"]) for name, each in found["formulas"].items()}
    assert forms["rms_norm"] == forms["cross_entropy"] == forms["expanded_attention"] == ("ascend", "ascend")
    assert forms["linear"] == forms["moe"] == ("formula", "formula")


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
    assert "exit code 3" in env.ascend()["npus"]
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
    found = answer(capsys)
    assert found["formulas"] == {} and "no mindspore here" in found["error"]
    assert env.main([]) == 0


def test_versions(monkeypatch):
    """Wanted is what this package requires; what only its extras require is not asked for."""
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy<2", "mindspore==2.9.0", "nothing_like_it>=1",
                                                            'pytest>=8; extra == "test"'])
    installed = {"numpy": "2.0.0", "mindspore": "2.9.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]
    monkeypatch.setattr(metadata, "version", version)
    found = env.versions()
    assert found.pop("python")["ok"]
    assert found == {"numpy": {"found": "2.0.0", "wanted": "<2", "ok": False},
                     "mindspore": {"found": "2.9.0", "wanted": "==2.9.0", "ok": True},
                     "nothing_like_it": {"found": None, "wanted": ">=1", "ok": False}}


def test_an_unknown_option():
    assert env.main(["--all"]) == 2
