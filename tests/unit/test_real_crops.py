"""Probes against a user's own real images: native crops, their history, two independent samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.core.io import inspect_image
from rgbench.core.registry import names, resolve
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.judge.models import load_result_sets
from rgbench.metrics.context import SetComparison
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.kid import KernelDistance
from rgbench.metrics.networks import EffLite0Network
from rgbench.metrics.probes.base import Probes
from rgbench.metrics.probes.pixels import ColourDrift, PixelStatistics
from rgbench.metrics.probes.spectrum import GridPeaks, SpectrumProbe, luma_chroma, power_spectrum
from rgbench.metrics.reference import (
    LOSSY,
    MIN_IMAGES,
    RealCrops,
    ReferenceFolder,
    from_uint8,
    history_of,
    libjpeg_table,
    to_uint8,
)
from rgbench.metrics.statistics import bootstrap_interval
from tests.conftest import ROOT
from tests.probing import measure
from tests.tiny_models import make_context

SIDE, NUM = 32, 48
CPU = torch.device("cpu")


def natural(num: int, height: int, width: int, seed: int) -> torch.Tensor:
    """(num, 3, H, W) uint8 of power 1/f²: what photographs have."""
    noise = torch.randn((num, 3, height, width), generator=torch.Generator().manual_seed(seed))
    radius = torch.from_numpy(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]))
    radius[0, 0] = np.inf
    planes = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, s=(height, width))
    return to_uint8((0.5 + 0.15 * planes / planes.std((-2, -1), keepdim=True)).clamp(0, 1).float())


def save(images: torch.Tensor, folder: Path, suffix: str = ".png", **options) -> Path:
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{i:05d}{suffix}", **options)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real images of two shapes, larger than the generated ones; some that cannot serve."""
    folder = save(natural(NUM, 40, 56, 1), tmp_path_factory.mktemp("shared") / "photos")
    save(natural(NUM, 61, 47, 2), folder / "tall")
    save(natural(3, 31, 90, 3), folder / "low")
    Image.new("RGBA", (64, 64)).save(folder / "layer.png")
    return folder


def context_of(folder: Path, cache: Path, num: int = NUM, side: int = SIDE):
    prompts = PromptSet("mine", tuple(Prompt(f"p/{i}", "a red circle") for i in range(num)))
    features = FeatureSet(ReferenceFolder(folder, cache), EffLite0Network(CPU))
    return make_context(prompts, cache, features=features, resolution=side)


# History


@pytest.mark.parametrize("quality", [1, 30, 49, 50, 75, 90, 96, 100])
def test_a_libjpeg_quality_is_read_back(tmp_path, quality):
    for options, sampling in (({"subsampling": 0}, "4:4:4"), ({"subsampling": 2}, "4:2:0")):
        Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", quality=quality, **options)
        header = inspect_image(tmp_path / "x.jpg")
        assert header.table == libjpeg_table(quality) and header.size == (16, 16)
        expected = f"JPEG: 1 files, libjpeg quality {quality}, chroma {sampling}"
        assert history_of([header]).text == expected and history_of([header]).lossy


def test_histories_of_a_mixture(tmp_path):
    image = Image.new("RGB", (16, 16))
    for quality in (60, 70, 90):
        image.save(tmp_path / f"{quality}.jpg", quality=quality)
    image.save(tmp_path / "camera.jpg", qtables=[[7] * 64, [9] * 64])
    image.convert("L").save(tmp_path / "grey.jpg", quality=80)
    image.save(tmp_path / "x.png")
    image.save(tmp_path / "x.webp")
    found = history_of([inspect_image(path) for path in sorted(tmp_path.iterdir())])
    assert found.text == (
        "JPEG: 5 files, libjpeg quality 60 to 94 (median 80), 1 of them by other tables, quality from their mean, "
        "chroma 4:2:0; PNG: 1 files, lossless, earlier history unknown; WEBP: 1 files, loss unknown"
    )
    assert found.lossy
    plain = history_of([inspect_image(tmp_path / "x.png")])
    assert not plain.lossy and plain.text == "PNG: 1 files, lossless, earlier history unknown"


# Crops


def test_crops_are_central_native_pixels_and_the_rest_is_counted(photos, tmp_path):
    crops = RealCrops(ReferenceFolder(photos, tmp_path), SIDE)
    fields = crops.fields()
    assert len(crops) == fields["num"] == 2 * NUM and not crops.lacking
    assert (fields["num_in_folder"], fields["num_too_small"], fields["num_not_8_bit_rgb"]) == (2 * NUM + 4, 3, 1)
    (first, at), *rest = crops.batches()
    assert list(at) == list(range(len(first))) and sum(len(x) for x, _ in rest) == 2 * NUM - len(first)
    assert torch.equal(to_uint8(first[:NUM]), natural(NUM, 40, 56, 1)[..., 4:36, 12:44])
    assert torch.equal(to_uint8(first[NUM:]), natural(NUM, 61, 47, 2)[: len(first) - NUM, :, 14:46, 7:39])


