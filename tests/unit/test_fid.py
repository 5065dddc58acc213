"""FD-EffLite0 and KD-EffLite0 over real scenes: order, cache, flags, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.metrics.context import Context
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.fid import FrechetDistance, Moments, frechet_distance
from rgbench.metrics.kid import KernelDistance, kid
from rgbench.metrics.networks import EffLite0Features, fold_batch_norms, load_efflite0
from rgbench.metrics.reference import ReferenceScenes, from_uint8, renderer_digest, to_uint8
from rgbench.metrics.values import metric_info
from tests.tiny_models import make_context

NUM = 24


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return make_context(benchtop_prompts(NUM), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return from_uint8(to_uint8(scene_batch("all", range(NUM))[0]))


def run_through(metric, context: Context, images: torch.Tensor, order: list[int], size: int):
    for start in range(0, len(order), size):
        at = order[start : start + size]
        metric.update(images[at], [context.prompts.prompts[i] for i in at], np.array(at))
    return metric.compute()


def test_value_is_the_distance_of_the_features(context, images):
    (found,) = run_through(FrechetDistance(context), context, images, list(range(NUM)), 8)
    network = EffLite0Features()
    parts = ((images, 8), (from_uint8(context.reference.images), NUM))  # other batches round otherwise
    ours, real = (torch.cat([network(x) for x in whole.split(size)]).double().numpy() for whole, size in parts)
    assert found.value == pytest.approx(frechet_distance(Moments.of(ours), Moments.of(real)), rel=1e-6)
    assert found.interval.low < found.value < found.interval.high
    assert found.num_images == NUM and found.flags == ("n<=d",)
    assert metric_info(found.metric).label == "FD-EffLite0"
    assert found.extra["split_half_null"] > 0


def test_batch_norms_fold_into_the_convolutions_without_a_change():
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, folded = load_efflite0().double(), fold_batch_norms(load_efflite0().double())
    kinds = {type(layer).__name__ for layer in folded.modules()}
    assert not any("Norm" in kind for kind in kinds), kinds
    torch.testing.assert_close(folded.forward_features(images), plain.forward_features(images), rtol=1e-10, atol=1e-12)


def test_order_and_batch_size_change_nothing_but_rounding(context, images):
    forward = run_through(FrechetDistance(context), context, images, list(range(NUM)), 8)
    shuffled = run_through(FrechetDistance(context), context, images, list(reversed(range(NUM))), 5)
    assert shuffled[0].value == pytest.approx(forward[0].value, rel=1e-4)
    assert shuffled[0].interval.low == pytest.approx(forward[0].interval.low, rel=1e-3)


def test_the_reference_itself_is_at_distance_zero(context):
    real = from_uint8(context.reference.images)
    (found,) = run_through(FrechetDistance(context), context, real, list(range(NUM)), 8)
    assert found.value == pytest.approx(0, abs=1e-3)


def test_kernel_distance_on_the_same_features(context, images):
    (found,) = run_through(KernelDistance(context), context, images, list(range(NUM)), 8)
    network = EffLite0Features()
    ours, real = (network(x).double().numpy() for x in (images, from_uint8(context.reference.images)))
    assert found.value == pytest.approx(1000 * kid(ours, real), rel=1e-3)
    assert found.interval.low < found.interval.high


def test_set_metrics_share_the_features_of_a_batch(context, images):
    first = context.features(images)
    assert context.features(images) is first
    assert context.features(images.clone()) is not first


def test_reference_is_made_of_the_prompts_own_attributes(context):
    assert context.reference.images.shape == (NUM, 3, 64, 64)
    scene, _ = scene_batch("test", range(1))
    assert torch.equal(context.reference.images[0], to_uint8(scene)[0]), "prompt 0 is scene 0 of the test split"
    fields = context.reference.fields()
    assert fields["num"] == NUM and fields["renderer"] == renderer_digest()
    other = ReferenceScenes(benchtop_prompts(NUM - 1), context.reference.cache).fields()
    assert other["scenes_sha256"] != fields["scenes_sha256"]


def test_reference_features_are_cached_by_content_and_remade_when_damaged(tmp_path, caplog):
    prompts = benchtop_prompts(4)
    made = np.array(make_context(prompts, tmp_path).features.reference_rows())  # no map of a file that is cut below
    (file,) = tmp_path.glob("*.f32")
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(make_context(prompts, tmp_path).features.reference_rows(), made)
    assert file.stat().st_mtime_ns == stamp, "read, not made again"
    good = file.read_bytes()
    for damaged in (good[:1000], good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]):
        file.write_bytes(damaged)
        assert np.array_equal(make_context(prompts, tmp_path).features.reference_rows(), made)
        assert "made again" in caplog.text
        caplog.clear()
        assert file.read_bytes() == good


def test_features_that_are_not_finite_stop_the_metric():
    rows = FeatureRows(4, 3)
    with pytest.raises(RgbenchError, match="image 2 of the evaluated set are not finite"):
        rows.put(np.array([0, 2]), torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]))


@pytest.mark.parametrize(("metric", "name"), [(FrechetDistance, "fid"), (KernelDistance, "kid")])
def test_prompts_without_scenes_are_refused(tmp_path, metric, name):
    prompts = PromptSet("mine", (Prompt("mine/0", "a cat"),) * 9)
    with pytest.raises(UsageError, match=f"metric {name}: mine: prompt 'mine/0' has no scene"):
        metric(make_context(prompts, tmp_path))


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 4 images, not 3"):
        FrechetDistance(make_context(benchtop_prompts(3), tmp_path))


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"layout": "left of", "shape0": "circle", "colour0": "red", "size0": "small"}, "'x/1' needs shape, colour"),
        ({"layout": "centre", "shape0": "circle", "colour0": "red"}, "'x/1' needs shape, colour and size"),
        ({"layout": "centre", "shape0": "cube", "colour0": "red", "size0": "small"}, "'shape'.*known: circle"),
        ({"layout": "beside"}, "scene attribute 'layout'.*known: centre"),
    ],
)
def test_impossible_scenes_are_refused_before_any_image(tmp_path, scene, message):
    good = benchtop_prompts(1).prompts[0]
    prompts = PromptSet("mine", (good, Prompt("x/1", "a red circle", "", scene)))
    with pytest.raises(UsageError, match=f"metric kid: mine: .*{message}"):
        KernelDistance(make_context(prompts, tmp_path))
