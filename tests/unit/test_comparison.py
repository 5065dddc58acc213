"""Models compared with a base: over seeds, by images, by their spectra; what is missing stays missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt, PromptSet
from rgbench.judge.compare import compare, spectral_distance, win_rate
from rgbench.judge.models import ResultSet, load_result_sets, result_set
from rgbench.metrics.probes.spectrum import (
    SpectrumProbe,
    log_spectral_distance,
    luma_chroma,
    power_spectrum,
    radial_profile,
)
from rgbench.metrics.statistics import Wins, wilson_interval
from tests.probing import measure
from tests.results_maker import make_result
from tests.tiny_models import make_context

BASE = np.random.default_rng(0).normal(size=64)
GAIN = np.random.default_rng(1).normal(0.3, 0.2, size=6)
RINGS = 16
RADIUS = (np.arange(RINGS) + 1) / 32


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    luck = np.random.default_rng(2).normal(size=6)
    for i in range(6):
        shared = {"oracle_mean": BASE + luck[i]}
        make_result(root, f"lcd-s{i}", rows=shared, values={"fd_efflite0": 10 + luck[i]})
        rows = {"oracle_mean": BASE + luck[i] + GAIN[i]}
        make_result(root, f"lrm-s{i}", rows=rows, values={"fd_efflite0": 10 + luck[i] - GAIN[i]})
    return root


@pytest.fixture(scope="module")
def sets(root) -> list[ResultSet]:
    return load_result_sets(root)


def test_methods_are_compared_over_seeds_and_all_but_the_primary_adjusted(sets):
    found = {each.column.metric: each for each in compare(sets, "lcd", primary=("lrm", "oracle_mean"))}
    raw = stats.ttest_1samp(GAIN, 0).pvalue
    primary, other = found["oracle_mean"], found["fd_efflite0"]
    assert primary.primary and primary.p == pytest.approx(raw, rel=1e-6)
    assert not other.primary and other.p == pytest.approx(raw, rel=1e-6), "alone among the rest"
    both = {each.column.metric: each.p for each in compare(sets, "lcd")}
    assert both["oracle_mean"] == both["fd_efflite0"] == pytest.approx(2 * raw, rel=1e-6)
    assert found["oracle_mean"].wins.rate == 1 and found["fd_efflite0"].wins is None


def test_runs_are_compared_on_their_images(sets):
    (found, _) = compare(sets, "lcd-s3", ["lrm-s3"])
    assert found.delta.value == pytest.approx(GAIN[3]) and found.delta.basis == "images" and found.p is None
    assert found.wins == Wins(1.0, wilson_interval(64, 64))


def test_a_win_is_the_image_nearer_to_the_good_end(tmp_path):
    make_result(tmp_path, "lcd-s0", rows={"wavelet_noise": np.abs(BASE) + 1})
    make_result(tmp_path, "lrm-s0", rows={"wavelet_noise": np.abs(BASE) + np.where(np.arange(64) < 48, 0.5, 1.5)})
    (found,) = compare(load_result_sets(tmp_path), "lcd")
    assert found.wins == Wins(48 / 64, wilson_interval(48, 64))
    for name in ("lcd-s0", "lrm-s0"):
        make_result(tmp_path / "own", name, rows={"wavelet_noise": BASE}, extra={"wavelet_noise": {"real_error": 0.1}})
    (unpaired,) = compare(load_result_sets(tmp_path / "own"), "lcd")
    assert unpaired.wins is None, "real images of no prompt say nothing of one image"


def test_few_seeds_have_an_interval_and_no_p(tmp_path, cli):
    for seed in range(3):
        make_result(tmp_path, f"lcd-s{seed}", values={"oracle_mean": 1.0 * seed})
        value = None if seed == 2 else seed + GAIN[seed]
        make_result(tmp_path, f"lrm-s{seed}", values={"oracle_mean": value})
    (found,) = compare(load_result_sets(tmp_path), "lcd", primary=("lrm", "oracle_mean"))
    assert found.p is None and found.delta.num_pairs == 2, "a missing value is missing"
    done = cli("compare", tmp_path, "--primary", "lrm:oracle_mean")
    assert done.returncode == 0 and "2 seeds" in done.stdout and "primary" in done.stdout


def test_what_only_the_model_has_keeps_its_row(tmp_path, cli):
    make_result(tmp_path, "lcd-s0", rows={"oracle_mean": BASE}, values={"fd_efflite0": None})
    make_result(tmp_path, "lrm-s0", rows={"oracle_mean": BASE}, values={"fd_efflite0": 0.5, "hfer_db": 0.5})
    rows = {line.split("\t")[2]: line.split("\t")[4:] for line in cli("compare", tmp_path).stdout.splitlines()}
    assert rows["fd_efflite0"][:2] == rows["hfer_db"][:2] == ["—", "—"], "missing is missing, never 0"
    assert rows["oracle_mean"] == ["+0.0", "[+0.0, +0.0]", "", "64 images", "50% [38%, 62%]", "—", "—", ""]


def test_the_teacher_compares_at_its_own_sampler_settings(tmp_path):
    left = {"hfer_db": {"jackknife": (0.01 * BASE[:20]).tolist()}}
    make_result(tmp_path, "teacher", values={"hfer_db": -1.0}, extra=left, sampling={"steps": 50})
    make_result(tmp_path, "lcd-s0", values={"hfer_db": 0.5}, extra=left)
    make_result(tmp_path, "lrm-s0", values={"hfer_db": 2.0}, extra=left, sampling={"steps": 8})
    sets = load_result_sets(tmp_path)
    found = {each.model.name: each.delta for each in compare(sets, "teacher")}
    assert found["lcd"].value == 1.5 and found["lcd"].basis == "jackknife"
    with pytest.raises(UsageError, match="lcd: sampled with LCM, 4 steps, g 5, not LCM, 8 steps"):
        compare(sets, "lcd", ["lrm"])


@pytest.mark.parametrize(
    ("base", "primary", "message"),
    [
        ("lcf", None, "no model 'lcf' in the results; did you mean 'lcd'"),
        ("lcd", ("lrm", "oracle_men"), "did you mean 'lrm:oracle_mean'"),
        ("lcd", ("rg_lcd", ""), "--primary wants MODEL:METRIC"),
    ],
)
def test_wrong_names_are_explained(sets, base, primary, message):
    with pytest.raises(UsageError, match=message):
        compare(sets, base, primary=primary)


# Spectra


def spectrum(name: str, shift: np.ndarray | float, left: np.ndarray | None = None, **given):
    """A result with a spectrum of ``shift`` dB above 1/f²; chroma is a tenth of it."""
    power = RADIUS**-2.0 * 10 ** (np.broadcast_to(shift, RINGS) / 10)
    extra = {"radius": RADIUS.tolist(), "power": power.tolist(), "chroma_power": (power / 10).tolist()}
    if left is not None:
        extra["power_left_out"] = (power * 10 ** (left / 10)).tolist()
    return make_result(None, name, values={"hfer_db": 1.0}, half=0.5, extra={"hfer_db": extra}, **given)


def distance(*made, plane: str = "luma"):
    found = result_set(list(made))
    model, base = (next(m for m in found.models if each.head.model in m.names) for each in made[:2])
    return spectral_distance(model, base, found.column("hfer_db"), plane)


def test_the_distance_is_that_of_the_kept_spectra():
    shift = np.where(np.arange(RINGS) < 12, 0.0, 3.0)
    model, base = spectrum("rg_lcd-s0", shift), spectrum("teacher", 0.0)
    found = distance(model, base)
    assert found.value == pytest.approx(np.sqrt(4 / 16 * 9)) and (found.low, found.basis) == (None, "none")
    assert distance(model, base, plane="chroma").value == pytest.approx(found.value)
    bare = make_result(None, "teacher", values={"hfer_db": 1.0})
    assert distance(model, bare) is None, "an older result without a spectrum"


def test_the_interval_leaves_out_the_same_prompts_on_both_sides():
    left = np.random.default_rng(0).normal(0, 1, (20, RINGS))
    model = spectrum("rg_lcd-s0", 2.0, left)
    found = distance(model, spectrum("teacher", 0.0, left))
    assert found.basis == "jackknife"
    assert (found.low, found.high) == pytest.approx((2, 2)), "what the prompts do to both spectra cancels"
    apart = distance(model, spectrum("teacher", 0.0, left[::-1]))
    assert apart.high - apart.low > 1
    assert distance(model, spectrum("teacher", 0.0, left[:10])).basis == "none"


def images_of(seed: int, noise: float) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    smooth = torch.rand((24, 3, 8, 8), generator=rng)
    images = torch.nn.functional.interpolate(smooth, (32, 32), mode="bilinear")
    return (images + (0.02 + noise) * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def test_the_spectrum_probe_keeps_what_the_distance_needs(tmp_path):
    """Levels too, without any real image: where the teacher is the reference."""
    context = make_context(PromptSet("mine", tuple(Prompt(f"p/{i}", "x") for i in range(24))), tmp_path, resolution=32)
    sets = {"teacher": images_of(0, 0.0), "lcd-s0": images_of(1, 0.0), "lrm-s0": images_of(2, 0.05)}
    stored = {}
    for name, images in sets.items():
        found = measure(SpectrumProbe, context, images)["hfer_db"]
        values, extra = {"hfer_db": found.value}, {"hfer_db": dict(found.extra)}
        stored[name] = make_result(None, name, values=values, extra=extra, reference=None)
    clean, hacked = (distance(stored[name], stored["teacher"]) for name in ("lcd-s0", "lrm-s0"))
    profiles = [
        radial_profile(power_spectrum(luma_chroma(sets[name])[:, 0]).mean(0).numpy())[1]
        for name in ("lrm-s0", "teacher")
    ]
    assert hacked.value == pytest.approx(log_spectral_distance(*profiles), rel=1e-9)
    assert 0 <= clean.low < clean.value < clean.high < hacked.low < hacked.value < hacked.high
    assert len(found.extra["chroma_power_left_out"]) == 20


def test_over_seeds_it_is_the_mean_and_a_comparison_shows_it():
    made = [spectrum(f"lrm-s{i}", 2.0 + 0.2 * i) for i in range(3)] + [spectrum(f"lcd-s{i}", 0.0) for i in range(3)]
    found = {each.column.metric: each for each in compare([result_set(made)], "lcd")}
    assert set(found) == {"hfer_db", "lsd_luma_to_base_db", "lsd_chroma_to_base_db"}
    luma = found["lsd_luma_to_base_db"].delta
    assert luma.value == pytest.approx(2.2) and (luma.basis, luma.num_pairs, luma.better) == ("seeds", 3, None)


def test_wins_of_several_seeds_are_their_mean(sets):
    (found,) = sets
    (lrm,), (lcd,) = found.find("lrm"), found.find("lcd")
    wins = win_rate(lcd, lrm, found.column("oracle_mean"))
    assert wins.rate == 0 and wins.interval.method == "t over 6 training seeds"
