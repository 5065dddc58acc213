"""`rgbench eval`'s figures against docs/measure/recompute.py, which takes images and figures from other packages."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from rgbench.models.presets import find_preset

SCRIPT = Path(__file__).parents[2] / "docs" / "measure" / "recompute.py"
METRICS = 12  # FD, four of neighbours, Vendi, the reward twice, four of the spectrum


def test_figures_without_rgbench(cli, tmp_path, monkeypatch, capsys):
    teacher = find_preset("benchtop").teacher_folder()
    done = cli("eval", teacher, "--metric", "fid,prdc,vendi,hps,spectrum", "--num", "32", "--steps", "3")
    assert done.returncode == 0, done.stderr
    model = next((tmp_path / "results" / "benchtop").iterdir())
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr("sys.argv", ["recompute.py", str(model), str(teacher)])

    assert main() == 0
    assert capsys.readouterr().out.endswith(f"{METRICS} figures agree\n")

    file = next(model.rglob("fd_efflite0@*.json"))
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"value": result["value"] * 1.002}))
    assert main() == 1
    assert capsys.readouterr().out.endswith("differ: fd_efflite0\n")
