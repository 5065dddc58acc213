"""Spectrum: golden values, an independent NumPy transcription, odd sizes and Nyquist."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics.probes.fragility import resize
from rgbench.metrics.probes.spectrum import (
    NYQUIST,
    SpectrumProbe,
    band_energy,
    half_plane,
    high_frequency_ratio,
    log_spectral_distance,
    luma_chroma,
    octave_gaps,
    power_spectrum,
    radial_profile,
    slope,
    spectral_statistics,
    unseen_energy,
)
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.values import Direction, metric_info
from tests.tiny_models import make_context


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean_power(planes: torch.Tensor, window: bool) -> np.ndarray:
    return power_spectrum(planes, window).mean(0).numpy()


def coloured_noise(num: int, size: int, exponent: float) -> torch.Tensor:
    """Periodic noise whose power falls as f^exponent."""
    radius = torch.from_numpy(np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]))
    radius[0, 0] = math.inf
    return torch.fft.ifft2(torch.fft.fft2(noise((num, size, size))) * radius ** (exponent / 2)).real


def test_white_noise_ratio():
    power = mean_power(noise((8, 256, 256)), window=False)
    assert high_frequency_ratio(power) == pytest.approx(0.804, abs=0.01)
    assert high_frequency_ratio(power) == pytest.approx(1 - math.pi / 16, abs=0.003)


def test_checkerboard_is_all_at_nyquist():
    y, x = np.indices((256, 256))
    board = torch.from_numpy(((x + y) % 2).astype(np.float64))[None]
    power = mean_power(board, window=False)
    assert power[128, 128] / power.sum() == pytest.approx(1, abs=1e-12)
    assert high_frequency_ratio(power) == pytest.approx(1, abs=1e-12)
    assert power.sum() == pytest.approx(0.25, rel=1e-12), "the Nyquist cell counts once: its power is the variance"


def test_columns_at_nyquist_count_once():
    columns = torch.from_numpy((np.indices((64, 64))[1] % 2).astype(np.float64))[None]
    assert band_energy(mean_power(columns, window=False), 0.25) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("size", "num"), [(64, 256), (256, 24)])
def test_slope_of_inverse_square_power(size, num):
    power = mean_power(coloured_noise(num, size, -2.0), window=True)
    assert slope(*radial_profile(power)) == pytest.approx(-2.0, abs=0.03)


def numpy_reference(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Radial profile and HFER by the full transform, written out in NumPy alone."""
    height, width = plane.shape
    hann = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in (height, width)))
    power = np.abs(np.fft.fft2((plane - plane.mean()) * hann)) ** 2 / (height * width * (hann**2).sum())
    radius = np.sqrt(np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width)[None] ** 2)
    index = np.rint(radius * min(height, width))
    bins = range(1, min(height, width) // 2 + 1)
    profile = np.array([power[index == k].mean() for k in bins])
    radii = np.array(bins) / min(height, width)
    return radii, profile, power[radius > 0.25].sum() / power[radius > 0].sum()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (63, 65), (65, 64), (64, 63), (48, 80), (31, 17)])
def test_equals_numpy_over_even_and_odd_sizes(height, width):
    plane = noise((height, width), seed=height * width) + 3
    power = power_spectrum(plane).numpy()
    radii, profile, ratio = numpy_reference(plane.numpy())
    ours = radial_profile(power, width)
    np.testing.assert_allclose(ours[0], radii, rtol=1e-10)
    np.testing.assert_allclose(ours[1], profile, rtol=1e-10)
    assert high_frequency_ratio(power, width=width) == pytest.approx(ratio, rel=1e-10)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 40), (40, 33), (7, 7)])
def test_total_power_is_the_variance(height, width):
    planes = noise((4, height, width))
    power = mean_power(planes, window=False)
    variance = planes.var((-2, -1), unbiased=False).mean()
    assert band_energy(power, 0, width=width) == pytest.approx(float(variance), rel=1e-10)
    assert half_plane(height, width).weight.sum() == height * width


def test_power_is_averaged_before_the_logarithm():
    faint, strong = noise((1, 32, 32)), 10 * noise((1, 32, 32), seed=1)
    both = mean_power(torch.cat([faint, strong]), window=True)
    np.testing.assert_allclose(both, (mean_power(faint, True) + mean_power(strong, True)) / 2, rtol=1e-12)


def test_luma_and_chroma():
    grey = torch.rand(2, 1, 5, 5).expand(2, 3, 5, 5)
    planes = luma_chroma(grey)
    assert planes.dtype == torch.float64
    torch.testing.assert_close(planes[:, 0], grey[:, 0].double())
    assert planes[:, 1:].abs().max() < 1e-7
    blue, red = torch.tensor([[0.0, 0, 1], [1, 0, 0]]).reshape(2, 3, 1, 1)
    assert luma_chroma(blue[None])[0, :, 0, 0].tolist() == pytest.approx([0.114, 0.5, -0.114 / 1.402])
    assert luma_chroma(red[None])[0, 2, 0, 0].item() == pytest.approx(0.5)


