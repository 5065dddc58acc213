"""The shipped world: whole, as its manifest says, small, and loadable with the public libraries alone."""

from __future__ import annotations

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline

from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.scenes import captions, sample_scenes, scene_batch
from rgbench.core.io import read_json, sha256_tree
from rgbench.core.run import stream_generator
from rgbench.models.pipeline import load_models
from rgbench.models.presets import BENCHTOPS, PRESETS, WEIGHTS
from tools.benchtop.build import SHIPPED

WORLD = WEIGHTS
LIMIT_BYTES = 42 * 10**6


def test_files_are_those_of_the_manifest():
    outputs = {}
    for stage in read_json(WORLD / "manifest.json")["stages"].values():
        outputs |= stage["outputs"]
    assert {name: sha256_tree(WORLD / name) for name in SHIPPED} == {name: outputs[name] for name in SHIPPED}


def test_weights_stay_under_the_limit():
    assert sum(p.stat().st_size for p in WORLD.rglob("*") if p.is_file()) <= LIMIT_BYTES


@pytest.mark.parametrize(
    ("name", "pipeline_class", "left_out"),
    [
        ("teacher", "StableDiffusionPipeline", {}),
        ("teacher_flow", "StableDiffusion3Pipeline", {"text_encoder_3": None, "tokenizer_3": None}),
    ],
)
def test_a_teacher_loads_with_diffusers_alone(name, pipeline_class, left_out):
    pipeline = DiffusionPipeline.from_pretrained(WORLD / name, **left_out)
    assert type(pipeline).__name__ == pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a small red circle on the left", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


@pytest.mark.parametrize("name", ["clip", "reward"])
def test_clips_load_with_open_clip_alone(name):
    source = f"local-dir:{WORLD / name}"
    model, tokenizer = open_clip.create_model(source).eval(), open_clip.get_tokenizer(source)
    with torch.no_grad():
        text = model.encode_text(tokenizer(["a large blue star at the top"]), normalize=True)
        image = model.encode_image(torch.zeros(1, 3, 28, 28), normalize=True)
    assert text.shape == image.shape == (1, 128)


def test_classifiers_read_clean_scenes():
    oracle = load_oracle(WORLD / "classifiers")
    images, scenes = scene_batch("test", range(64))
    assert oracle.score(images, scenes)["mean"].mean() > 0.98


@pytest.mark.parametrize("name", BENCHTOPS)
def test_a_teacher_paints_what_its_preset_says(name):
    """Twelve steps at the preset's guidance show most of what captions say; noise shows a quarter of it."""
    preset, num = PRESETS[name], 24
    models = load_models(preset.teacher_folder(), torch.device("cpu"), torch.float32)
    scenes = sample_scenes("test", range(num))
    noises = [stream_generator(0, "shipped", i) for i in range(num)]
    prompts = captions(scenes, "test", range(num))
    images = models.sample(prompts, noises, num_steps=12, guidance_scale=preset.teacher_guidance)
    assert images.shape == (num, 3, preset.resolution, preset.resolution)
    oracle = load_oracle(WORLD / "classifiers")
    assert oracle.score(images, scenes)["mean"].mean() > 0.75
    assert oracle.score(torch.rand_like(images), scenes)["mean"].mean() < 0.5
