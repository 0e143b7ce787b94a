"""What is installed, against what is wanted, and which form of each operator would be used: python -m pangu_ms.env.

Nothing here may fail: where something is not there, that is the answer.
"""
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

WANTED = {"python": "3.10, 3.11", "mindspore": "2.9.0", "mindformers": "1.9.0", "numpy": "below 2"}
ASCEND = Path("/usr/local/Ascend")
# Where CANN and the driver say their version, the newest layout first; below ASCEND_HOME_PATH or /usr/local/Ascend.
CANN_FILES = ("version.info", "cann/version.info", "{machine}-linux/ascend_toolkit_install.info",
              "cann/{machine}-linux/ascend_toolkit_install.info",
              "ascend-toolkit/latest/{machine}-linux/ascend_toolkit_install.info", "ascend-toolkit/latest/version.cfg")
DRIVER_FILES = ("driver/version.info",)


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if arguments not in ([], ["--json"]):
        print("usage: python -m pangu_ms.env [--json]\n\nVersions found and wanted, the device, the operators' forms.",
              file=sys.stdout if arguments in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    found = report()
    print(json.dumps(found) if arguments else as_text(found))
    return 0


def report() -> dict:
    return {"versions": versions(), "ascend": ascend(), **operators()}


def versions() -> dict[str, dict]:
    """name -> found (None when not installed), wanted, ok."""
    found = {"python": platform.python_version()}
    for name in list(WANTED)[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {name: {"found": found[name], "wanted": WANTED[name], "ok": fits(name, found[name])} for name in WANTED}


def fits(name: str, found: str | None) -> bool:
    if found is None:
        return False
    if name == "python":
        return found.rsplit(".", 1)[0] in WANTED[name].split(", ")
    if name == "numpy":
        return int(found.split(".")[0]) < 2
    return found == WANTED[name]


def ascend() -> dict:
    """CANN and driver as files and environment tell, and what npu-smi says; None for what is not there."""
    home = os.environ.get("ASCEND_HOME_PATH")
    return {"ASCEND_HOME_PATH": home,
            "cann": _version([Path(home)] if home else [], CANN_FILES) or _version([ASCEND], CANN_FILES),
            "driver": _version([ASCEND], DRIVER_FILES), "npus": npus()}


def _version(folders: list[Path], names: tuple[str, ...]) -> str | None:
    """The first `version=...` in these files."""
    for folder in folders:
        for name in names:
            try:
                text = (folder / name.format(machine=platform.machine())).read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            match = re.search(r"version\w*\s*=\s*\[?([^\s\]]+)", text, re.IGNORECASE)
            if match:
                return match[1].strip('"')
    return None


def npus() -> str | None:
    """The devices that `npu-smi info -l` counts, or what went wrong when it was asked."""
    command = shutil.which("npu-smi")
    if command is None:
        return None
    try:
        shown = subprocess.run([command, "info", "-l"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"npu-smi cannot be run: {error}"
    match = re.search(r"Total Count\s*:\s*(\d+)", shown.stdout)
    return match[1] if match else f"npu-smi info -l: exit code {shown.returncode}, no count"


def operators() -> dict:
    """The device MindSpore would use and operator -> its form in float32 and bfloat16, or why there is none."""
    try:
        from mindspore import context

        from pangu_ms import ops
        from pangu_ms.ops import compiled
        device = context.get_context("device_target")
        forms = {name: {dtype: form(ops, compiled, name, dtype, device) for dtype in ("float32", "bfloat16")}
                 for name in (*ops._SMALL, *ops._COMPOSED)}
        return {"device_target": device, "compiled_library": compiled.available(), "operators": forms}
    except Exception as error:  # a broken installation raises anything, and is what this command is for
        return {"device_target": None, "compiled_library": None, "operators": {},
                "error": f"MindSpore cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def form(ops, compiled, name: str, dtype: str, device: str) -> str:
    """"compiled", "ascend" or "plain", by the rules of `pangu_ms.ops.operator`.

    Ascend's attention takes 16 bits alone, and certain widths, which are not judged here: other models get the plain
    form.
    """
    chosen = ops.operator(name, dtype)
    if isinstance(chosen, compiled.ops.Custom):
        return "compiled"
    if chosen.__module__ == "pangu_ms.ops.ascend_attention":
        return "ascend" if dtype != "float32" else "plain, of ascend's small ones"
    if chosen.__module__.startswith("pangu_ms.ops.ascend"):
        return "ascend"
    return "plain, of ascend's small ones" if device == "Ascend" and name in ops._COMPOSED else "plain"


def as_text(found: dict) -> str:
    lines = [f"{'':<18}{'found':<16}{'wanted':<14}"]
    for name, row in found["versions"].items():
        note = "" if row["ok"] else "  <- install the wanted version"
        lines.append(f"{name:<18}{row['found'] or 'not there':<16}{row['wanted']:<14}{note}")
    for name, value in found["ascend"].items():
        lines.append(f"{name:<18}{value or 'not there'}")
    lines.append(f"{'device target':<18}{found['device_target'] or 'none'}")
    if "error" in found:
        return "\n".join([*lines, found["error"]])
    lines.append(f"{'CPU operators':<18}{'compiled' if found['compiled_library'] else 'not built, or turned off'}")
    lines += ["", f"{'operator':<26}{'float32':<32}bfloat16"]
    lines += [f"{name:<26}{forms['float32']:<32}{forms['bfloat16']}" for name, forms in found["operators"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
