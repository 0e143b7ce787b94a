"""What is installed, against what is wanted, and which form of each formula would run: python -m pangu_ms.env.

Nothing here may fail: where something is not there, that is the answer.
"""
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGE = "pangu_ms"
ASCEND = Path("/usr/local/Ascend")
# Where CANN and the driver say their version, the newest layout first; below ASCEND_HOME_PATH or /usr/local/Ascend.
CANN_FILES = ("version.info", "cann/version.info", "{machine}-linux/ascend_toolkit_install.info",
              "cann/{machine}-linux/ascend_toolkit_install.info",
              "ascend-toolkit/latest/{machine}-linux/ascend_toolkit_install.info", "ascend-toolkit/latest/version.cfg")
DRIVER_FILES = ("driver/version.info",)
FORMS = {"CPU": "compiled", "Ascend": "ascend"}  # what stands in place of a formula


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if arguments not in ([], ["--json"]):
        print("usage: python -m pangu_ms.env [--json]\n\nVersions found and wanted, the device, the formulas' forms.",
              file=sys.stdout if arguments in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    found = report()
    print(json.dumps(found) if arguments else as_text(found))
    return 0


def report() -> dict:
    return {"versions": versions(), "ascend": ascend(), **formulas()}


def versions() -> dict[str, dict]:
    """Python and each package that this one requires -> found (None when not installed), wanted, ok."""
    try:
        required = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
        python = SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"] or "")
    except metadata.PackageNotFoundError:  # run from its source, without an installation that says what it wants
        return {"python": version_row(platform.python_version(), SpecifierSet())}
    rows = {"python": version_row(platform.python_version(), python)}
    for each in required:
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            try:
                rows[each.name] = version_row(metadata.version(each.name), each.specifier)
            except metadata.PackageNotFoundError:
                rows[each.name] = version_row(None, each.specifier)
    return rows


def version_row(found: str | None, wanted: SpecifierSet) -> dict:
    return {"found": found, "wanted": str(wanted), "ok": found is not None and wanted.contains(found, prereleases=True)}


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


def formulas() -> dict:
    """The device that MindSpore would use, and formula -> its form by dtype; or why there is none.

    A form is "formula", plain MindSpore, or "compiled" or "ascend", which the device has in its place. An Ascend form
    gives widths, and in attention dtypes, that its operator does not take to the formula.
    """
    try:
        import mindspore

        from pangu_ms import device
        target = device.target()

        def form(formula, dtype):
            replaced = device.replacement(formula, getattr(mindspore, dtype)) is not formula
            return FORMS[target] if replaced else "formula"
        return {"device_target": target, "formulas": {
            name: {dtype: form(formula, dtype) for dtype in ("float32", "bfloat16")}
            for name, formula in replaceable_formulas().items()}}
    except Exception as error:  # a broken installation raises anything, and is what this command is for
        return {"device_target": None, "formulas": {},
                "error": f"MindSpore cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def replaceable_formulas() -> dict:
    """Name -> formula, of those that a device may compute in another form (`pangu_ms.device.replaceable`)."""
    found = {}
    for folder in ("model", "cache"):
        package = import_module(f"{PACKAGE}.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            values = vars(import_module(module.name)).values()
            found |= {each.__name__: each.formula for each in values if callable(each) and hasattr(each, "formula")}
    return found


def as_text(found: dict) -> str:
    lines = [f"{'':<20}{'found':<16}wanted"]
    for name, row in found["versions"].items():
        note = "" if row["ok"] else "  <- install the wanted version"
        lines.append(f"{name:<20}{row['found'] or 'not there':<16}{row['wanted']}{note}")
    lines += [f"{name:<20}{value or 'not there'}" for name, value in found["ascend"].items()]
    lines.append(f"{'device target':<20}{found['device_target'] or 'none'}")
    if "error" in found:
        return "\n".join([*lines, found["error"]])
    lines += ["", f"{'formula':<24}{'float32':<12}bfloat16"]
    lines += [f"{name:<24}{forms['float32']:<12}{forms['bfloat16']}" for name, forms in found["formulas"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
