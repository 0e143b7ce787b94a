"""pangu-generate --config: what a YAML file for predict stands for."""
from pathlib import Path

import pytest

from pangu_ms.errors import PanguError
from pangu_ms.generation.command import build_parser, main
from pangu_ms.generation.config_file import OPTIONS, with_config

FLASH = Path(__file__).parents[2] / "configs" / "openpangu_v2" / "predict_flash_92b.yaml"


def test_the_file_gives_options_and_the_command_line_wins():
    given = build_parser().parse_args(with_config(["--config", str(FLASH), "--chat", "--max-new-tokens", "7"]))
    assert (given.model, given.dtype, given.num_draft_tokens, given.max_new_tokens, given.chat) == \
        ("openPangu-2.0-Flash", "bfloat16", 3, 7, True)


def test_every_key_is_an_option(tmp_path):
    path = tmp_path / "predict.yaml"
    path.write_text("run_mode: predict\npretrained_model_dir: here\ngeneration_config:\n" +
                    "".join(f"  {name}: 2\n" for name in OPTIONS))
    given = build_parser().parse_args(with_config(["--config", str(path)]))
    assert given.model == "here" and all(getattr(given, name) == 2 for name in OPTIONS)


def test_without_a_file_nothing_changes():
    assert with_config(["--model", "x"]) == ["--model", "x"]


@pytest.mark.parametrize("text, message", [
    ("run_mode: train", "run_mode is 'train', wanted predict; pangu-train"),
    ("run_mode: predict\ngeneration_config: {temprature: 1}", "temprature: no such key; did you mean temperature?"),
    ("run_mode: predict\nmodel: 3", "model holds 3, wanted keys"),
])
def test_wrong_files_are_one_line(tmp_path, text, message, capsys):
    path = tmp_path / "predict.yaml"
    path.write_text(text)
    assert main(["--config", str(path), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(PanguError, match="No such file"):
        with_config(["--config", str(tmp_path / "none.yaml")])
