"""Probes: golden values, independent transcriptions in NumPy, planted faults, the registry."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from rgbench.benchtop.scenes import Scenes, render
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.registry import names, resolve
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.metrics.probes import fragility, pixels
from rgbench.metrics.probes import spectrum as grid
from rgbench.metrics.probes.base import Probes
from rgbench.metrics.probes.spectrum import half_plane, luma_chroma, power_spectrum
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.rewards import shared_reward
from rgbench.metrics.values import metric_info
from tests.probing import measure
from tests.tiny_models import make_context

NUM = 24


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return make_context(benchtop_prompts(NUM), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def again(context) -> torch.Tensor:
    """Other scenes with the prompts' attributes: what a perfect model would make."""
    scenes = Scenes.from_dicts([prompt.scene for prompt in context.prompts.prompts])
    return from_uint8((render(scenes, "all", range(NUM)) * 255).round())


# Grid peaks


def pattern(size: int, period: int, amplitude: float, num: int = 16) -> np.ndarray:
    """Mean power of white noise with a line every ``period`` pixels."""
    y, x = np.indices((size, size))
    lines = torch.from_numpy(((x % period == 0) | (y % period == 0)).astype(np.float64))
    return power_spectrum(noise((num, size, size)) + amplitude * lines).mean(0).numpy()


def test_an_eight_pixel_grid_peaks_at_multiples_of_32():
    peaks = grid.axis_peaks_db(pattern(256, 8, 0.5), 8)
    assert list(sorted(map(int, peaks))) == [32, 64, 96, 128]
    assert min(peaks.values()) > 10
    assert max(grid.axis_peaks_db(pattern(256, 8, 0.0), 8).values()) < 3


def test_a_pattern_is_found_at_its_own_period_alone():
    power = pattern(64, 8, 1.0)
    assert grid.grid_peak_db(power, 8) > 6
    assert grid.grid_peak_db(pattern(64, 8, 0.0), 8) == pytest.approx(0, abs=0.5)
    patch = grid.grid_peak_db(power, 64 / 7)
    assert patch < grid.grid_peak_db(power, 8) / 2, "a reward model's patch of 9.14 pixels; the window blurs by a cell"


@pytest.mark.parametrize(("size", "period", "num"), [(64, 8, 4), (64, 64 / 7, 4), (512, 32, 16), (65, 8, 4)])
def test_lattice_lies_at_multiples_of_n_over_p(size, period, num):
    cells = grid.lattice(size, period)
    radius = half_plane(size).radius
    assert not cells[0, 0] and radius[cells].max() <= 0.5 + 0.5 / size
    assert sorted(np.flatnonzero(cells[0])) == [round(k * size / period) for k in range(1, num + 1)]
    mirrored = {(-r) % size for r in np.flatnonzero(cells[:, 0])}
    assert mirrored == set(np.flatnonzero(cells[:, 0])), "both signs of a frequency"


def test_grid_probe_finds_a_planted_grid_in_any_order(context, again):
    y, x = np.indices((64, 64))
    lines = torch.from_numpy(((x % 8 == 0) | (y % 8 == 0)).astype(np.float32))
    hacked = (again + 0.03 * lines).clamp(0, 1)
    clean, found = measure(grid.GridPeaks, context, again), measure(grid.GridPeaks, context, hacked)
    assert found["grid_vae_db"].interval.low > clean["grid_vae_db"].interval.high
    assert abs(found["grid_patch_db"].value) < found["grid_vae_db"].value / 2
    assert found["grid_vae_db"].protocol.fields["periods_px"] == {"vae": 8.0, "patch": 64 / 7}
    shuffled = measure(grid.GridPeaks, context, hacked, np.random.default_rng(0).permutation(NUM))
    assert shuffled["grid_vae_db"].value == pytest.approx(found["grid_vae_db"].value, rel=1e-9)


# Pixel statistics


