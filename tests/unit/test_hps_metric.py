"""HPS metric: the reward's own scores × 100 under both protocols, and who was trained on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.registry import resolve
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.metrics.probes.base import Probes
from rgbench.metrics.reference import from_uint8, to_uint8
from rgbench.metrics.rewards import HPSScore
from rgbench.metrics.values import Family, metric_info
from rgbench.rewards.clip import HPSReward
from rgbench.rewards.config import HPS_V21_FILE
from tests.tiny_models import make_context

NUM = 8


@pytest.fixture
def context(tmp_path):
    return make_context(benchtop_prompts(NUM), tmp_path)


def measure(context, images):
    metric = HPSScore(context)
    for at in (np.array([5, 1, 0]), np.array([2, 3, 4, 6, 7])):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    return metric.compute()


def test_scores_are_those_of_the_reward_in_prompt_order(context):
    images = scene_batch("test", range(NUM))[0]
    for found, antialias in zip(measure(context, images), (True, False), strict=True):
        reward = HPSReward.load(context.reward_folder, antialias=antialias, device="cpu")
        with torch.no_grad():
            expected = 100 * reward(images, [prompt.text for prompt in context.prompts.prompts]).double().numpy()
        np.testing.assert_allclose(found.rows, expected, atol=1e-4)
        assert found.value == pytest.approx(expected.mean(), abs=1e-4)
        assert found.interval.low < found.value < found.interval.high
        heldout = expected[3::4].mean()
        assert found.extra["groups"] == pytest.approx(
            {"test": (expected.sum() - 2 * heldout) / 6, "heldout": heldout}, abs=1e-4
        )


def test_both_settings_share_one_network(context):
    """Of 4 GB at full size."""
    filtered, plain = (shared.reward for shared in HPSScore(context).shared)
    assert filtered.model is plain.model and (filtered.antialias, plain.antialias) == (True, False)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    alone = HPSReward.load(context.reward_folder, antialias=False, device="cpu")
    assert torch.equal(plain(images, ["a", "b"]), alone(images, ["a", "b"]))
    assert not torch.equal(plain(images, ["a", "b"]), filtered(images, ["a", "b"]))


def test_antialias_on_and_off_are_two_protocols(context):
    found = measure(context, scene_batch("test", range(NUM))[0])
    assert [value.metric for value in found] == ["hps", "hps_no_antialias"]
    assert [value.protocol.fields["reward"]["antialias"] for value in found] == [True, False]
    assert {metric_info(value.metric).family for value in found} == {Family.REWARD}
    assert found[0].value != found[1].value


def test_through_jpeg_is_another_protocol_of_the_same_reward(context, tmp_path):
    """As published HPSv2 values were made: saved by Pillow as JPEG, opened again, scored."""
    images = to_uint8(scene_batch("test", range(NUM))[0])
    opened = []
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.jpg")
        opened.append(torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.jpg"))).permute(2, 0, 1))
    plain, lossy = HPSScore(context), resolve("metric", "hps_jpeg75")(context)
    for metric in (plain, lossy):
        metric.update(from_uint8(images), context.prompts.prompts, np.arange(NUM))
    texts = [prompt.text for prompt in context.prompts.prompts]
    for found, lossless, antialias in zip(lossy.compute(), plain.compute(), (True, False), strict=True):
        reward = HPSReward.load(context.reward_folder, antialias=antialias, device="cpu")
        with torch.no_grad():
            expected = 100 * reward(from_uint8(torch.stack(opened)), texts).double().numpy()
        np.testing.assert_allclose(found.rows, expected, atol=1e-4)
        assert abs(found.rows - lossless.rows).max() > 0.01
        assert found.metric == ("hps_jpeg75" if antialias else "hps_jpeg75_no_antialias")
        assert found.protocol.fields == {**lossless.protocol.fields, "jpeg": "quality 75, 4:2:0"}
    given = make_context(benchtop_prompts(2), tmp_path, jpeg="as given (.jpg)")
    fields = resolve("metric", "hps_jpeg75")(given).planned[0][1].fields
    assert fields["jpeg"] == "as given (.jpg), then quality 75, 4:2:0"
    assert HPSScore.default and not resolve("metric", "hps_jpeg75").default


def test_in_sample_is_decided_by_the_weights(tmp_path, context):
    sha = HPSReward.load(context.reward_folder, antialias=True, device="cpu").weights_sha256
    images = scene_batch("test", range(NUM))[0]
    for weights, expected in ((sha, True), ("0" * 64, False)):
        trained = ({"name": "hps", "fingerprint": {"weights_sha256": weights}},)
        found = measure(make_context(context.prompts, tmp_path, trained_rewards=trained), images)
        assert [m.in_sample for m in found] == [expected, expected], "the antialiasing of training does not matter"
    assert not any(m.in_sample for m in measure(context, images))


def test_prompts_need_no_scene_and_images_no_size(tmp_path):
    prompts = PromptSet("mine", (Prompt("mine/0", "a cat"), Prompt("mine/1", "a dog")))
    metric = HPSScore(make_context(prompts, tmp_path, resolution=48))
    metric.update(torch.rand(2, 3, 48, 48), prompts.prompts, np.arange(2))
    assert [m.num_images for m in metric.compute()] == [2, 2]


def test_score_that_is_not_finite_stops_the_metric(context):
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(RgbenchError, match=r"'test/1' is not finite"):
        HPSScore(context).update(images, context.prompts.prompts[:2], np.arange(2))


def test_where_hps_is_not_here_it_is_named_and_the_probes_that_need_none_are_measured(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    prompts = PromptSet("plain", tuple(Prompt(f"p/{i}", f"cat {i}") for i in range(NUM)))
    context = make_context(prompts, tmp_path, resolution=48, reward_folder=Path(HPS_V21_FILE))
    with pytest.raises(UsageError, match=r"--hps: the weights of hps 2\.1 .*hf download xswu/HPSv2 .*--revision 6974"):
        HPSScore(context)
    names = {type(probe).__name__ for probe in Probes(context).probes}
    assert names == {"ColourDrift", "GridPeaks", "PixelStatistics", "SpectrumProbe"}
    assert "probe fragility: left out: --hps: the weights of hps 2.1 are not here" in caplog.text
