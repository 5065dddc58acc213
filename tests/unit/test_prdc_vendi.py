"""Precision, recall, density, coverage and Vendi score against their papers' definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.benchtop.scenes import scene_batch
from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics import prdc
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.fid import FrechetDistance, FrechetInfinity, Gaussian, Moments, extrapolated, infinity_points
from rgbench.metrics.kid import KernelDistance
from rgbench.metrics.networks import EffLite0Network
from rgbench.metrics.prdc import PrecisionRecall, neighbours, radii2, scores
from rgbench.metrics.reference import ReferenceFolder, from_uint8, to_uint8
from rgbench.metrics.statistics import jackknife_groups, jackknife_interval
from rgbench.metrics.values import Direction, MetricValue, metric_info
from rgbench.metrics.vendi import VendiScore, vendi_replicates, vendi_score
from tests.tiny_models import make_context

ALL = {"precision", "recall", "density", "coverage"}


def normal(num: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32) + np.float32(shift)


def by_definition(fake: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """Equations of both papers, image by image."""
    distance = lambda a, b: np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1))  # noqa: E731
    real_radius = np.sort(distance(real, real), 1)[:, k]  # position 0 is the image itself
    fake_radius = np.sort(distance(fake, fake), 1)[:, k]
    between = distance(fake, real)
    inside = between < real_radius[None]
    return {
        "precision": (between <= real_radius[None]).any(1).mean(),
        "recall": (between <= fake_radius[:, None]).any(0).mean(),
        "density": inside.sum() / (k * len(fake)),
        "coverage": inside.any(0).mean(),
    }


@pytest.mark.parametrize(("m", "n", "k"), [(60, 45, 5), (30, 80, 3), (12, 9, 1)])
def test_four_values_by_definition_whatever_the_blocks(m, n, k, monkeypatch):
    fake, real = normal(m, 6, 0, 0.4), normal(n, 6, 1)
    expected = by_definition(fake, real, k)
    for chunk in (7, 4096):
        monkeypatch.setattr(prdc, "CHUNK", chunk)
        found = neighbours(fake, real, np.zeros(m, dtype=int), k)
        assert scores(found, np.ones(m, bool), np.ones(1, bool), k) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["precision"] < 1 or m == 12


def test_the_balls_of_precision_and_recall_are_closed_and_those_of_density_and_coverage_open():
    """On whole numbers, where the distances are exact: everything lies on the rim of everything."""
    line = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    groups = np.zeros(4, dtype=int)
    found = scores(neighbours(line + 4, line, groups, k=1), groups == 0, np.ones(1, bool), k=1)
    assert found == {"precision": 0.25, "recall": 0.25, "density": 0.0, "coverage": 0.0}, "3 and 4 touch"
    same = np.zeros((4, 1), dtype=np.float32)
    found = scores(neighbours(same, same, groups, k=1), groups == 0, np.ones(1, bool), k=1)
    assert found == {"precision": 1.0, "recall": 1.0, "density": 0.0, "coverage": 0.0}, "balls of radius 0"


def test_identical_sets_and_disjoint_ones():
    x = normal(40, 5, 0)
    groups = np.zeros(40, dtype=int)
    same = scores(neighbours(x, x.copy(), groups), groups == 0, np.ones(1, bool))
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and same["density"] == pytest.approx(1, abs=0.3)
    apart = scores(neighbours(x + 100, x, groups), groups == 0, np.ones(1, bool))
    assert apart == dict.fromkeys(ALL, 0.0)


def test_mode_collapse_is_seen_by_recall_and_coverage_alone():
    real, centre = normal(300, 4, 0), normal(300, 4, 1) * 0.05
    groups = np.zeros(300, dtype=int)
    found = scores(neighbours(centre.astype(np.float32), real, groups), groups == 0, np.ones(1, bool))
    assert found["precision"] > 0.95 and found["density"] > 1
    assert found["recall"] < 0.05 and found["coverage"] < 0.5


def test_leaving_a_group_out_keeps_the_radii():
    fake, real = normal(40, 5, 0, 0.5), normal(50, 5, 1)
    groups = jackknife_groups(40)
    found = neighbours(fake, real, groups)
    keep = groups != 3
    between = np.sqrt(((fake[keep][:, None] - real[None]).astype(float) ** 2).sum(-1))
    part = scores(found, keep, np.arange(20) != 3)
    assert part["coverage"] == (between < np.sqrt(radii2(real))[None]).any(0).mean()
    assert part["recall"] == (between <= np.sqrt(radii2(fake))[keep][:, None]).any(0).mean()


def test_vendi_counts_what_is_different():
    eye = np.eye(8, dtype=np.float32)
    assert vendi_score(eye) == pytest.approx(8)
    twice = np.repeat(eye[:4], 5, 0) * 3  # length does not count
    assert vendi_score(twice) == pytest.approx(4)
    assert vendi_score(twice[:5]) == pytest.approx(1)


def test_vendi_is_the_same_by_images_and_by_features():
    x = normal(30, 50, 0, 0.3)
    unit = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit / 30)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(x) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()), rel=1e-9)
    for dim in (50, 5):  # fewer images than features, and more
        part = normal(30, dim, 1, 0.3)
        groups = jackknife_groups(30, 6)
        expected = [vendi_score(part[groups != g]) for g in range(6)]
        assert vendi_replicates(part, groups) == pytest.approx(expected, rel=1e-9)


def test_infinity_removes_the_bias_of_finite_n():
    """Equal distributions: the distance at n is (d(d+1)/4 + d)/n too high, the extrapolated one is not."""
    dim, num = 8, 4000
    rows = normal(num, dim, 0).astype(np.float64)
    reference = Gaussian(Moments.of(normal(200_000, dim, 1)))
    sizes, values = infinity_points(reference, lambda at: rows[at], num, dim)
    assert len(sizes) == 15 and sizes[-1] == num and sizes[0] == 2000
    assert extrapolated([100, 200, 400], [3 + 50 / n for n in (100, 200, 400)]) == pytest.approx(3)
    assert values[0] > values[-1] > abs(extrapolated(sizes, values))
    assert infinity_points(reference, lambda at: rows[at], num, dim)[1] == values, "the seed is fixed"


def test_metrics_give_named_values(tmp_path):
    context = make_context(benchtop_prompts(24), tmp_path)
    images = from_uint8(to_uint8(scene_batch("all", range(24))[0]))
    found = {}
    for kind in (PrecisionRecall, VendiScore, FrechetInfinity):
        metric = kind(context)
        metric.update(images, context.prompts.prompts, np.arange(24))
        found |= {value.metric: value for value in metric.compute()}
    assert set(found) == {f"{name}_efflite0" for name in (*ALL, "vendi", "fd_inf")}
    assert 0 <= found["recall_efflite0"].value <= 1
    assert found["fd_inf_efflite0"].value is None and found["fd_inf_efflite0"].flags == ("n<2560",)


def vendi(context, images: torch.Tensor) -> MetricValue:
    metric = VendiScore(context)
    metric.update(images, context.prompts.prompts, np.arange(len(images)))
    (value,) = metric.compute()
    return value


def test_the_good_end_of_vendi_is_the_references_own_score(tmp_path):
    context = make_context(benchtop_prompts(24), tmp_path)
    real = from_uint8(context.reference.images)
    same = vendi(context, real)
    assert same.value == pytest.approx(0, abs=1e-3) and same.reference == "real"
    assert metric_info(same.metric).direction is Direction.REFERENCE
    collapsed = vendi(context, real[[0] * 24])
    assert collapsed.extra["level"] == pytest.approx(1, abs=1e-3)
    assert collapsed.extra["real"] == same.extra["real"] > 2
    assert collapsed.value == collapsed.extra["level"] - collapsed.extra["real"] < -1
    assert collapsed.interval == jackknife_interval(collapsed.value, collapsed.extra["jackknife"])


def test_vendi_compares_with_as_many_real_images(tmp_path):
    """The score grows with the number of images; of a larger reference as many serve, at random."""
    for i, pixels in enumerate(scene_batch("all", range(40))[0].mul(255).byte().permute(0, 2, 3, 1).numpy()):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i:02d}.png")
    features = FeatureSet(ReferenceFolder(tmp_path / "real", tmp_path), EffLite0Network(torch.device("cpu")))
    images = from_uint8(to_uint8(scene_batch("test", range(48))[0]))
    few, more = (
        vendi(make_context(benchtop_prompts(num), tmp_path, features=features), images[:num]) for num in (24, 48)
    )
    chosen = np.sort(np.random.default_rng(0).permutation(40)[:24])
    assert few.extra["real"] == pytest.approx(vendi_score(features.reference_rows()[chosen]), rel=1e-12)
    assert few.extra["num_reference"] == few.protocol.fields["num_real"] == 24 and not few.flags
    assert more.extra["real"] == pytest.approx(vendi_score(features.reference_rows()), rel=1e-12)
    assert more.flags == ("fewer real images than generated",) and more.extra["num_reference"] == 40


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, PrecisionRecall, VendiScore])
def test_replicates_are_kept_so_that_two_models_are_compared_pairwise(tmp_path, kind):
    """Values of a set have no per-image rows; without replicates the prompts that models share would not cancel."""
    context = make_context(benchtop_prompts(24), tmp_path)
    metric = kind(context)
    metric.update(from_uint8(to_uint8(scene_batch("all", range(24))[0])), context.prompts.prompts, np.arange(24))
    for found in metric.compute():
        kept = found.extra["jackknife"]
        assert len(kept) == 20 and found.interval == jackknife_interval(found.value, kept)
