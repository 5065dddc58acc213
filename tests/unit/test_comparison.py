"""Models compared image by image, methods seed by seed; what is missing stays missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rgbench.core.errors import UsageError
from rgbench.judge.compare import compare_methods, compare_models
from rgbench.judge.verdict import models_of
from rgbench.metrics.statistics import Wins, wilson_interval
from tests.results_maker import put

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=64)
GAIN = RNG.normal(0.3, 0.2, size=6)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for seed in range(6):
        luck = RNG.normal()
        put(root, f"lcd-s{seed}", "oracle_mean", rows=BASE + luck)
        put(root, f"lrm-s{seed}", "oracle_mean", rows=BASE + luck + GAIN[seed])
        put(root, f"lcd-s{seed}", "fd_efflite0", 10 + luck)
        put(root, f"lrm-s{seed}", "fd_efflite0", 10 + luck - GAIN[seed])
    put(root, "lcd-s0", "wavelet_noise_gap", rows=np.abs(BASE) + 1)
    put(root, "lrm-s0", "wavelet_noise_gap", rows=np.abs(BASE) + np.where(np.arange(64) < 48, 0.5, 1.5))
    return root


def test_methods_are_compared_over_seeds(results):
    found = {c.result.metric.name: c for c in compare_methods(models_of(results), "lcd", ("lrm", "oracle_mean"))}
    primary, other = found["oracle_mean"], found["fd_efflite0"]
    known = stats.ttest_1samp(GAIN, 0)
    assert primary.primary and primary.seeds == tuple(range(6)) and primary.mean == pytest.approx(GAIN.mean())
    assert primary.p == pytest.approx(known.pvalue, rel=1e-6)
    power = (stats.t.ppf(0.975, 5) + stats.t.ppf(0.8, 5)) * GAIN.std(ddof=1) / np.sqrt(6)
    assert primary.detectable == pytest.approx(power, rel=1e-6)
    assert (primary.low, primary.high) == pytest.approx(tuple(known.confidence_interval()), rel=1e-6)
    assert not other.primary and other.p == pytest.approx(known.pvalue, rel=1e-6), "alone among the rest"
    assert "wavelet_noise_gap" not in found, "one common seed is no comparison"


def test_all_but_the_primary_are_adjusted(results, tmp_path):
    for metric in ("hps_aa0", "hps_aa1", "oracle_mean"):
        for seed in range(6):
            put(tmp_path, f"lcd-s{seed}", metric, float(seed))
            put(tmp_path, f"lrm-s{seed}", metric, seed + GAIN[seed])
    found = {c.result.metric.name: c.p for c in compare_methods(models_of(tmp_path), "lcd", ("lrm", "oracle_mean"))}
    raw = stats.ttest_1samp(GAIN, 0).pvalue
    assert found["oracle_mean"] == pytest.approx(raw, rel=1e-6)
    assert found["hps_aa0"] == found["hps_aa1"] == pytest.approx(2 * raw, rel=1e-6)


def test_few_seeds_give_an_interval_and_no_p(results, tmp_path, cli):
    for seed in range(3):
        put(tmp_path, f"lcd-s{seed}", "oracle_mean", float(seed))
        put(tmp_path, f"lrm-s{seed}", "oracle_mean", seed + GAIN[seed])
    put(tmp_path, "lrm-s2", "oracle_mean")
    (found,) = compare_methods(models_of(tmp_path), "lcd", ("lrm", "oracle_mean"))
    assert found.p is None and found.seeds == (0, 1), "a figure without a value is missing"
    done = cli("compare", tmp_path, "--primary", "lrm:oracle_mean")
    assert done.returncode == 0 and "too few seeds\tprimary" in done.stdout


def test_models_are_compared_on_their_images(results, cli):
    found = {(c.model, c.result.metric.name): c for c in compare_models(models_of(results), "lcd")}
    assert len(found) == 13 and {c.base for c in found.values()} == {f"lcd-s{i}" for i in range(6)}
    gain = found["lrm-s3", "oracle_mean"]
    assert gain.base == "lcd-s3" and gain.found.value == pytest.approx(GAIN[3]) and gain.images.wins.rate == 1
    assert found["lrm-s3", "fd_efflite0"].images is None
    noise = found["lrm-s0", "wavelet_noise_gap"].images
    assert noise.wins == Wins(48 / 64, wilson_interval(48, 64)), "a win is the image nearer to the target"
    within = np.var([-0.5] * 24 + [0.5] * 8, ddof=1)  # of the differences, alike in both groups of prompts
    assert noise.detectable == pytest.approx(2.801585 * np.sqrt(within / 64), rel=1e-6)
    done = cli("compare", results)
    assert "lrm-s0\tlcd-s0\twavelet_noise_gap\t-0.25" in done.stdout and "75%" in done.stdout


def test_what_only_the_model_has_keeps_its_row_without_a_figure(tmp_path, cli):
    put(tmp_path, "lcd-s0", "oracle_mean", rows=BASE)
    put(tmp_path, "lrm-s0", "oracle_mean", rows=BASE)
    put(tmp_path, "lcd-s0", "fd_efflite0")
    for metric in ("hfer_gap_db", "fd_efflite0"):
        put(tmp_path, "lrm-s0", metric, 0.5, half=0.1)
    done = cli("compare", tmp_path)
    lines = sorted(line.split("\t")[2:] for line in done.stdout.splitlines())
    assert lines[:2] == [["fd_efflite0", *["—"] * 5], ["hfer_gap_db", *["—"] * 5]], "missing is missing, never 0"
    assert lines[2] == ["oracle_mean", "0.00", "[0.00, 0.00]", "50%", "[38%, 62%]", "0.00"], "no change is 0"


def test_the_teacher_compares_at_its_own_sampler_settings(tmp_path):
    put(tmp_path, "teacher", "hfer_gap_db", -1.0, jackknife=-1 + 0.01 * BASE[:20], sampler_steps=50)
    put(tmp_path, "lcd-s0", "hfer_gap_db", 0.5, jackknife=0.5 + 0.01 * BASE[:20])
    put(tmp_path, "lrm-s0", "hfer_gap_db", 2.0, jackknife=2 + 0.02 * BASE[:20], sampler_steps=8)
    found = {c.model: c.found for c in compare_models(models_of(tmp_path), "teacher")}
    assert found["lcd-s0"].value == 1.5 and found["lcd-s0"].basis == "jackknife"
    assert found["lcd-s0"].high - found["lcd-s0"].low < 1e-9 < found["lrm-s0"].high - found["lrm-s0"].low
    assert not compare_models(models_of(tmp_path), "lcd"), "students at two sampler settings are not compared"


@pytest.mark.parametrize(
    ("base", "primary", "message"),
    [
        ("lcf", "lrm:oracle_mean", "no model 'lcf' in the results; did you mean 'lcd'"),
        (
            "lcd",
            "lrm:oracle_men",
            "lrm:oracle_men against lcd is in the results 0 times.*did you mean 'lrm:oracle_mean'",
        ),
        ("lcd", "lrm:wavelet_noise_gap", "0 times on two common training seeds"),
    ],
)
def test_what_is_not_there_is_said(results, base, primary, message):
    method, _, metric = primary.partition(":")
    with pytest.raises(UsageError, match=message):
        compare_methods(models_of(results), base, (method, metric))
