"""Result files: round trip, ids, refusal of what is not finite, old files, concurrent writers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import (
    Generation,
    Protocol,
    Result,
    identify,
    load_result,
    load_results,
    load_samples,
    write_result,
)
from rgbench.metrics.base import Interval, Metric

HISTORY = Path(__file__).parent.parent / "history" / "results_v1"
METRIC = Metric(name="hps_aa1", label="HPS aa1", direction="higher", unit="", family="reward", decimals=2)
ROWS = {"prompt_id": ["test/0", "test/1"], "seed": [0, 0], "group": ["test", "test"], "value": [1.0, 2.5]}


def make(**fields) -> Result:
    settings = {"sampler": "lcm", "steps": 4, "guidance_scale": 5.0, "weights_sha256": "0" * 64}
    protocol = {"prompts": {"name": "benchtop", "sha256": "1" * 64, "num": 2}}
    given = {
        "world": "benchtop",
        "model": "lrm-s0",
        "method": "lrm",
        "training_seed": 0,
        "generation": Generation(id=identify("lcm4", settings), fields=settings),
        "metric": METRIC,
        "protocol": Protocol(id=identify("hps_aa1-2", protocol), fields=protocol),
        "value": 1.75,
        "interval": Interval(low=1.0, high=2.5, level=0.95, method="bootstrap"),
        "num_samples": 2,
        "flags": ("n<=d",),
        "extra": {"groups": {"test": 1.75}},
        "cost": {"nfe": 4, "train_wall_sec": None},
    }
    return Result(**{**given, **fields})


def test_round_trip_with_rows(tmp_path):
    path = write_result(tmp_path, make(), ROWS)
    assert path == tmp_path / "benchtop" / "lrm-s0" / make().generation.id / f"hps_aa1@{make().protocol.id}.json"
    (loaded,) = load_results(tmp_path)
    assert loaded.path == path
    assert loaded.model_dump() == make(samples=path.with_suffix(".parquet").name).model_dump()
    assert load_samples(loaded) == {("test/0", 0): 1.0, ("test/1", 0): 2.5}
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, loaded.samples])


def test_undefined_value_is_null_and_not_zero(tmp_path):
    path = write_result(tmp_path, make(value=None, interval=None))
    assert json.loads(path.read_text())["value"] is None
    assert load_result(path).value is None
    assert load_samples(load_result(path)) is None


def test_ids_follow_the_fields_and_not_their_order():
    assert identify("lcm4", {"a": 1, "b": [2]}) == identify("lcm4", {"b": [2], "a": 1})
    assert identify("lcm4", {"a": 1}) != identify("lcm4", {"a": 2})
    assert identify("lcm4", {"a": 1}) == "lcm4-015abd7f", "ids name files: they must never change"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, bad):
    for result, rows in (
        (make(), {**ROWS, "value": [1.0, bad]}),
        (make(extra={"power": [1.0, bad]}), None),
        (make(provenance={"x": {"y": bad}}), None),
    ):
        with pytest.raises(ValueError, match="finite|not written"):
            write_result(tmp_path, result, rows)
    with pytest.raises(ValueError, match="finite"):
        make(value=bad)
    with pytest.raises(ValueError, match="finite"):
        Interval(low=bad, high=1, level=0.95, method="")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2; this rgbench reads 1"),
        ({"schema_version": None}, "no schema version"),
        ({"value": "high"}, "value: Input should be a valid number"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"generation": {"id": "x"}}, "generation.fields: Field required"),
        ({"model": "../../evil"}, "model: .*'../../evil' cannot name a folder"),
        ({"world": ".."}, "world: .*cannot name a folder"),
        ({"generation": {"id": "a/b", "fields": {}}}, "generation.id: .*cannot name a folder"),
    ],
)
def test_files_that_are_no_results_are_named(tmp_path, change, message):
    path = write_result(tmp_path, make())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message) as caught:
        load_results(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1, "value": NaN}', '{"schema_version": 1'])
def test_files_that_are_not_strict_json(tmp_path, text):
    (tmp_path / "a@b.json").write_text(text)
    with pytest.raises(UsageError, match="a@b.json"):
        load_results(tmp_path)


def test_missing_or_damaged_rows_are_named(tmp_path):
    path = write_result(tmp_path, make(), ROWS)
    rows = path.with_suffix(".parquet")
    rows.write_bytes(rows.read_bytes()[:40])
    with pytest.raises(UsageError, match="parquet"):
        load_samples(load_result(path))
    rows.unlink()
    with pytest.raises(UsageError, match="No such file"):
        load_samples(load_result(path))


def test_old_files_load_for_ever():
    """Written by schema version 1's first release. Never regenerate them: add a folder for each new version."""
    loaded = load_results(HISTORY)
    assert [(r.model, r.metric.name, r.value) for r in loaded] == [
        ("lrm-s0", "hps_aa1", 27.5),
        ("teacher", "fd_efflite0", 12.25),
    ]
    reward, distance = loaded
    assert reward.in_sample and reward.trained_rewards == ("9a3f00c1",)
    assert load_samples(reward) == {("test/0", 0): 27.0, ("heldout/3", 0): 28.0}
    assert distance.training_seed is None and distance.flags == ("n<=d",)
    assert distance.interval.method == "delete-a-group jackknife, 20 groups"


def _write_many(root: Path, writer: int, num: int = 8) -> None:
    for i in range(num):
        fields = {"writer": writer, "i": i}
        write_result(root, make(protocol=Protocol(id=identify("hps_aa1-2", fields), fields=fields)), ROWS)
        write_result(root, make(), ROWS)  # all writers at one file


@pytest.mark.parametrize(("num_writers", "num"), [(2, 8), pytest.param(8, 200, marks=pytest.mark.long)])
def test_concurrent_writers_lose_and_tear_nothing(tmp_path, num_writers, num):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, i, num)) for i in range(num_writers)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(280)
        assert writer.exitcode == 0
    loaded = load_results(tmp_path)
    assert len(loaded) == num_writers * num + 1
    assert all(load_samples(result) for result in loaded)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".json", ".parquet")]