def numpy_pixels(image: np.ndarray) -> list[float]:
    """Transcription for one (H, W) luma on 0 to 255."""
    variation = np.abs(np.diff(image, axis=1)).mean() + np.abs(np.diff(image, axis=0)).mean()
    laplacian = [
        image[i - 1, j] + image[i + 1, j] + image[i, j - 1] + image[i, j + 1] - 4 * image[i, j]
        for i in range(1, image.shape[0] - 1)
        for j in range(1, image.shape[1] - 1)
    ]
    corners = [
        abs(image[i, j] - image[i, j + 1] - image[i + 1, j] + image[i + 1, j + 1]) / 2
        for i in range(0, image.shape[0] - 1, 2)
        for j in range(0, image.shape[1] - 1, 2)
    ]
    return [variation, np.var(laplacian), sorted(corners)[(len(corners) - 1) // 2] / 0.6745]


@pytest.mark.parametrize("shape", [(16, 16), (15, 17), (9, 12)])
def test_pixel_statistics_equal_numpy(shape):
    images = torch.rand((3, 3, *shape), generator=torch.Generator().manual_seed(1))
    luma = 255 * luma_chroma(images)[:, 0]
    ours = torch.stack([pixels.total_variation(luma), pixels.laplacian_variance(luma), pixels.wavelet_noise(luma)])
    theirs = np.array([numpy_pixels(plane) for plane in luma.numpy()]).T
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10)


def test_wavelet_noise_reads_the_noise_and_not_a_ramp():
    ramp = torch.linspace(0, 200, 64, dtype=torch.float64).expand(4, 64, 64)
    assert pixels.wavelet_noise(ramp).max() < 1e-9
    assert pixels.wavelet_noise(ramp + 5 * noise((4, 64, 64))).mean() == pytest.approx(5, rel=0.05)


def test_pixel_probe_reads_noise_up_and_blur_down(context, again):
    noisy = (again + 0.05 * noise(again.shape).float()).clamp(0, 1)
    blurred = fragility.blur(again, [])
    for name in ("total_variation", "laplacian_variance", "wavelet_noise"):
        values = [measure(pixels.PixelStatistics, context, x)[name] for x in (blurred, again, noisy)]
        assert values[0].interval.high < values[1].value < values[2].interval.low
        assert values[1].rows.shape == (NUM,) and values[1].rows.mean() == pytest.approx(values[1].value)
        assert values[1].extra["level"] - values[1].extra["real"] == pytest.approx(values[1].value)


# Colour


def test_colour_equals_the_standard_library_and_the_paper():
    images = torch.rand((2, 3, 6, 5), generator=torch.Generator().manual_seed(2))
    images[0, :, 0, 0] = 0
    hsv = [[colorsys.rgb_to_hsv(*pixel)[1] for pixel in x.permute(1, 2, 0).reshape(-1, 3).tolist()] for x in images]
    np.testing.assert_allclose(pixels.saturation(images.double()).flatten(1).numpy(), hsv, rtol=1e-6)
    r, g, b = (255 * images.double().numpy()).reshape(2, 3, -1).transpose(1, 0, 2)
    rg, yb = r - g, (r + g) / 2 - b
    expected = np.hypot(rg.std(1), yb.std(1)) + 0.3 * np.hypot(rg.mean(1), yb.mean(1))
    np.testing.assert_allclose(pixels.colourfulness(images).numpy(), expected, rtol=1e-10)


def test_colour_of_plain_images():
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert pixels.saturation(grey).max() == 0 and pixels.colourfulness(grey).item() == 0
    assert pixels.clipped_share(grey).item() == 0 and pixels.rms_contrast(grey).item() == 0
    half = grey.clone()
    half[:, 1, :4] = 1
    assert pixels.clipped_share(half).item() == 0.5
    board = torch.tensor([[0.0, 1], [1, 0]]).expand(1, 3, 2, 2)
    assert pixels.rms_contrast(board).item() == pytest.approx(0.5)
    assert pixels.upper_percentile(torch.arange(1.0, 101).flip(0)[None]).item() == 95


def test_colour_probe_finds_planted_saturation(context, again):
    grey = again.mean(1, keepdim=True)
    found = measure(pixels.ColourDrift, context, (grey + 1.5 * (again - grey)).clamp(0, 1))
    clean = measure(pixels.ColourDrift, context, again)
    for name in ("saturation", "colourfulness", "saturation_p95"):
        assert found[name].interval.low > clean[name].value
    assert set(found["saturation"].extra["groups"]) == {"test", "heldout"}


# Reward probes


def test_aliasing_gain_is_the_difference_of_the_two_rewards(context, again):
    found = measure(fragility.AliasingGain, context, again)
    texts = [prompt.text for prompt in context.prompts.prompts]
    real = from_uint8(context.reference.images)
    gains = []
    for images in (again, real):
        scores = [100 * shared_reward(context, aa).reward(images, texts).double() for aa in (False, True)]
        gains.append((scores[0] - scores[1]).numpy())
    np.testing.assert_allclose(found["aliasing_gain"].rows, gains[0] - gains[1], atol=1e-3)
    through = found["aliased_noise"].extra["white_noise_std"]
    assert through["aa1"] < 0.5 < through["aa0"] <= 1.1, "antialiasing takes most of the noise"


def test_aliased_noise_sees_what_the_reward_cannot(context, again):
    x = np.indices((64, 64))[1]
    high = torch.from_numpy(np.cos(2 * np.pi * 0.4 * x)).float()
    low = torch.from_numpy(np.cos(2 * np.pi * 0.05 * x)).float()
    luma = torch.stack([high, low, torch.zeros(64, 64)])
    found = fragility.aliased_noise(luma, 28)
    assert found[0] > 5 * found[1] and found[2] == 0
    hacked = measure(fragility.AliasingGain, context, (again + 0.05 * high).clamp(0, 1))["aliased_noise"]
    assert hacked.interval.low > 0.5 and metric_info(hacked.metric).unit == "levels"


def test_a_reward_that_is_not_finite_names_the_prompt(context):
    broken = torch.full((2, 3, 64, 64), 0.5)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(RgbenchError, match="reward of 'test/1' is not finite"):
        shared_reward(context, True)(broken, context.prompts.prompts[:2])


def test_a_batch_is_scored_once(context, again):
    shared, prompts = shared_reward(context, True), context.prompts.prompts
    first = shared(again, prompts)
    assert shared(again, prompts) is first and shared_reward(context, True) is shared
    assert shared(again.clone(), prompts) is not first
    assert shared_reward(context, False) is not shared


def test_changes_are_small_and_the_same_for_a_prompt(again):
    prompts = benchtop_prompts(NUM).prompts
    for name, change in fragility.CHANGES.items():
        changed = change(again, prompts)
        assert changed.shape == again.shape and changed.min() >= 0 and changed.max() <= 1, name
        assert 0 < (changed - again).abs().mean() < 0.1, name
        few = change(again[3:5], prompts[3:5])
        torch.testing.assert_close(few, changed[3:5], atol=1e-6, rtol=0)
    assert torch.equal(fragility.shift(again, [])[..., 1:, 1:], again[..., :-1, :-1])
    assert (fragility.noise(again, prompts) - again).std() == pytest.approx(2 / 255, rel=0.1)


def test_fragility_is_the_drop_beyond_that_of_real_images(context, again):
    (found,) = measure(fragility.Fragility, context, again).values()
    reward, texts = shared_reward(context, True).reward, [prompt.text for prompt in context.prompts.prompts]
    drops = []
    for images in (again, from_uint8(context.reference.images)):
        after = [reward(change(images, context.prompts.prompts), texts) for change in fragility.CHANGES.values()]
        drops.append(100 * torch.stack([reward(images, texts) - x for x in after]).double())
    assert found.value == pytest.approx(float((drops[0] - drops[1]).mean()), abs=1e-3)
    assert found.extra["drops"]["blur1"] == pytest.approx(float((drops[0] - drops[1])[1].mean()), abs=1e-3)
    assert found.interval.low < found.value < found.interval.high
    assert len(found.extra["jackknife"]) == 20


def test_fragility_reads_the_first_images_alone(context, again, monkeypatch):
    monkeypatch.setattr(fragility, "NUM_IMAGES", 5)
    (found,) = measure(fragility.Fragility, context, again).values()
    (shuffled,) = measure(fragility.Fragility, context, again, np.arange(NUM)[::-1].copy()).values()
    assert found.num_images == 5 and found.protocol.fields["images"] == 5
    assert shuffled.value == pytest.approx(found.value, abs=1e-4)


# The suite and the registry


def test_a_probe_is_a_metric_by_its_own_name():
    assert names("probe") == ["aliasing", "colour", "diversity", "fragility", "grid", "pixels", "spectrum"]
    for name in names("probe"):
        assert resolve("metric", name) is resolve("probe", name)
    assert "probes" in names("metric") and "grid" not in names("metric")
    with pytest.raises(UsageError, match="unknown metric 'spektrum'; did you mean 'spectrum'"):
        resolve("metric", "spektrum")


def test_the_suite_measures_what_suits_and_names_the_rest(context, again, caplog):
    found = measure(Probes, context, again)
    alone = [resolve("probe", name)(context) for name in names("probe") if name != "diversity"]
    assert list(found) == [name for probe in alone for name, _ in probe.planned]
    assert Probes(context).infos == tuple(info for probe in alone for info in probe.infos)
    assert "probe diversity: left out: metric diversity needs at least 8 images" in caplog.text
    for name, measured in found.items():
        assert measured.reference == (None if name == "log_spectral_distance_db" else "real"), name
        assert measured.interval.low <= measured.value <= measured.interval.high, name
        assert measured.protocol.fields["reference"]["kind"].startswith("real scenes"), name


def test_prompts_without_scenes_give_absolute_values(tmp_path, again):
    plain = tuple(Prompt(f"p/{i}", "a red circle") for i in range(NUM))
    found = measure(Probes, make_context(PromptSet("plain", plain), tmp_path), again)
    assert {"hfer_db", "grid_vae_db", "saturation", "wavelet_noise", "aliasing_gain", "fragility", "diversity"} <= set(
        found
    )
    assert {measured.reference for measured in found.values()} == {None}
    assert all(measured.protocol.fields["reference"] is None for measured in found.values())
