"""``import rgbench``: light, the same whatever was imported before, frames and axes in place of files."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import rgbench
from rgbench import api
from rgbench.core.errors import UsageError
from rgbench.core.run import RunDirectory
from tests.history.plausible import write_model

FEW = 60  # modules that are new after ``import rgbench``; pydantic alone has more


def test_the_import_is_light() -> None:
    code = "import sys; before = set(sys.modules); import rgbench; dir(rgbench); new = set(sys.modules) - before\n"
    code += "print(len(new), *sorted({name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, *names = done.stdout.split()
    assert names == ["rgbench"] and int(number) < FEW


def test_packages_are_called_as_functions_before_and_after_their_import() -> None:
    code = "import rgbench\ntry: rgbench.train('lrmm')\nexcept Exception as error: print(error)\n"
    code += "import rgbench.train.recipe as recipe; print(recipe.load_recipe('lcd').kind)\n"
    code += "try: rgbench.train('lrmm')\nexcept Exception as error: print(error)\nrgbench.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    first, kind, second = done.stdout.splitlines()
    assert first == second and "did you mean 'lrm'?" in first and kind == "lcd"
    assert done.stderr.endswith("AttributeError: module 'rgbench' has no attribute 'nothing'\n")


def test_every_name_is_there_with_its_signature() -> None:
    for name in rgbench.__all__:
        assert inspect.signature(getattr(rgbench, name)) == inspect.signature(getattr(api, name)), name
        assert getattr(api, name).__doc__ and name in dir(rgbench)
    stub = Path(rgbench.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert [name for name in rgbench.__all__ if f"import {name} as {name}\n" not in stub] == []


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for seed in range(6):
        write_model(tmp_path / "results", "lcd", seed, num=4)
        write_model(tmp_path / "results", "rg_lcd", seed, num=4)
    return tmp_path / "results"


def test_results_are_rows_of_a_frame(store: Path) -> None:
    frame = rgbench.results(store)
    assert tuple(frame.columns) == api.RESULTS and len(frame) == 12 * 8
    (row,) = frame[(frame.model == "rg_lcd-s3") & (frame.metric == "hps")].to_dict("records")
    assert (row["method"], row["seed"], row["sampler"], row["in_sample"]) == (
        "rg_lcd",
        3,
        "lcm",
        True,
    ) and frame.seed.dtype == "Int64"
    assert row["low"] < row["value"] < row["high"]
    assert rgbench.results(store / "benchtop" / "lcd-s0").model.unique().tolist() == ["lcd-s0"]
    assert rgbench.results(store.parent / "nothing").empty


def test_verdicts_and_plots_and_the_report(store: Path) -> None:
    frame = rgbench.verdict(store)
    assert tuple(frame.columns) == api.VERDICTS and set(frame.outcome) == {"over-optimised"}
    gold = frame[frame.question == "gold"].iloc[0]
    assert gold.change == pytest.approx(gold.student - gold.lcd) and gold.high < 0 and gold.says == "down"
    assert frame.attrs["words"].keys() == set(frame.model) and all(frame.attrs["words"].values())
    with pytest.raises(UsageError, match="nothing"):
        rgbench.verdict(store, ["nothing"])
    axes = rgbench.plots(store)["rewards"]
    assert axes[0].get_xlabel() and axes[0].figure is axes[-1].figure
    (file,) = rgbench.report(store, store.parent / "out", ["csv"])
    assert len(pd.read_csv(file)) > 8
    (file,) = rgbench.report(store, store.parent / "out", ["csv"], metrics=["hps"], labels={"lcd": "Mine"})
    few = pd.read_csv(file)
    assert set(few["metric"][few["kind"] == "value"]) == {"hps", "hps_no_antialias"} and "Mine" in set(few["model"])


def test_a_run_has_its_log_and_its_picture(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "lcd-s0")
    run.path.mkdir()
    (run.path / "run.json").write_text('{"schema_version": 1}')
    for step, gold in ((1, None), (2, 0.5), (3, None), (4, 0.25)):
        run.log({"step": step, "reward": 0.7} | ({} if gold is None else {"gold/utility": gold, "gold/reward": 1.0}))
    frame = rgbench.Run(run.path).log()
    assert frame.index.tolist() == [1, 2, 3, 4] and frame["gold/utility"].dropna().tolist() == [0.5, 0.25]
    axes = rgbench.Run(run.path).plot()
    assert axes.get_ylabel() == "gold utility" and axes.get_xlabel() == "trained reward"
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 0.5], [1.0, 0.25]]


def test_wrong_options_are_answered_before_torch() -> None:
    code = "import sys, rgbench\ntry: rgbench.evaluate('teacher', metric='fid')\n"
    code += "except rgbench.core.errors.UsageError as error: print(error)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unknown option 'metric'; did you mean 'metrics'?")
