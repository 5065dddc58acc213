"""The doctor: right on a sound environment, helpful on a broken one, strict on golden numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rgbench.cli.doctor import checks, explain_torchvision
from tests.conftest import ROOT, Cli

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


@pytest.mark.parametrize("stem", ["step_epsilon", "step_v", "hps_preprocess"])
def test_golden_numbers_pass(cli: Cli, stem: str) -> None:
    done = cli("doctor", "--golden", GOLDEN / stem)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) >= 10
    assert all(float(error) <= 1e-6 and verdict == "ok" for _, _, error, verdict in rows)


SPOILED = [("step_v", "out_target", 1e-8), ("hps_preprocess", "expected_0_28_aa1", 1e-5)]


@pytest.mark.parametrize(("stem", "name", "relative"), SPOILED)
def test_golden_numbers_that_are_off_fail(cli: Cli, tmp_path: Path, stem: str, name: str, relative: float) -> None:
    tensors = load_file(GOLDEN / f"{stem}.safetensors")
    tensors[name] = tensors[name] * (1 + relative)
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    if (GOLDEN / f"{stem}.json").exists():
        (tmp_path / f"{stem}.json").write_bytes((GOLDEN / f"{stem}.json").read_bytes())
    done = cli("doctor", "--golden", tmp_path / stem)
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if "above" in line]
    assert len(bad) == 1 and f"\t{name}\t" in bad[0]


def test_golden_files_that_are_absent(cli: Cli) -> None:
    done = cli("doctor", "--golden", "nowhere/step")
    assert done.returncode == 2
    assert "error: " in done.stderr and "nowhere/step" in done.stderr and "Traceback" not in done.stderr
