"""CMMD: the authors' formula written out, the jackknife, CLIP's own features, and weights that are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import UsageError
from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics import kid
from rgbench.metrics.cmmd import CMMD, CLIPNetwork, cmmd
from rgbench.metrics.reference import from_uint8, to_uint8
from rgbench.metrics.statistics import jackknife_groups, jackknife_interval
from tests.tiny_models import make_context

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP in transformers' layout, 12 features of 16 pixels."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**layers, "image_size": 16, "patch_size": 4, "projection_dim": 12}
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=layers, vision_config=vision, projection_dim=12)).save_pretrained(path)
    return path


def unit(num: int, seed: int, shift: float = 0.0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(shift, 1, size=(num, 12))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """1000 · MMD² with every pair, the same image with itself included."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_the_formula_and_its_replicates(monkeypatch):
    monkeypatch.setattr(kid, "CHUNK", 7)
    x, y, groups = unit(30, 0, 0.5), unit(23, 1), jackknife_groups(30, 5)
    value, left = cmmd(x, y, groups)
    assert value == pytest.approx(by_loops(x, y), rel=1e-9) and value > 1
    assert left == pytest.approx([by_loops(x[groups != g], y) for g in range(5)], rel=1e-9)
    assert cmmd(x, x, groups)[0] == pytest.approx(0, abs=1e-9)


def test_features_are_clips_own(folder):
    network = CLIPNetwork(folder, CPU)
    images = from_uint8(to_uint8(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))))
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    pixels = processor(images=list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=pixels)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    expected = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(network(network.prepare(images)), expected, atol=1e-5, rtol=0)
    wide = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network.prepare(wide), network.prepare(wide[..., 8:40])), "the centre square"


def test_images_come_to_its_size_as_in_the_authors_code(folder):
    """Crop to the centre square, Pillow's bicubic, which antialiases, to the network's side; 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (53, 40, 3), dtype=np.uint8)
    theirs = Image.fromarray(pixels).crop((0, 6, 40, 46)).resize((16, 16), resample=Image.BICUBIC)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    expected = processor(images=theirs, return_tensors="pt").pixel_values
    network = CLIPNetwork(folder, CPU)
    prepared = network.prepare(from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    torch.testing.assert_close(prepared, expected, atol=1e-6, rtol=0)
    assert network.fields()["antialias"] and "Pillow bicubic to 16" in network.fields()["resize"]


def test_the_metric_beside_the_others(folder, tmp_path):
    context = make_context(benchtop_prompts(24), tmp_path, judges={"cmmd": folder})
    images = from_uint8(to_uint8(scene_batch("all", range(24))[0]))
    metric = CMMD(context)
    for at in (np.arange(10, 24), np.arange(10)):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    (found,) = metric.compute()
    network = CLIPNetwork(folder, CPU)
    ours, real = (network(network.prepare(x)).numpy() for x in (images, from_uint8(context.reference.images)))
    assert found.value == pytest.approx(by_loops(ours.astype(float), real.astype(float)), rel=1e-3, abs=1e-6)
    assert found.interval == jackknife_interval(found.value, found.extra["jackknife"])
    assert found.protocol.fields["network_sha256"] == network.sha256
    assert found.protocol.fields["reference"]["num"] == 24


def test_without_weights_it_says_which_and_how(tmp_path):
    with pytest.raises(UsageError, match=r"--judge cmmd=FOLDER: .*clip-vit-large-patch14-336.*save_pretrained"):
        CMMD(make_context(benchtop_prompts(4), tmp_path))
