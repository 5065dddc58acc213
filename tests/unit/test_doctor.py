"""The doctor: right on a sound environment, helpful on a broken one, strict on golden numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rgbench.cli.doctor import checks, explain_torchvision
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden"


def test_this_environment_is_sound() -> None:
    found = {check.name: check for check in checks()}
    assert {
        "python",
        "torch",
        "torchvision",
        "device",
        "world benchtop",
        "EfficientNet-Lite0",
        "model hub",
    } <= found.keys()
    assert [c for c in found.values() if c.status == "missing"] == []


def broken(tmp_path: Path, package: str, code: str) -> str:
    """Output of the doctor where a package fails on import as given."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "rgbench", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_mixed_torch_builds_are_recognised(tmp_path: Path) -> None:
    out = broken(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    line = next(line for line in out.splitlines() if line.startswith("torchvision"))
    assert "different builds" in line and "pip install --force-reinstall torch torchvision" in line


def test_a_torch_that_does_not_load_leaves_the_doctor_standing(tmp_path: Path) -> None:
    out = broken(tmp_path, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    assert "torch\tmissing\tcannot be imported: libcudart.so.13" in out
    assert "world benchtop\tok" in out


def test_other_torchvision_failures_are_passed_on() -> None:
    check = explain_torchvision(ImportError("no module named torchvision"))
    assert check.status == "missing" and "no module named torchvision" in check.detail