def planes(power: np.ndarray) -> np.ndarray:
    """The same power as luma, Cb and Cr."""
    return np.stack([power] * 3)


def gaps(power: np.ndarray, real: np.ndarray, limit: float = 0.22) -> dict[str, float]:
    ours, theirs = spectral_statistics(power, limit), spectral_statistics(real, limit)
    return {name: ours[name] - theirs[name] for name in ours}


def test_planted_gain_reads_as_its_decibels():
    reference = mean_power(coloured_noise(4, 64, -2.0), window=True)
    twice = gaps(planes(2 * reference), planes(reference))
    for name in ("hfer_db", "chroma_hfer_db", "slope"):
        assert twice[name] == pytest.approx(0, abs=1e-10), "HFER hides a gain in all bands"
    energies = [name for name in twice if "band" in name or "octave" in name or "unseen" in name]
    assert len(energies) == 13
    for name in energies:
        assert twice[name] == pytest.approx(3.0103, abs=1e-4), "the absolute energy does not"
    profiles = [radial_profile(power)[1] for power in (2 * reference, reference)]
    assert log_spectral_distance(*profiles) == pytest.approx(3.0103, abs=1e-4)
    assert list(octave_gaps(2 * reference, reference).values()) == pytest.approx([3.0103] * 5, abs=1e-4)


def test_noise_and_blur_are_told_apart():
    clean = coloured_noise(8, 64, -2.0)
    clean = clean / clean.std()
    reference = mean_power(clean, True)
    noisy = mean_power(clean + 0.5 * noise((8, 64, 64), seed=1), True)
    blurred = mean_power(torch.nn.functional.avg_pool2d(clean[:, None], 3, 1, 1)[:, 0], True)
    assert gaps(planes(noisy), planes(reference))["hfer_db"] > 1
    assert gaps(planes(blurred), planes(reference))["hfer_db"] < -3
    octaves = list(octave_gaps(noisy, reference).values())
    assert octaves[-1] > 1 > octaves[0]


def wave(fx: float, fy: float, size: int = 64) -> torch.Tensor:
    y, x = np.indices((size, size))
    return torch.from_numpy(np.cos(2 * np.pi * (fx * x + fy * y)))[None]


@pytest.mark.parametrize(
    ("fx", "fy", "seen"), [(0.18, 0.18, True), (0.2, 0.0, True), (0.3, 0.0, False), (0.05, 0.3, False)]
)
def test_what_the_reward_cannot_see_lies_outside_of_a_square(fx, fy, seen):
    """Its resize filters each axis by itself: a diagonal wave of radius .25 passes a limit of .22."""
    power = mean_power(wave(fx, fy), window=True)
    assert (unseen_energy(power, 28 / 64 / 2) / power.sum() < 0.1) == seen
    through = resize(wave(fx, fy).float(), 28, antialias=True)[..., 4:-4, 4:-4]
    assert (through.std() > 0.2) == seen


def test_the_edges_of_the_square_belong_to_it():
    power = np.ones((64, 33))
    whole, plane = band_energy(power, -1), half_plane(64)
    inside = plane.weight[(plane.axis <= 14 / 64)].sum()
    assert inside == 29**2 and unseen_energy(power, 28 / 64 / 2) == whole - inside
    assert unseen_energy(power, NYQUIST) == 0 and "unseen_db" not in spectral_statistics(planes(power), NYQUIST)


def test_a_reward_that_sees_all_leaves_nothing_unseen(tmp_path):
    context = make_context(benchtop_prompts(4), tmp_path, resolution=28)
    assert "unseen_db" not in dict(SpectrumProbe(context).planned)
    found = probe(context, torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)), np.arange(4))
    assert "unseen_db" not in found and "unseen_db" not in found["hfer_db"].extra


def test_chroma_and_luma_do_not_mix():
    reference = planes(mean_power(coloured_noise(4, 64, -2.0), window=True))
    coloured = reference * np.array([1, 4, 4]).reshape(3, 1, 1)
    found = gaps(coloured, reference)
    assert found["band_db"] == pytest.approx(0, abs=1e-10)
    assert found["chroma_band_db"] == pytest.approx(6.0206, abs=1e-4)


def test_images_without_contrast_have_no_value():
    flat = mean_power(torch.full((2, 16, 16), 0.5, dtype=torch.float64), True)
    reference = mean_power(noise((2, 16, 16)), True)
    found = gaps(planes(flat), planes(reference))
    assert math.isnan(found["hfer_db"]) and math.isnan(found["slope"])
    assert math.isnan(log_spectral_distance(*(radial_profile(p)[1] for p in (flat, reference))))


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return make_context(benchtop_prompts(30), tmp_path_factory.mktemp("cache"))


