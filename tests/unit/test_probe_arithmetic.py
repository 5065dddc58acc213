"""Constants, ends, divisors and axes of the probes' arithmetic, each held by a case that another one would fail."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.benchtop.scenes import Scenes, render
from rgbench.data.prompts import benchtop_prompts
from rgbench.judge.trajectory import equivalent_n, expected_maxima, pareto_front
from rgbench.metrics.probes import fragility, pixels
from rgbench.metrics.probes import spectrum as grid
from rgbench.metrics.probes.spectrum import (
    GroupedPower,
    half_plane,
    luma_chroma,
    power_spectrum,
    slope,
    spectral_statistics,
)
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.rewards import shared_reward
from rgbench.metrics.statistics import cluster_groups
from tests.probing import measure
from tests.tiny_models import make_context


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A context of 24 prompts, and other scenes of theirs."""
    context = make_context(benchtop_prompts(24), tmp_path_factory.mktemp("cache"))
    shown = Scenes.from_dicts([prompt.scene for prompt in context.prompts.prompts])
    return context, from_uint8((render(shown, "all", range(24)) * 255).round())


# Best of n


def test_the_interval_of_best_of_n_resamples_prompts_on_both_sides():
    base, trained = draw(12, 8), draw(12, seed=1) + 0.8
    rng, reached = np.random.default_rng(0), []
    for _ in range(2000):
        at = rng.integers(0, 12, 12)
        means = expected_maxima(base[at]).mean(0)
        reached.append(next((n + 1 for n in range(8) if means[n] >= trained[at].mean()), 9))
    low, high = np.sort(reached)[[round(0.025 * 1999), round(0.975 * 1999)]]
    found = equivalent_n(base, trained)
    assert (found.low, found.high) == (low, None if high > 8 else high) and low > 1


def test_a_reward_that_is_just_reached_is_reached():
    base = np.full((5, 8), 0.7)
    assert equivalent_n(base, np.full(5, 0.7)).n == 1, "the base itself is its best of one, whatever weights sum to"
    ascending = np.tile(np.arange(8.0), (5, 1))
    top = equivalent_n(ascending, np.full(5, 7.0))
    assert (top.n, top.low, top.high) == (8, 8, 8), "the best of all N is not above N"
    assert equivalent_n(ascending, np.full(5, 7.01)).n is None


def test_a_point_that_is_beaten_on_one_side_alone_is_off_the_front():
    assert pareto_front([2, 1, 2], [1, 1, 2]) == [True, False, False]


# Pixels


def test_the_longest_side_is_brought_to_the_rewards_size():
    assert fragility.resize(torch.zeros(2, 64, 32), 28, antialias=True).shape == (2, 28, 14)
    assert fragility.resize(torch.zeros(2, 32, 64), 28, antialias=True).shape == (2, 14, 28)


def test_what_folds_down_is_the_deviation_over_the_pixels():
    luma = torch.from_numpy(draw(3, 16, 16)).float()
    parts = [fragility.resize(luma, 4, aa).numpy() for aa in (False, True)]
    expected = (parts[0] - parts[1]).reshape(3, -1).std(1)
    np.testing.assert_allclose(fragility.aliased_noise(luma, 4).numpy(), expected, rtol=1e-5)


def test_the_percentile_is_of_nearest_rank_and_black_is_clipped_too():
    assert pixels.upper_percentile(torch.arange(1.0, 11)[None]).item() == 10, "19 of 20 lie at or below it"
    dark = torch.full((1, 3, 4, 4), 0.5)
    dark[:, 2, 0] = 0
    assert pixels.clipped_share(dark).item() == 0.25


def test_changes_are_of_the_strength_they_say():
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 32))).float()
    file = io.BytesIO()
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=75)
    np.testing.assert_array_equal((fragility.jpeg(images, []) * 255).round()[0].permute(1, 2, 0), Image.open(file))
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    spread = fragility.blur(point, [])[0, 0].sum(0) @ (torch.arange(33.0) - 16).square()
    assert spread.sqrt().item() == pytest.approx(1.0, abs=0.01)
    wave = 0.5 + 0.4 * torch.cos(2 * torch.pi * 0.18 * torch.arange(64.0)).expand(1, 3, 64, 64)
    for shown in (wave, wave.mT):  # below the Nyquist limit of half the size, above that of a quarter
        assert 0.5 < fragility.half_size(shown, [])[..., 8:-8, 8:-8].std() / shown.std() < 0.95


