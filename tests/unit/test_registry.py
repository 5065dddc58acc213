"""Names resolve to code, wrong names to suggestions, plug-ins by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.core.registry import TABLES, names, resolve
from tests.conftest import ROOT


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_name_resolves(table: str, name: str) -> None:
    module, _, attribute = TABLES[table][name].partition(":")
    assert resolve(table, name) is getattr(import_module(module), attribute)


def test_names_are_sorted() -> None:
    neighbours = ["dollar", "lrm_mlcm", "lrm_tcd", "mlcm", "rg_mlcm", "rg_tcd", "tcd", "vsd", "weighted"]
    assert names("trainer") == sorted(["lcd", "lrm", "lrm_pretrain", "rg_lcd", *neighbours])


@pytest.mark.parametrize("name", ["fidd", "FID", "", "os:system", "x" * 10_000])
def test_unknown_names_are_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(UsageError, match="unknown metric") as caught:
        resolve("metric", name)
    assert "fid" in str(caught.value)
    assert len(str(caught.value)) < 400


PLUGIN = """
from rgbench.core.errors import RgbenchError
from rgbench.core.registry import TABLES, names, resolve
assert names("reward") == sorted([*TABLES["reward"], "broken", "mine"])
assert resolve("reward", "mine")() == "mine"
assert resolve("reward", "hps").__module__ == "rgbench.rewards.clip"
try:
    resolve("reward", "broken")
except RgbenchError as error:
    assert "reward 'broken': the plug-in absent_module:X cannot be imported" in str(error)
else:
    raise SystemExit("a broken plug-in went unnoticed")
"""


def test_plug_ins_add_names_but_cannot_take_ours(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text("def mine():\n    return 'mine'\n")
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rgbench.reward]\nmine = plug:mine\nhps = plug:mine\nbroken = absent_module:X\n"
    )
    found = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", PLUGIN], env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
