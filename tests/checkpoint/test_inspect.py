import json

import numpy as np
import pytest

from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.inspect import diff, inspect, main
from pangu_ms.conversion.command import main as convert
from tests.checkpoint import generate


@pytest.fixture(scope="module")
def release(data, tmp_path_factory):
    """Two shards, for reading alone."""
    config = generate.config(data, **generate.SLICEABLE)
    return generate.write(tmp_path_factory.mktemp("inspect"), config, generate.tensors(config), 2)


def altered(release, tmp_path, change):
    """A copy of the release with its tensors changed by `change(tensors)`."""
    config = read_config(release)
    found = generate.tensors(config)
    change(found)
    return generate.write(tmp_path / "altered", config, found)


def test_components_add_up(data):
    report = inspect(data / "tiny")
    count = read_config(data / "tiny").parameter_count()
    found = {name: fields["parameters"] for name, fields in report["components"].items()}
    assert found.pop("mtp copies") == count["with_copies"] - count["trunk_and_mtp"]
    assert found == count["components"] | {"mtp": count["mtp"]}
    assert report["total"] == {"tensors": 356, "parameters": count["with_copies"], "dtypes": ["float32"],
                               "bytes": 4 * count["with_copies"]}
    assert report["fits"]


@pytest.mark.parametrize("name, computed", [("embedded", 3 * 4), ("pro_moe", None)])
def test_what_follows_from_the_config_is_counted_apart(data, name, computed):
    report, count = inspect(data / name), read_config(data / name).parameter_count()
    found = {name: fields["parameters"] for name, fields in report["components"].items()}
    assert found.pop("computed", None) == computed and found == count["components"] and report["fits"]


def test_the_mtp_layer_of_ultra_is_counted_apart(data):
    report, count = inspect(data / "ultra_moe"), read_config(data / "ultra_moe").parameter_count()
    found = {name: fields["parameters"] for name, fields in report["components"].items()}
    assert found == count["components"] | {"mtp": count["mtp"]} and report["fits"]


def test_values(data, tmp_path):
    config = generate.config(data)
    found = generate.tensors(config, "float32")
    norms = [values for name, values in found.items() if name.startswith("model.merge_mhc_module.")]
    norms[0].ravel()[:4] = [np.nan, np.inf, -np.inf, -9]
    found_norms = np.concatenate([values.ravel() for values in norms])
    finite = found_norms[np.isfinite(found_norms)].astype(np.float64)
    report = inspect(generate.write(tmp_path, config, found), values=True)["components"]["merge"]
    assert (report["nan"], report["inf"], report["min"]) == (1, 2, -9)
    assert report["max"] == finite.max() and report["norm"] == pytest.approx(np.sqrt(np.square(finite).sum()))


def test_a_checkpoint_that_does_not_fit_is_shown(release, tmp_path, capsys):
    def change(found):
        found["stray"] = np.zeros(5, np.float32)
        del found["model.norm.weight"]

    report = inspect(altered(release, tmp_path, change))
    assert not report["fits"] and report["components"]["unknown"]["parameters"] == 5
    assert main([str(tmp_path / "altered")]) == 1
    text = capsys.readouterr().out
    assert "unknown" in text and "1 missing:\n  model.norm.weight" in text and "1 unexpected:\n  stray" in text


@pytest.mark.parametrize("options", [
    [], ["--tensor-parallel", "2"], ["--tensor-parallel", "2", "--expert-parallel", "4"]])
def test_layouts_of_one_model_do_not_differ(release, tmp_path, options):
    assert convert(["hf2ms", str(release), str(tmp_path / "ms"), *options]) == 0
    assert diff(release, tmp_path / "ms") == {"equal": True, "compared": 224, "differences": []}
    assert diff(tmp_path / "ms", release)["equal"]


def test_differences_are_found(release, tmp_path, capsys):
    expert = "model.layers.2.mlp.experts.5.down_proj.weight"

    def change(found):
        found[expert] = found[expert].copy()
        found[expert][3, 4] = 0x4120  # 10.0 in bfloat16
        found["model.norm.weight"] = found["model.norm.weight"].copy()
        found["model.norm.weight"][0] = 0x7FC0  # not a number

    report = diff(release, altered(release, tmp_path, change))
    original = generate.tensors(read_config(release))[expert][3, 4]
    distance = abs(10 - np.array([int(original) << 16], np.uint32).view(np.float32)[0])
    found = {d["name"]: d["largest_difference"] for d in report["differences"]}
    assert found == {"model.norm.weight": None,
                     "model.layers.2.mlp.experts.down_proj.weight": pytest.approx(distance)}
    assert main([str(release), "--diff", str(tmp_path / "altered"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["compared"] == 224


def test_what_is_no_number_on_both_sides_is_equal(release, tmp_path):
    config = read_config(release)
    sides = []
    for name, value in (("left", 0x3F80), ("right", 0x4000)):  # 1 and 2 in bfloat16, behind what is no number
        found = generate.tensors(config)
        found["model.norm.weight"][:3] = [0x7FC0, 0x7F80, value]
        sides.append(generate.write(tmp_path / name, config, found))
    assert diff(*sides)["differences"] == [
        {"name": "model.norm.weight", "dtypes": ["bfloat16", "bfloat16"], "largest_difference": 1.0}]


def test_formats_shapes_and_missing_parameters_are_told(data, release, tmp_path, capsys):
    assert convert(["hf2ms", str(release), str(tmp_path / "wide"), "--dtype", "float32", "--mtp", "drop"]) == 0
    found = {d["name"]: d for d in diff(release, tmp_path / "wide")["differences"]}
    assert found["model.layers.4.eh_proj.weight"]["missing_in"] == str(tmp_path / "wide")
    assert found["model.norm.weight"] == {"name": "model.norm.weight", "dtypes": ["bfloat16", "float32"],
                                          "largest_difference": 0.0}
    shapes = {d["name"]: d.get("shapes") for d in diff(data / "tiny", data / "odd")["differences"]}
    assert shapes["model.norm.weight"] == [[48], [40]]
    assert main([str(data / "tiny"), "--diff", str(data / "odd")]) == 1
    text = capsys.readouterr().out
    assert "... and 242 more\n202 parameters compared: 272 differences" in text


def test_int8_scales_are_no_parameters(data, tmp_path):
    config = generate.config(data)
    report = inspect(generate.write(tmp_path, config, generate.tensors(config, int8=True)))
    assert report["fits"] and report["total"]["parameters"] == config.parameter_count()["with_copies"]
    assert report["components"]["expert"]["dtypes"] == ["bfloat16", "int8"]


def test_damage_leaves_with_code_2(data, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
