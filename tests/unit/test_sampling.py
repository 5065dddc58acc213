"""Our samplers against diffusers' schedulers and pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

from rgbench.core.errors import UsageError
from rgbench.diffusion.sampling import ddim_timesteps, draw_noise, lcm_timesteps
from rgbench.models.pipeline import load_models
from rgbench.models.student import make_student
from tests.parity import tiny


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(num)]


@pytest.mark.parametrize("original", [50, 25, 30])
def test_lcm_timesteps_are_diffusers(original):
    scheduler = LCMScheduler(original_inference_steps=original)
    for steps in range(1, original + 1):
        scheduler.set_timesteps(steps)
        assert lcm_timesteps(steps, original, 1000).tolist() == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_timesteps_are_diffusers(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for steps in [*range(1, 60), 100, 250, 333]:
        scheduler.set_timesteps(steps)
        assert ddim_timesteps(steps, 1000, spacing, 1).tolist() == scheduler.timesteps.tolist(), steps


def test_impossible_step_counts_are_refused():
    with pytest.raises(ValueError, match="trained on 50"):
        lcm_timesteps(51, 50, 1000)
    with pytest.raises(ValueError, match="do not lie in"):
        ddim_timesteps(1000, 1000, "leading", 1)
    with pytest.raises(ValueError, match="leading or trailing"):
        ddim_timesteps(10, 1000, "linspace", 1)


def test_noise_does_not_depend_on_the_batch():
    like = torch.zeros(1)
    together = draw_noise(generators(3), (4, 2, 2), like)
    assert torch.equal(together[1:2], draw_noise(generators(3)[1:2], (4, 2, 2), like))


@pytest.mark.parametrize(
    "kind, scheduler",
    [
        ("epsilon", {}),
        ("v_prediction", {"timestep_spacing": "trailing"}),
        ("sample", {"set_alpha_to_one": True}),
    ],
)
def test_ddim_gives_the_pipelines_images(tmp_path, kind, scheduler):
    folder = tiny.save_pipeline(tmp_path / "teacher", kind, **scheduler)
    models = tiny.models(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = tiny.PROMPTS[:3]
    for steps, guidance in ((7, 3.0), (4, 1.0)):
        theirs = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators(3), output_type="pt"
        ).images
        ours = models.sample(prompts, generators(3), num_steps=steps, guidance_scale=guidance)
        assert (ours - theirs).abs().max() <= 1e-5
        assert ours.std() > 0.01


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_lcm_gives_the_pipelines_images(tmp_path, kind):
    """A grid of 25 and another timestep scaling, so that diffusers' defaults would show."""
    teacher = tiny.models(tiny.save_pipeline(tmp_path / "teacher", kind))
    student = make_student(teacher.unet, 16)
    torch.nn.init.normal_(student.time_embedding.cond_proj.weight)
    models = teacher.with_student(student, 25, 7.0)
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=kind,
        original_inference_steps=25,
        timestep_scaling=7.0,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    pipeline = LatentConsistencyModelPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=student,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = tiny.PROMPTS[:3]
    images = {}
    for steps, guidance in ((4, 5.0), (1, 5.0), (4, 3.0)):
        theirs = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators(3), output_type="pt"
        ).images
        ours = models.sample(prompts, generators(3), num_steps=steps, guidance_scale=guidance)
        images[steps, guidance] = ours
        assert (ours - theirs).abs().max() <= 1e-5
    assert (images[4, 5.0] - images[4, 3.0]).abs().max() > 1e-4, "guidance has no effect"


def test_an_exported_scheduler_brings_its_own_grid(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "teacher")
    models = tiny.models(folder)
    with pytest.raises(UsageError, match="original_inference_steps"):
        models.with_student(make_student(models.unet, 16), None, 10.0).sample(  # type: ignore[arg-type]
            ["a"], generators(1), num_steps=2, guidance_scale=5.0
        )


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("change", [{"steps_offset": 0}, {"clip_sample": True}])
def test_what_the_pipeline_corrects_is_corrected_here(tmp_path, change):
    """StableDiffusionPipeline overrules these two options of old scheduler files."""
    folder = tiny.save_pipeline(tmp_path / "teacher")
    _change_scheduler(folder, change)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    theirs = pipeline(["a"], **options, generator=generators(1), output_type="pt").images
    ours = tiny.models(folder).sample(["a"], generators(1), num_steps=3, guidance_scale=3.0)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("option", ["thresholding", "rescale_betas_zero_snr"])
def test_options_that_are_not_sampled_with_are_refused(tmp_path, option):
    folder = tiny.save_pipeline(tmp_path / "teacher")
    _change_scheduler(folder, {option: True})
    with pytest.raises(UsageError, match=f"{option} is on"):
        load_models(folder, "cpu", torch.float32)


def _change_scheduler(folder: Path, change: dict) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
