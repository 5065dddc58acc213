"""Growth of cost: each dimension changes what it says and nothing else; ranks tell exchange from arithmetic."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rgbench.cli.main import app
from rgbench.core.errors import UsageError
from tests.unit.test_bench_parts import TINY
from tools.bench import api, dimensions, ranks
from tools.bench.growth_tables import metrics
from tools.bench.random_models import benchtop_shape
from tools.bench.subject import RANDOM, RECIPES

SMALL = ["train.batch_size=2", "train.sample_every=0"]


def grow(over: str, values: list[int], methods: list[str], overrides: list[str] = SMALL) -> list[dict]:
    found = api.cost_growth(over=over, values=values, preset="benchtop", methods=methods, device="cpu",
                            overrides=overrides, rounds=1, say=print)  # fmt: skip
    json.dumps(found, allow_nan=False)
    assert found["what"] == "growth" and found["over"] == over
    return found["rows"]


@pytest.mark.long
def test_twice_the_batch_is_twice_the_arithmetic():
    one, two = grow("batch", [1, 2], ["lcd"], [])
    assert (one["batch_size"], two["batch_size"]) == (1, 2) and one["weights"] == "shipped"
    assert two["flops"] == pytest.approx(2 * one["flops"], rel=0.01)


@pytest.mark.long
def test_four_times_the_pixels_are_at_least_four_times_the_arithmetic():
    small, large = grow("resolution", [64, 128], ["lrm"])
    assert (small["resolution"], large["resolution"]) == (64, 128) and large["weights"] == "random"
    assert 3.5 < large["flops"] / small["flops"] < 16  # attention grows faster, the text towers not at all
    assert large["batch_size"] == small["batch_size"] == 2


@pytest.mark.long
def test_the_proxy_alone_grows():
    shallow, deep = grow("proxy", [1, 3], ["lcd"])
    assert shallow["method"] == deep["method"] == "lrm" and shallow["resolution"] == deep["resolution"] == 64
    layer = 12 * 96**2  # attention 4 d², perceptron 8 d², without biases and norms
    assert deep["proxy_parameters"] - shallow["proxy_parameters"] == pytest.approx(2 * layer, rel=0.02)
    assert deep["flops"] > shallow["flops"]


@pytest.mark.long
def test_two_ranks_exchange_and_one_does_not():
    plans = ((1, 2), (2, 2))
    alone, two = ranks.measure(["lcd"], SMALL, 2, "cpu", plans, print)
    assert (alone["ranks"], two["ranks"]) == (1, 2) and alone["threads_each"] == two["threads_each"] == 1
    assert two["all_reduce_alone_sec"]["median"] > 10 * alone["all_reduce_alone_sec"]["median"]
    exchange = two["exchange_sec"]
    assert 0 < sum(value["median"] for value in exchange.values()) < two["seconds"]["median"]
    assert exchange["average"]["median"] > alone["exchange_sec"]["average"]["median"]


def test_shapes_are_the_shipped_ones():
    shape = benchtop_shape()
    assert shape.side == 64 and shape.unet["block_out_channels"] == [64, 128] and shape.proxy["layers"] == 4
    large = dimensions.grown("resolution", 128, shape)
    assert large.side == 128 and large.proxy["image_size"] == 16 and large.vae == shape.vae
    assert dimensions.grown("proxy", 8, shape).proxy == shape.proxy | {"layers": 8}
    with pytest.raises(UsageError, match="72 px is no multiple of 16"):
        dimensions.grown("resolution", 72, shape)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bacth"], "did you mean 'batch'"),
        (["batch", "--values", "8,x"], "expected numbers such as"),
        (["ranks", "--values", "3"], "takes no --values"),
        (["batch", "--method", "ldc"], "--method ldc"),
    ],
)
def test_what_cannot_be_is_refused(words, message, tmp_path):
    done = CliRunner().invoke(app, ["bench", "growth", *words, "--out", str(tmp_path)])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "num", "chosen"), [("benchtop", 128, ["hps", "fid", "kid"]), ("tiny", 8, ["hps", "fid"])]
)
def test_each_metric_is_timed_alone_and_together(preset, num, chosen, tmp_path, monkeypatch):
    monkeypatch.setitem(RANDOM, "tiny", TINY)
    monkeypatch.setitem(RECIPES, "tiny", "sd21/{}")
    found = api.metric_costs(preset=preset, num=num, metrics=chosen, device="cpu", dtype="float32")
    json.dumps(found, allow_nan=False)
    row = found["rows"][0]
    assert list(row["alone"]) == chosen == row["together"]["metrics"] and row["generation_per_1000_sec"] > 0
    for costs in (*row["alone"].values(), row["together"]):
        assert costs["per_1000_sec"] > 0 and costs["finish_sec"] > 0 and costs["load_sec"] >= 0
    if preset == "benchtop":  # both need the same features, which the pass together makes once
        apart = row["alone"]["fid"]["per_1000_sec"] + row["alone"]["kid"]["per_1000_sec"]
        assert row["together"]["per_1000_sec"] < 0.9 * (apart + row["alone"]["hps"]["per_1000_sec"])


@pytest.mark.long
def test_a_probe_that_does_not_suit_the_prompts_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = api.metric_costs(preset="benchtop", num=24, metrics=[], device="cpu", dtype="float32")
    (row,) = found["rows"]
    assert list(row["left_out"]) == ["diversity"] and "8 images of each prompt" in row["left_out"]["diversity"]
    assert "spectrum" in row["alone"] and "diversity" not in row["alone"]
    assert "- diversity was left out: metric diversity needs" in metrics(found)
