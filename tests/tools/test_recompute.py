"""Values of `rgbench eval` against tools/recompute.py, which takes images and values from other packages."""

from __future__ import annotations

from rgbench.models.presets import find_preset
from tools import recompute

METRICS = 12  # FD, four of neighbours, Vendi, the reward twice, four of the spectrum


def test_values_without_rgbench(cli, tmp_path, monkeypatch, capsys):
    teacher = find_preset("benchtop").teacher_folder()
    done = cli("eval", teacher, "--metric", "fid,prdc,vendi,hps,spectrum", "--num", "32", "--steps", "3")
    assert done.returncode == 0, done.stderr
    words = [str(next((tmp_path / "results" / "benchtop").iterdir())), str(teacher)]
    assert recompute.main(words) == 0
    assert capsys.readouterr().out.endswith(f"{METRICS} values agree\n")

    compare = recompute.compare
    monkeypatch.setattr(
        recompute,
        "compare",
        lambda value, found: compare(value, found * (1.002 if value.metric == "fd_efflite0" else 1)),
    )
    assert recompute.main(words) == 1
    assert capsys.readouterr().out.endswith("differ: fd_efflite0\n")
