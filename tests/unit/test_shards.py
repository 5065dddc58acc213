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
from rgbench.core.registry import TABLES
from rgbench.evaluate import evaluate as gather
from rgbench.evaluate.evaluate import evaluate, merge
from rgbench.evaluate.results import load_results, load_samples
from rgbench.evaluate.shards import Shard, parse_shard
from rgbench.metrics.base import Measurement, Metric, Quantity, absorb, can_be_carried, gathered
from tests.tiny_models import save_run

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


def run(runs: Path, metrics: list[str], **options) -> list[Path]:
    given = {"num": NUM, "runs": runs, "batch_size": 2, "device": "cpu", "keep_images": 0}
    return evaluate(["rg_lcd-s0"], metrics, **{**given, **options})


class Counting:
    """A metric that counts what it sees, and may stop the process as it does so."""

    gathers_per_image = ("seen",)
    gathers_sums = ("total",)
    num_updates = 0
    stop_after = 0

    def __init__(self, context):
        metric = Metric(name="counting", label="Counting", direction="lower", unit="", family="reward", decimals=1)
        self.quantities = (Quantity(metric, context.protocol()),)
        self.seen, self.total = np.zeros(len(context.prompts)), torch.zeros(1)

    def update(self, images, prompts, positions):
        self.seen[positions] += images.double().mean((1, 2, 3)).numpy()
        self.total += len(positions)
        type(self).num_updates += 1
        if type(self).num_updates == type(self).stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self):
        rows = self.seen + float(self.total)
        return [Measurement(self.quantities[0], float(rows.mean()), None, len(rows), rows=rows)]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(TABLES["metric"], "counting", f"{__name__}:Counting")
    monkeypatch.setattr(Counting, "num_updates", 0)
    monkeypatch.setattr(Counting, "stop_after", 0)


@pytest.mark.parametrize(("num", "count"), [(12, 3), (200, 3), (1000, 7), (5, 5), (4096, 64), (1, 1)])
def test_shares_tile_the_images(num, count):
    shares = [Shard(i + 1, count).positions(num) for i in range(count)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(num))
    assert all(len(share) for share in shares)
    if num >= 64 * count:
        assert all(set(share // 64 % count) == {i} for i, share in enumerate(shares)), "whole batches"


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, "1/1"),
        ("3/64", {}, "3/64"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "8"}, "1/8"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "64"}, "7/64"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, "1/4"),
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


def test_merged_figures_equal_those_of_one_pass(runs, place, capsys):
    run(runs, METRICS, results=Path("whole"))
    for i in (2, 3):
        assert run(runs, METRICS, shard=f"{i}/3") == []
    with pytest.raises(UsageError, match=r"1 of 3 shards are not there or not finished: '1/3'; make each with: .*1/3"):
        merge()
    run(runs, METRICS, shard="1/3")
    assert not load_results(Path("results")), "figures come with the merge"
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        merge(device="tpu")  # of the merge, not of the shards
    files = merge()
    merged, whole = ({r.metric.name: r for r in load_results(Path(d))} for d in ("results", "whole"))
    assert len(files) == len(merged) == len(whole) > 10
    for name, result in whole.items():
        assert merged[name].value == pytest.approx(result.value, rel=1e-9, abs=1e-12), name
        if result.interval is not None:
            assert merged[name].interval.low == pytest.approx(result.interval.low, rel=1e-9, abs=1e-12), name
        assert merged[name].protocol == result.protocol and merged[name].generation == result.generation
        assert load_samples(merged[name]) == load_samples(result)
    assert merged["kd_efflite0"].value == whole["kd_efflite0"].value, "to the last bit"
    assert not list(Path("results").rglob("*.safetensors")), "shards are removed once their figures are stored"
    with pytest.raises(UsageError, match="no shard to merge"):
        merge()


def test_an_interrupted_pass_goes_on_where_it_was(runs, place, counting, monkeypatch, capsys):
    run(runs, ["counting", "kid"], results=Path("whole"))
    assert Counting.num_updates == 6
    monkeypatch.setattr(Counting, "stop_after", 6 + 2)
    with pytest.raises(Interrupted, match="resume with: rgbench eval rg_lcd-s0"):
        run(runs, ["counting", "kid"])
    run(runs, ["counting", "kid"])
    assert Counting.num_updates == 12, "no image was seen twice"
    assert "goes on after 4 of 12 images" in capsys.readouterr().err
    whole, resumed = ({r.metric.name: r for r in load_results(Path(d))} for d in ("whole", "results"))
    for name, result in whole.items():
        assert resumed[name].value == result.value and load_samples(resumed[name]) == load_samples(result)
    assert not list(Path("results").rglob("*.safetensors"))