def test_large_folders_are_thinned_evenly(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("rgbench.metrics.reference.MAX_IMAGES", 50)
    crops = RealCrops(ReferenceFolder(photos, tmp_path), SIDE)
    steps = np.diff(crops.chosen)
    assert len(crops) == crops.fields()["num"] == 50 and steps.min() >= 1
    assert steps.max() <= 2 + 4, "four in a row cannot serve"
    assert (crops.chosen[0], crops.chosen[-1]) == (0, 99)


def test_a_damaged_photo_is_named(photos, tmp_path):
    folder = save(natural(NUM, 40, 40, 1), tmp_path / "real")
    broken = folder / "00007.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    images = from_uint8(natural(NUM, SIDE, SIDE, 9))
    with pytest.raises(UsageError, match=r"00007\.png: not a readable"):
        measure(PixelStatistics, context_of(folder, tmp_path), images)
    broken.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"00007\.png: not a readable"):
        measure(PixelStatistics, context_of(folder, tmp_path / "other"), images)


def test_with_too_few_photos_a_probe_gives_absolute_values_and_says_why(photos, tmp_path, caplog):
    images = from_uint8(natural(NUM, 50, 50, 9))
    found = measure(Probes, context_of(photos, tmp_path, side=50), images)
    assert "hfer_db" in found and {value.reference for value in found.values()} == {None}
    why = f"no gap to real: 0 of 100 images serve, {MIN_IMAGES} needed (99 shorter than 50 px, 1 not plain 8-bit RGB"
    for name in ("hfer_db", "grid_vae_db", "saturation", "wavelet_noise", "aliasing_gain", "fragility"):
        assert found[name].flags[0].startswith(why), name
        assert found[name].protocol.fields["reference"] is None
    assert caplog.text.count("probes give absolute values, no gap to real: 0 of 100") == 1


# Figures


def test_gaps_are_those_of_the_two_mean_spectra(photos, tmp_path):
    images = from_uint8(natural(NUM, SIDE, SIDE, 9))
    context = context_of(photos, tmp_path)
    found = measure(SpectrumProbe, context, images)
    crops = torch.cat([x for x, _ in RealCrops(context.features.reference, SIDE).batches()])
    means = [power_spectrum(luma_chroma(x)).mean(0).numpy() for x in (images, crops)]
    expected = SpectrumProbe(context).values(*means)
    for name, measured in found.items():
        assert measured.value == pytest.approx(expected[name], abs=1e-9), name
        assert measured.interval.low < measured.value < measured.interval.high
        assert "20 + 20 groups, each side by itself" in measured.interval.method
        assert [len(measured.extra[key]) for key in ("jackknife", "jackknife_real")] == [20, 20]
        assert measured.flags == ()
    assert found["hfer_db"].protocol.fields["reference"]["history"].startswith("PNG: 96 files, lossless")
    pixels = measure(PixelStatistics, context, images)["wavelet_noise"]
    probe = PixelStatistics(context)
    ours, theirs = (probe.measure(x, [])[2].double().numpy() for x in (images, crops))
    assert pixels.value == pytest.approx(ours.mean() - theirs.mean(), abs=1e-9)
    assert pixels.extra["real_error"] == pytest.approx(theirs.std(ddof=1) / np.sqrt(len(theirs)))
    np.testing.assert_allclose(pixels.rows, ours - theirs.mean(), atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "name"), [(SpectrumProbe, "hfer_db"), (GridPeaks, "grid_vae_db"), (ColourDrift, "saturation")]
)
def test_the_sides_are_not_taken_for_pairs(tmp_path, kind, name):
    """The same images on both sides, in the same order: as pairs they would differ by nothing at all, surely."""
    images = natural(NUM, SIDE, SIDE, 4)
    context = context_of(save(images, tmp_path / "real"), tmp_path)
    found = measure(kind, context, from_uint8(images))[name]
    assert found.value == pytest.approx(0, abs=1e-9)
    width = found.interval.high - found.interval.low
    if name == "saturation":
        alone = bootstrap_interval(kind(context).measure(from_uint8(images), [])[0].double().numpy())
        assert width == pytest.approx(np.sqrt(2) * (alone.high - alone.low), rel=0.1)
    else:
        own, real = (np.array(found.extra[key]) for key in ("jackknife", "jackknife_real"))
        error = np.sqrt(19 / 20 * (((own - own.mean()) ** 2).sum() + ((real - real.mean()) ** 2).sum()))
        assert width == pytest.approx(2 * 2.0244 * error, rel=1e-3), "t of 38 degrees: equal variances"


