"""``python -m tools.bench generate``: our sampler and diffusers' pipeline, the same images in turn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor

from rgbench.evaluate.images import noise_seed
from rgbench.models.pipeline import DiffusionModels
from rgbench.models.student import make_student
from tools.bench.clock import Clock, Spread, alternate, ratio
from tools.bench.machine import peak_memory

NUM_DDIM_TIMESTEPS, TIMESTEP_SCALING, EMBEDDING = 50, 10.0, 256
PROMPTS = ("a small red circle on the left", "a large blue square above a green star", "a ring", "two yellow crosses")


def untrained_student(models: DiffusionModels) -> DiffusionModels:
    """The teacher as a student before its first step: what generating costs does not depend on training."""
    student = make_student(models.unet, EMBEDDING).requires_grad_(False)
    return models.with_student(student, NUM_DDIM_TIMESTEPS, TIMESTEP_SCALING)


def plain_pipeline(models: DiffusionModels) -> LatentConsistencyModelPipeline:
    """diffusers' pipeline around the same networks."""
    scheduler = LCMScheduler(
        trained_betas=_betas(models),
        prediction_type=models.prediction_type,
        original_inference_steps=NUM_DDIM_TIMESTEPS,
        timestep_scaling=TIMESTEP_SCALING,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = LatentConsistencyModelPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _betas(models: DiffusionModels) -> list[float]:
    """β of ᾱ, so that both have one schedule."""
    cumprod = models.alphas_cumprod.double().cpu()
    before = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    return (1 - cumprod / before).tolist()


def measure(models: DiffusionModels, *, batch_size: int, steps: int, guidance: float, rounds: int) -> dict[str, Any]:
    """Images per second of both, their ratio, and how far their images lie apart.

    Args:
        models: a student.
        batch_size: images at once.
        steps: network evaluations per image.
        guidance: in the pipelines' form.
        rounds: how often each is timed.
    """
    clock, pipeline = Clock(models.device), plain_pipeline(models)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch_size)]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(noise_seed(f"bench/{i}", 0)) for i in range(batch_size)]

    @torch.inference_mode()
    def ours() -> Tensor:
        return models.sample(prompts, generators(), num_steps=steps, guidance_scale=guidance)

    def plain() -> Tensor:
        settings = {"num_inference_steps": steps, "original_inference_steps": NUM_DDIM_TIMESTEPS}
        return pipeline(prompts, generator=generators(), guidance_scale=guidance, output_type="pt", **settings).images

    apart = differences(ours(), plain())
    seconds = alternate({"plain": plain, "rgbench": ours}, rounds, clock)
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    return {
        "batch_size": batch_size,
        "steps": steps,
        "resolution": models.resolution,
        "dtype": str(models.dtype).removeprefix("torch."),
        "seconds": {name: spread.to_json() for name, spread in spreads.items()},
        "images_per_sec": {name: batch_size / spread.median for name, spread in spreads.items()},
        "ratio_to_plain": ratio(seconds["plain"], seconds["rgbench"]).to_json(),
        "difference": apart,
        "peak_memory": {"rgbench": peak_memory(models.device, ours), "plain": peak_memory(models.device, plain)},
    }


def differences(a: Tensor, b: Tensor) -> dict[str, float]:
    """How far two batches of images in [0, 1] lie apart: share of values within 2/255, the largest gap, PSNR (dB)."""
    gap = (a.double() - b.double().to(a.device)).abs()
    error = float((gap**2).mean())
    return {
        "share_within_2_of_255": float((gap <= 2 / 255).double().mean()),
        "largest": float(gap.max()),
        "psnr_db": -10 * torch.log10(torch.tensor(max(error, 1e-20), dtype=torch.float64)).item(),
    }