def test_fragility_leaves_out_each_group_of_prompts(scenes):
    context, again = scenes
    (found,) = measure(fragility.Fragility, context, again).values()
    reward, prompts = shared_reward(context, True).reward, context.prompts.prompts
    texts = [prompt.text for prompt in prompts]
    rows = []
    for images in (again, from_uint8(context.reference.images)):
        before = reward(images, texts)
        rows.append(100 * torch.stack([before - reward(f(images, prompts), texts) for f in fragility.CHANGES.values()]))
    drops, groups = (rows[0] - rows[1]).mean(0).numpy(), cluster_groups(np.arange(len(prompts)))
    expected = [drops[groups != g].mean() for g in range(20)]
    np.testing.assert_allclose(found.extra["jackknife"], expected, atol=2e-4)
    assert np.std(expected) > 2e-3


# Spectra


def test_a_ring_is_read_by_its_median_without_the_lattice():
    power = np.ones((64, 33))
    power[half_plane(64).bins == 7] = 2.0  # the ring of k = 8
    power[0, 8], power[5, 6] = 10.0, 1e6  # a lattice cell of it, and an outlier that is none
    rows, columns, ratios = grid.peak_ratios(power, 8)
    found = dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), ratios, strict=True))
    assert found[0, 8] == 5 and found[8, 0] == 1 and found[0, 16] == 1
    assert not len(grid.peak_ratios(np.ones((8, 5)), 8)[2]), "a ring of lattice cells alone says nothing"


def test_lattice_cells_count_as_often_as_the_plane_has_them():
    power = np.ones((16, 9))
    power[4, 0] = power[12, 0] = 3.0  # period 4: column 0 is stored whole, the cells of inner columns stand for two
    weights = half_plane(16).weight
    rows, columns = np.nonzero(grid.lattice(16, 4))
    inner = np.array([3.0 if c == 0 and r in (4, 12) else 1.0 for r, c in zip(rows, columns, strict=True)])
    expected = 10 * np.log10(np.average(inner, weights=weights[rows, columns]))
    assert grid.grid_peak_db(power, 4) == pytest.approx(expected) and expected != pytest.approx(
        10 * np.log10(inner.mean())
    )


def test_the_slope_reads_its_band_alone():
    radius = np.arange(1, 33) / 64
    profile = radius**-2.0
    profile[(radius > 0.35) | (radius < 0.02)] *= 100
    assert slope(radius, profile) == pytest.approx(-2, abs=1e-12)


def test_chroma_is_the_mean_of_both_planes_and_unseen_begins_at_the_rewards_limit():
    power = np.ones((3, 64, 33))
    power[2] *= 3
    high = half_plane(64).radius > 0.25
    energy = (half_plane(64).weight * high).sum()
    assert spectral_statistics(power, 0.22)["chroma_band_db"] == pytest.approx(10 * np.log10(2 * energy))
    between = (half_plane(64).axis > 0.22) & ~high
    more = power.copy()
    more[0][between] = 50.0
    before, after = spectral_statistics(power, 0.22), spectral_statistics(more, 0.22)
    assert after["band_db"] == before["band_db"] and after["unseen_db"] > before["unseen_db"] + 1


def test_mean_power_is_over_the_images_and_over_those_that_are_left():
    images = torch.from_numpy(np.random.default_rng(3).random((5, 3, 8, 8)))
    sums = GroupedPower.empty(np.array([0, 0, 1, 1, 1]), 1, 8, torch.device("cpu"))
    sums.add(images, np.arange(5))
    each = power_spectrum(luma_chroma(images)[:, :1]).numpy()
    np.testing.assert_allclose(sums.mean(), each.mean(0), rtol=1e-12)
    left = list(sums.without_each())
    np.testing.assert_allclose(left, [each[2:].mean(0), each[:2].mean(0)], rtol=1e-12)