def test_a_planted_fault_is_found_and_clean_images_are_not_accused(photos, tmp_path):
    clean = from_uint8(natural(NUM, 48, 48, 9)[..., 8:40, 8:40])
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    context = context_of(photos, tmp_path)
    for kind, name in ((SpectrumProbe, "hfer_db"), (PixelStatistics, "wavelet_noise")):
        before, after = (measure(kind, context, x)[name] for x in (clean, (clean + noise).clamp(0, 1)))
        assert after.interval.low > 0.2 and after.interval.low > before.interval.high
        assert before.interval.low < 0.5 and before.interval.high > -0.5, "photographs of other shapes"


def test_jpeg_is_a_flag_of_every_difference(tmp_path, caplog):
    folder = save(natural(NUM, 40, 56, 1), tmp_path / "real", ".jpg", quality=60)
    found = measure(SpectrumProbe, context_of(folder, tmp_path), from_uint8(natural(NUM, SIDE, SIDE, 9)))
    for measured in found.values():
        assert measured.flags == (LOSSY,)
        reference = measured.protocol.fields["reference"]
        assert reference["history"] == "JPEG: 48 files, libjpeg quality 60, chroma 4:2:0" and reference["lossy"]
    assert found["hfer_db"].interval.low > 0, "clean images look hacked beside them"
    assert "clean model reads as too sharp" in caplog.text


def test_what_needs_a_caption_is_absolute_and_says_so(photos, tmp_path):
    found = measure(Probes, context_of(photos, tmp_path), from_uint8(natural(NUM, SIDE, SIDE, 9)))
    for name in ("aliasing_gain", "fragility"):
        assert found[name].flags == ("no gap to real: nothing says what the real images show",)
        assert found[name].protocol.fields["reference"] is None
        assert found[name].reference is None
    assert {found[name].reference for name in ("aliased_noise", "hfer_db", "grid_vae_db", "saturation")} == {"real"}


class Counting(PixelStatistics):
    """Keeps count of the images it has read."""

    num_read = 0

    def measure(self, images, prompts):
        type(self).num_read += len(images)
        return super().measure(images, prompts)


def test_photos_are_read_once_for_all_models(photos, tmp_path):
    images = from_uint8(natural(NUM, SIDE, SIDE, 9))
    first = measure(Counting, context_of(photos, tmp_path), images)
    assert Counting.num_read == NUM + 2 * NUM
    second = measure(Counting, context_of(photos, tmp_path), images)
    assert Counting.num_read == NUM + 2 * NUM + NUM
    assert {k: v.value for k, v in first.items()} == {k: v.value for k, v in second.items()}
    measure(SpectrumProbe, context_of(photos, tmp_path), images)
    measure(GridPeaks, context_of(photos, tmp_path), images)
    assert len(list(tmp_path.glob("realcrops-*.safetensors"))) == 1, "both from one file of sums"


def test_whole_photos_of_another_size_serve_probes_alone(photos, tmp_path):
    context = context_of(photos, tmp_path)
    comparison = SetComparison(context.features, "folder")

    def check(*kinds: type) -> None:
        comparison.check(SIDE, [protocol for kind in kinds for _, protocol in kind(context).planned])

    check(SpectrumProbe, PixelStatistics)
    with pytest.raises(UsageError, match="100 reference images are not plain .*layer.png"):
        check(SpectrumProbe, KernelDistance)


def test_absolute_values_of_two_sizes_are_two_columns(photos, tmp_path):
    """A total variation per pixel at 50 px is none at 64."""
    for kind in (PixelStatistics, GridPeaks, resolve("probe", "fragility")):
        ids = {kind(context_of(photos, tmp_path, side=side)).planned[0][1].id for side in (50, 64)}
        assert len(ids) == 2, kind


def test_committed_results_keep_their_protocols(tmp_path):
    """A new evaluation of the embedded world finds the committed values under the same ids."""
    context = make_context(benchtop_prompts(2048), tmp_path)
    (found,) = load_result_sets(ROOT / "results")
    measured = ("fid", "kid", "prdc", "vendi", "hps", "oracle", "gold_utility", *(set(names("probe")) - {"diversity"}))
    planned = {
        (metric, protocol.id) for name in measured for metric, protocol in resolve("metric", name)(context).planned
    }
    assert planned == {key for key in found.shown if key[0] != "gold_win_rate"}, "its opponent is not in this context"
