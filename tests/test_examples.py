"""The examples run as a user runs them."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_01_generate(tmp_path):
    shown = subprocess.run([sys.executable, ROOT / "examples" / "01_generate.py"], cwd=tmp_path,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "RANDOM weights" in shown.stdout
    assert re.search(r"^  dsa +2 of 4 ", shown.stdout, re.MULTILINE)
    assert re.search(r"^parameters: 199,005 in the trunk, 122,604 in the MTP layers", shown.stdout, re.MULTILINE)
    new_ids = re.search(r"64 greedy ones:\n([\d ]+)\n", shown.stdout)[1].split()
    assert len(new_ids) == 64 and all(0 <= int(i) < 199 for i in new_ids)
    for phase in ("prefill", "decode"):
        speed = re.search(rf"^  {phase} +([\d,]+) tokens a second$", shown.stdout, re.MULTILINE)[1]
        assert int(speed.replace(",", "")) > 0