def probe(context, images: torch.Tensor, order: np.ndarray) -> dict:
    metric = SpectrumProbe(context)
    for at in np.array_split(order, 4):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    return {measured.metric: measured for measured in metric.compute()}


def test_probe_reads_nothing_on_the_reference_itself(context):
    found = probe(context, from_uint8(context.reference.images), np.arange(30))
    assert list(found) == [info.name for info in SpectrumProbe.infos]
    for name, measured in found.items():
        assert measured.value == pytest.approx(0, abs=1e-9)
        assert measured.reference == (None if name == "log_spectral_distance_db" else "real")
        assert measured.num_images == 30
    for name in ("hfer_db", "band_db", "slope"):
        assert metric_info(name).direction is Direction.REFERENCE
        assert found[name].interval.low <= 0 <= found[name].interval.high


def test_probe_finds_planted_noise_in_any_order(context):
    clean = from_uint8(context.reference.images)
    noisy = (clean + 0.05 * noise(clean.shape, seed=2).float()).clamp(0, 1)
    found = probe(context, noisy, np.arange(30))
    again = probe(context, noisy, np.random.default_rng(0).permutation(30))
    for name, measured in found.items():
        assert again[name].value == pytest.approx(measured.value, rel=1e-9)
        assert again[name].interval.high == pytest.approx(measured.interval.high, rel=1e-9)
    assert found["hfer_db"].interval.low > 1
    extra = found["hfer_db"].extra
    assert len(extra["radius"]) == len(extra["power"]) == len(extra["reference_power"]) == 32
    for kind in ("octave_gaps_db", "chroma_octave_gaps_db"):
        assert extra[kind]["0.25-0.5"] > 1.5
        assert abs(extra[kind]["0.015625-0.03125"]) < 0.2
    assert extra["slope"] > extra["reference_slope"]
    assert extra["intervals"]["octave_0.25-0.5"][0] > 1.5
    assert found["unseen_db"].value == pytest.approx(found["band_db"].value, abs=1)
    assert found["unseen_db"].protocol.fields["reward_nyquist"] == 28 / 64 / 2
    for name in set(found) - {"hfer_db"}:
        assert set(found[name].extra) == {"jackknife"}, "vectors are given once"
    others = {measured.protocol.fields.get("unseen") for name, measured in found.items() if name != "unseen_db"}
    assert others == {None} and found["unseen_db"].protocol.fields["unseen"] == "above the limit on either axis"


def test_probe_s_jackknife_leaves_out_groups_of_prompts_on_both_sides(context):
    images = from_uint8(context.reference.images).pow(1.2)
    measured = probe(context, images, np.arange(30))["band_db"]
    groups = SpectrumProbe(context).groups
    real = from_uint8(context.reference.images)
    powers = [power_spectrum(luma_chroma(x)).numpy() for x in (images, real)]
    left = [gaps(*(p[groups != g].mean(0) for p in powers))["band_db"] for g in range(20)]
    assert measured.extra["jackknife"] == pytest.approx(left, rel=1e-9)
    half = 2.0930240544 * np.sqrt(19 / 20 * ((left - np.mean(left)) ** 2).sum())
    assert measured.interval.high - measured.value == pytest.approx(half, rel=1e-8)


def test_probe_gives_no_value_for_images_without_contrast(context):
    found = probe(context, torch.full((30, 3, 64, 64), 0.5), np.arange(30))
    for name in ("hfer_db", "slope", "log_spectral_distance_db"):
        assert found[name].value is None and found[name].interval is None
        assert found[name].flags == ("images without contrast",)
    assert found["hfer_db"].extra["slope"] is None


def test_without_real_images_of_the_size_values_are_absolute(tmp_path, context):
    """A real image is never resized: at another size, values are set beside the teacher's and the LCD student's."""
    larger = make_context(context.prompts, tmp_path, resolution=128)
    images = coloured_noise(30, 128, -2.0)[:, None].expand(-1, 3, -1, -1)
    found = probe(larger, (0.5 + 0.1 * images / images.std()).float().clamp(0, 1), np.arange(30))
    assert list(found) == [info.name for info in SpectrumProbe.infos if info.name != "log_spectral_distance_db"]
    assert {measured.reference for measured in found.values()} == {None}
    assert found["slope"].value == pytest.approx(-2.0, abs=0.05)
    assert found["slope"].protocol.fields["reference"] is None
    assert found["hfer_db"].value < -5 and len(found["hfer_db"].extra["power"]) == 64


def test_rings_carry_their_centre(context):
    radius, _ = radial_profile(half_plane(65).weight)
    assert radius.tolist() == (np.arange(1, 33) / 65).tolist()
