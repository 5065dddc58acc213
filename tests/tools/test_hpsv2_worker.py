"""rgbench's HPS, the worker hpsv2 and the package hpsv2 itself score alike, where an environment has the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rgbench.rewards.remote import scorer_module
from tools.hpsv2_worker import main

PYTHON = Path(os.environ.get("RGBENCH_HPSV2_PYTHON", "~/envs/hpsv2/bin/python")).expanduser()


@pytest.mark.long
@pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}; in a new environment there: {scorer_module('hpsv2').INSTALL}"
)
def test_the_packages_own_score_agrees(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(str(PYTHON)) == 0, capfd.readouterr().out