def test_a_damaged_pause_is_made_again(runs, place, counting, monkeypatch, caplog):
    monkeypatch.setattr(Counting, "stop_after", 2)
    with pytest.raises(Interrupted):
        run(runs, ["counting"])
    (file,) = Path("results").rglob("*-1of1.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    run(runs, ["counting"])
    assert "made again" in caplog.text and Counting.num_updates == 2 + 6


class Breaking(Counting):
    """Fails when it should give its figure, as long as it is told to."""

    broken = True

    def finish(self):
        if self.broken:
            raise RgbenchError("the figure broke")
        return super().finish()


def test_after_a_broken_figure_the_rest_is_made_without_the_images(runs, place, counting, monkeypatch):
    monkeypatch.setitem(TABLES["metric"], "breaking", f"{__name__}:Breaking")
    monkeypatch.setattr(gather, "WORTH_SEC", 0)
    with pytest.raises(RgbenchError, match="the figure broke"):
        run(runs, ["kid", "breaking"])
    assert Breaking.num_updates == 6 and len(load_results(Path("results"))) == 1, "the first figure stays"
    monkeypatch.setattr(Breaking, "broken", False)
    run(runs, ["kid", "breaking"])
    assert Breaking.num_updates == 6 and len(load_results(Path("results"))) == 2
    assert not list(Path("results").rglob("*.safetensors"))


def test_a_metric_that_keeps_silent_is_not_shared(runs, place, counting, monkeypatch):
    monkeypatch.delattr(Counting, "gathers_per_image")
    monkeypatch.delattr(Counting, "gathers_sums")
    with pytest.raises(UsageError, match="metric counting does not say what it gathers; measure it without --shard"):
        run(runs, ["counting"], shard="1/3")
    assert run(runs, ["counting"])


class Holder:
    gathers_within = ("parts",)

    def __init__(self) -> None:
        self.parts = [Inner(), Inner()]


class Inner:
    gathers_per_image = ("rows", "power.named")
    gathers_sums = ("count",)

    def __init__(self) -> None:
        self.rows, self.count = np.zeros((2, 6)), np.zeros(3)
        self.power = Holding()


class Holding:
    def __init__(self) -> None:
        self.named = {"a": np.zeros(6), "b": torch.zeros(6)}


def test_what_is_gathered_moves_through_json_free_arrays():
    first, second = Holder(), Holder()
    at = np.array([1, 4])
    first.parts[1].rows[:, at] = 7
    first.parts[1].count += 2
    first.parts[0].power.named["b"][at] = 5
    second.parts[1].count += 1
    second.parts[1].rows[:, 0] = 3
    absorb(second, at, gathered(first, at))
    assert second.parts[1].rows[0].tolist() == [3, 7, 0, 0, 7, 0] and second.parts[1].count.tolist() == [3, 3, 3]
    assert second.parts[0].power.named["b"].tolist() == [0, 5, 0, 0, 5, 0]
    assert can_be_carried(first) and not can_be_carried(object())
    first.parts.append(object())
    assert not can_be_carried(first), "one part that keeps silent silences the whole"


def test_all_images_are_saved_where_that_is_asked_for(runs, place):
    (file,) = run(runs, ["kid"], save_images=True)
    index = json.loads((file.parent / "images" / "index.json").read_text())
    assert len(index) == NUM and all((file.parent / "images" / row["file"]).is_file() for row in index)
    evaluate([str(file.parent / "images")], ["kid"], num=NUM, prompts="benchtop", device="cpu", batch_size=2)
    given, made = (r for r in sorted(load_results(Path("results")), key=lambda r: r.model))
    assert given.model == "images" and given.value == made.value, "saved images give the figure of their model"


def test_figures_are_made_in_whole_float32(runs, place, monkeypatch):
    seen: list[bool] = []

    def evaluate_target(*_: object) -> list[Path]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return []

    monkeypatch.setattr("rgbench.evaluate.evaluate.evaluate_target", evaluate_target)
    run(runs, METRICS)
    assert seen and not any(seen)
