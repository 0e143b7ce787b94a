"""tools/plot_gradient_norms.py on a network of three layers."""
import pytest

import plot_gradient_norms


@pytest.mark.slow
def test_a_line_for_each_recipe_and_a_row_for_each_layer(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plot_gradient_norms.main(["--out", str(tmp_path / "norms.png"), "--layers", "3"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("layer  as usual  depth_scaled, tiny") and len(rows) == 3
    assert all(0 < float(value) < 1e3 for row in rows for value in row.split()[1:])
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
