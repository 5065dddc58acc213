"""Sample grids: the same prompts and seeds at every look, so that one sees the student learn."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rgbench.files import write_bytes_atomic
from rgbench.run import stream_generator
from rgbench.trainers.contract import Trainer
from rgbench.trainers.recipe import LCDRecipe

NUM_PROMPTS = 8


def sample_grid(trainer: Trainer, recipe: LCDRecipe, prompts: list[str]) -> Tensor:
    """Images of the network that will be exported, tiled.

    Args:
        trainer: its target or its student is sampled, as the recipe says.
        recipe: sampling steps, guidance, seed.
        prompts: one image each.

    Returns:
        (3, rows·H, columns·W) in [0, 1], on the CPU.
    """
    network = trainer.target if recipe.sampling.network == "target" else trainer.student
    models = trainer.models.with_student(network, recipe.lcd.num_ddim_timesteps, recipe.lcd.timestep_scaling)
    generators = [stream_generator(recipe.seed, "preview", 0, i) for i in range(len(prompts))]
    sampling = recipe.sampling
    images = models.sample(prompts, generators, num_steps=sampling.steps, guidance_scale=sampling.guidance_scale).cpu()
    return tile(images)


def tile(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in rows of about √(2B): (3, rows·H, columns·W); what is left over is black."""
    columns = min(len(images), math.ceil(math.sqrt(2 * len(images))))
    rows = math.ceil(len(images) / columns)
    blank = torch.zeros(rows * columns - len(images), *images.shape[1:])
    grid = torch.cat([images.float(), blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def write_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) in [0, 1] as an 8-bit PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes_atomic(path, buffer.getvalue())
