"""Shards and pauses: the figures are those of one uninterrupted pass, or it is said what is missing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.io import load_checked, save_checked, save_safetensors_atomic
from rgbench.core.registry import TABLES
from rgbench.evaluate import evaluate as engine
from rgbench.evaluate.config import WHOLE, EvalConfig, Shard, parse_shard
from rgbench.evaluate.evaluate import merge
from rgbench.evaluate.results import ModelResult, load_results
from rgbench.evaluate.shards import FOLDER, Pass, stored_shards
from rgbench.metrics.base import Metric
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol
from tests.tiny_models import run_eval, save_run, stored_values

METRICS = ["kid", "prdc", "vendi", "hps", "spectrum"]  # rows, shared features and sums
NUM = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_run(root / "rg_lcd-s0")
    return root


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(runs: Path, metrics: list[str], **options) -> list[ModelResult]:
    given = {"num": NUM, "runs": runs, "batch_size": 2, "keep_images": 0}
    return run_eval(["rg_lcd-s0"], metrics, **{**given, **options})


class Counting(Metric):
    """A metric that counts what it sees, and may stop the process as it does so."""

    name = "counting"
    infos = (MetricInfo.of("counting", "Counting", "made up", Direction.HIGHER, Family.REWARD, decimals=1),)
    per_image_state = ("seen",)
    summed_state = ("total",)
    num_updates = 0
    stop_after = 0

    def __init__(self, context):
        super().__init__(context)
        self.planned = ((self.name, Protocol.of(self.name, context.protocol())),)
        self.seen, self.total = np.zeros(len(context.prompts)), torch.zeros(1)

    def update(self, images, prompts, positions):
        self.seen[positions] += images.double().mean((1, 2, 3)).numpy()
        self.total += len(positions)
        type(self).num_updates += 1
        if type(self).num_updates == type(self).stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def compute(self):
        rows = self.seen + float(self.total)
        return [MetricValue(*self.planned[0], value=float(rows.mean()), interval=None, num_images=len(rows), rows=rows)]


class Breaking(Counting):
    """Fails when it should give its value, as long as it is set to."""

    broken = True

    def compute(self):
        if self.broken:
            raise RgbenchError("the metric broke")
        return super().compute()


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(TABLES["metric"], "counting", f"{__name__}:Counting")
    monkeypatch.setattr(Counting, "num_updates", 0)
    monkeypatch.setattr(Counting, "stop_after", 0)


@pytest.mark.parametrize(("num", "count"), [(12, 3), (200, 3), (1000, 7), (5, 5), (4096, 64), (1, 1)])
def test_shares_tile_the_images(num, count):
    shares = [Shard(i + 1, count).positions(num) for i in range(count)]
    assert sorted(position for share in shares for position in share) == list(range(num))
    assert all(len(share) for share in shares)
    if num >= 64 * count:
        assert all({p // 64 % count for p in share} == {i} for i, share in enumerate(shares)), "whole batches"


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, "1/1"),
        ("3/64", {}, "3/64"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "8"}, "1/8"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "64"}, "7/64"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, "1/4"),
        (
            "auto",  # --array=1-9:4
            {
                **{"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1"},
                **{"SLURM_ARRAY_TASK_STEP": "4", "SLURM_ARRAY_TASK_COUNT": "3"},
            },
            "3/3",
        ),
    ],
)
def test_shares_by_name(text, environment, expected):
    assert str(parse_shard(text, environment)) == expected


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4/2", "", "auto", "1 / 4"])
def test_shares_that_are_none(text):
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text, {})
    with pytest.raises(UsageError, match="use at most 3 shards"):
        Shard(1, 4).positions(3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "--shard '3/2'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "--shard '1/'"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "two"}, "SLURM_ARRAY_TASK_COUNT is 'two'"),
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_STEP": "4"},
            "the Slurm array has gaps",
        ),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"}, "--shard '10/2'"),
    ],
)
def test_launchers_that_name_no_share(environment, message):
    with pytest.raises(UsageError, match=message):
        parse_shard("auto", environment)


def test_a_share_of_an_older_metric_is_made_again(runs, place):
    """Its file lacks what the metric accumulates today."""
    run(runs, ["hps"], shard="1/2")
    (path,) = unfinished()
    tensors, metadata = load_checked(path)
    metadata.pop("sha256", None)
    before = path.read_bytes()
    save_checked({name: value for name, value in tensors.items() if not name.startswith("hps/")}, path, metadata)
    run(runs, ["hps"], shard="1/2")
    assert path.read_bytes() == before


def test_merged_values_equal_those_of_one_pass(runs, place):
    kept = {"keep_images": 3}
    run(runs, METRICS, results=Path("whole"), **kept)
    for i in (2, 3):
        assert run(runs, METRICS, shard=f"{i}/3", **kept) == []
    with pytest.raises(UsageError, match=r"1 of 3 shards are missing or not finished: '1/3'; make each with: .*1/3"):
        merge()
    run(runs, METRICS, shard="1/3", **kept)
    assert not [value for result in load_results(Path("results")) for value in result.values], (
        "they come with the merge"
    )
    with pytest.raises(UsageError, match="--device 'tpu'"):
        merge(device="tpu")  # of the merge, not of the shards
    (result,) = merge()
    merged, whole = stored_values("results"), stored_values("whole")
    assert len(result.values) == len(merged) == len(whole) > 10
    for name, value in whole.items():
        assert merged[name].value == pytest.approx(value.value, rel=1e-9, abs=1e-12), name
        if value.interval is not None:
            assert merged[name].interval.low == pytest.approx(value.interval.low, rel=1e-9, abs=1e-12), name
        assert merged[name].protocol == value.protocol
        assert (merged[name].rows and merged[name].rows.by_image()) == (value.rows and value.rows.by_image())
    assert merged["kd_efflite0"].value == whole["kd_efflite0"].value, "to the last bit"
    (one,) = load_results(Path("whole"))
    assert result.head.generation == one.head.generation and "--shard" not in result.runs[0].command
    assert [p.tobytes() for p in result.images.values()] == [p.tobytes() for p in one.images.values()]
    assert len(result.images) == 3
    assert not list(Path("results").rglob("*.safetensors")) or all(
        ".cache" in path.parts for path in Path("results").rglob("*.safetensors")
    ), "shards are removed once their values are stored"
    with pytest.raises(UsageError, match="no shard to merge"):
        merge()


def test_an_interrupted_pass_resumes_where_it_was(runs, place, counting, monkeypatch, capsys):
    run(runs, ["counting", "kid"], results=Path("whole"), keep_images=6)
    assert Counting.num_updates == 6
    monkeypatch.setattr(Counting, "stop_after", 6 + 2)
    with pytest.raises(
        Interrupted, match="Finished results and images are kept.*\nresume with: rgbench eval rg_lcd-s0"
    ):
        run(runs, ["counting", "kid"], keep_images=6)
    (result,) = run(runs, ["counting", "kid"], keep_images=6)
    assert Counting.num_updates == 12, "no image was seen twice"
    assert "resumes after 4 of 12 images" in capsys.readouterr().err
    whole, resumed = stored_values("whole"), stored_values("results")
    for name, value in whole.items():
        assert resumed[name].value == value.value
        assert (resumed[name].rows and resumed[name].rows.by_image()) == (value.rows and value.rows.by_image())
    (one,) = load_results(Path("whole"))
    assert [p.tobytes() for p in result.images.values()] == [p.tobytes() for p in one.images.values()]
    assert not unfinished()


def unfinished() -> list[Path]:
    return list(Path("results", FOLDER).rglob("*.safetensors"))


def test_a_damaged_pause_is_made_again(runs, place, counting, monkeypatch, caplog):
    monkeypatch.setattr(Counting, "stop_after", 2)
    with pytest.raises(Interrupted):
        run(runs, ["counting"])
    (file,) = unfinished()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    run(runs, ["counting"])
    assert "made again" in caplog.text and Counting.num_updates == 2 + 6


def test_after_a_broken_metric_the_rest_is_made_without_the_images(runs, place, counting, monkeypatch):
    monkeypatch.setitem(TABLES["metric"], "breaking", f"{__name__}:Breaking")
    monkeypatch.setattr(engine, "WORTH_SEC", 0)
    with pytest.raises(RgbenchError, match="the metric broke"):
        run(runs, ["kid", "breaking"])
    assert Breaking.num_updates == 6 and set(stored_values()) == {"kd_efflite0"}, "the first value stays"
    monkeypatch.setattr(Breaking, "broken", False)
    run(runs, ["kid", "breaking"])
    assert Breaking.num_updates == 6 and len(stored_values()) == 2
    assert not unfinished()


def test_a_metric_without_declared_state_is_not_shared(runs, place, counting, monkeypatch):
    monkeypatch.setattr(Counting, "per_image_state", ())
    monkeypatch.setattr(Counting, "summed_state", ())
    with pytest.raises(UsageError, match="metric counting does not declare its state; measure it without --shard"):
        run(runs, ["counting"], shard="1/3")
    assert run(runs, ["counting"])


def test_saved_images_give_the_value_of_their_model(runs, place):
    (made,) = run(runs, ["kid"], save_images=True)
    index = json.loads((made.folder / "images" / "index.json").read_text())
    assert len(index) == NUM and all((made.folder / "images" / row["file"]).is_file() for row in index)
    (given,) = run_eval([str(made.folder / "images")], ["kid"], num=NUM, prompts="benchtop", batch_size=2)
    assert given.head.model == "images" and given.values[0].value == made.values[0].value


def test_values_are_made_in_whole_float32(runs, place, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(engine, "_evaluate_target", lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    run(runs, METRICS)
    assert seen == ["ieee"]


def test_a_foreign_file_among_unfinished_passes_is_no_pass_and_no_shard(tmp_path):
    folder = tmp_path / FOLDER / "benchtop" / "lcd-s0" / "g-0"
    save_safetensors_atomic({"a": torch.ones(2)}, folder / "other-1of1.safetensors")
    assert not Pass(folder, [], FeatureRows(2, 3), 2, 0).load(WHOLE)
    foreign = folder / "other-1of2.safetensors"
    save_safetensors_atomic({"a": torch.ones(2)}, foreign)
    with pytest.raises(UsageError, match="no shard of an evaluation") as error:
        stored_shards(tmp_path)
    assert str(foreign) in str(error.value)


def test_a_shard_of_another_version_is_refused(runs, place):
    run(runs, ["kid"], shard="1/2")
    (path,) = unfinished()
    (stored,) = stored_shards(Path("results")).values()
    assert EvalConfig(**stored["config"]).metrics == ("kid",)
    for config in (stored["config"] | {"surprise": 1}, None):
        about = json.dumps({"config": config, "count": 2})
        save_checked({"a": torch.ones(2)}, path, {"about": about, "measured": "[]"})
        with pytest.raises(UsageError, match="of another rgbench"):
            merge()
