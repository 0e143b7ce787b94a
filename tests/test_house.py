"""How the package's files lie: which room may know which, where fields and weights are read, how long a file is."""
import ast
import dataclasses
import graphlib
from pathlib import Path

import pytest

import pangu_ms
from pangu_ms.architectures import ARCHITECTURES
from pangu_ms.model import plan

PACKAGE = Path(pangu_ms.__file__).parent
FILES = {".".join(("pangu_ms", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"):
         ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

# Room -> the rooms that its files import. `plan` is model/plan.py, the records that all others agree on; `run` is
# training/run, which starts what training computes, and tells how fast it is by the estimate's formulas. Behind these
# arrows `device` loads ops/ by name when a graph is compiled: a formula does not know what stands in for it.
ARROWS = {
    "errors": "",
    "interrupts": "",
    "device": "",
    "plan": "",
    "shaping": "",
    "yaml_keys": "errors",
    "yaml_file": "errors yaml_keys",
    "parallel": "device errors",
    "cache": "device plan shaping",
    "model": "cache device parallel plan shaping",
    "ops": "cache model shaping",
    "architectures": "errors parallel plan",
    "checkpoint": "architectures errors parallel",
    "conversion": "architectures checkpoint errors parallel",
    "text": "architectures errors",
    "pretrained": "architectures checkpoint device errors model parallel",
    "generation": "architectures cache checkpoint device errors interrupts model parallel plan pretrained shaping text "
                  "yaml_file yaml_keys",
    "training": "architectures checkpoint errors model parallel plan shaping text yaml_file",
    "run": "architectures checkpoint conversion device errors estimate interrupts model parallel pretrained text "
           "training yaml_file yaml_keys",
    "estimate": "architectures cache errors generation model parallel plan training yaml_file",
    "env": "device",
}
# Rooms that run where MindSpore is not installed: whatever they import, in this room or another.
WITHOUT_MINDSPORE = ("errors", "plan", "yaml_keys", "yaml_file", "architectures", "checkpoint", "conversion", "text",
                     "estimate")


def room(module):
    if module == "pangu_ms.model.plan":
        return "plan"
    if module.startswith("pangu_ms.training.run"):
        return "run"
    return module.split(".")[1] if "." in module else "pangu_ms"


def imported(tree):
    """The modules of this package that a file imports, wherever in it; names of the package itself by their homes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                home = pangu_ms._HOMES.get(each.name) if node.module == "pangu_ms" else None
                yield home or (whole if whole in FILES else node.module)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "pangu_ms":
            yield pangu_ms._HOMES.get(node.attr, "pangu_ms")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "import_module":
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))


IMPORTS = {module: {name for name in imported(tree) if name.startswith("pangu_ms.")} for module, tree in FILES.items()}


def test_no_circle_of_files():
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_no_circle_of_rooms():
    tuple(graphlib.TopologicalSorter({name: known.split() for name, known in ARROWS.items()}).static_order())


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_knows_what_the_list_says(name):
    known = {room(other) for module, others in IMPORTS.items() if room(module) == name for other in others}
    assert sorted(known - {name}) == ARROWS[name].split()


def test_every_room_is_in_the_list():
    assert {room(module) for module in FILES} - {"pangu_ms"} == ARROWS.keys()


def frameworks(tree):
    """What a file imports from outside, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.split(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_one_file_knows_mindformers():
    users = [module for module, tree in FILES.items() if "mindformers" in frameworks(tree)]
    assert users == ["pangu_ms.training.run.mindformers"]


@pytest.mark.parametrize("name", WITHOUT_MINDSPORE)
def test_files_are_read_and_written_without_mindspore(name):
    found, new = set(), {module for module in FILES if room(module) == name}
    while new:
        found |= new
        new = {other for module in new for other in IMPORTS[module]} - found
    assert not [module for module in found if "mindspore" in frameworks(FILES[module])]


def test_no_file_reads_the_weight_of_a_cell():
    """A projection gives its matrix, a norm its handle: int8 or a low-rank pair would be lost past them."""
    own = {node for tree in FILES.values() for node in ast.walk(tree)
           if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self"}
    found = [f"{module}:{node.lineno}" for module, tree in FILES.items() for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and node.attr in ("weight", "norm_gamma") and node not in own]
    assert not found


def test_no_field_of_one_architecture_is_named_elsewhere():
    shared = {each.name for record in vars(plan).values() if dataclasses.is_dataclass(record)
              for each in dataclasses.fields(record)}
    shared |= {"architectures", "model_type", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
               "rope_parameters", "rope_scaling", "dtype", "torch_dtype", "compute_dtype", "quantization_config"}
    members = set(ARCHITECTURES.values())
    fields = {name for member in members for name in member.given_fields()} - shared
    found = []
    for module, tree in FILES.items():
        if module not in {member.__module__ for member in members}:
            for node in ast.walk(tree):
                name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) \
                    else node.arg if isinstance(node, ast.keyword) else None
                if isinstance(name, str) and name in fields:
                    found.append(f"{module}:{node.lineno}: {name}")
    assert not found


def test_files_have_one_idea_each():
    sources = [path for suffix in ("*.py", "*.cpp", "*.h") for path in PACKAGE.rglob(suffix)]
    assert not [path.name for path in sources if len(path.read_text(encoding="utf-8").splitlines()) >= 400]
