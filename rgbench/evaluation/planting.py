"""Scenes that hacks are planted into: what a perfect model would make, and how metrics see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import PromptSet, benchtop_prompts
from rgbench.errors import RgbenchError
from rgbench.evaluation.hacks import HACKS, Ground
from rgbench.evaluation.repeats import repeat_prompts
from rgbench.metrics.contract import Context, Measurement
from rgbench.metrics.efflite0 import EffLite0Network
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.overopt.rewards import shared_reward
from rgbench.metrics.overopt.spectrum import reward_geometry
from rgbench.metrics.reference import ReferenceScenes, from_uint8, to_uint8
from rgbench.registry import resolve
from rgbench.worlds.presets import JUDGES_FOLDER, PRESETS
from rgbench.worlds.scenes import IMAGE_SIZE, Scenes, render

PER_PROMPT = 8  # images of a prompt: as many as diversity needs
MODEL_SPLIT = "all"  # its nuisance stream is not that of the real scenes


def make_context(first: int, num_prompts: int, device: torch.device, cache: Path) -> Context:
    """A metric's context for some of the benchtop's prompts, 8 images of each.

    Args:
        first: of the prompts.
        num_prompts: how many.
        device: where networks run.
        cache: folder for what can be computed again.
    """
    base = benchtop_prompts(first + num_prompts).prompts[first:]
    prompts = repeat_prompts(PromptSet(f"planted {first}", base), PER_PROMPT)
    # real scenes of their own for each list: else all would be compared with one draw's luck
    reference = ReferenceScenes(prompts, cache / ".cache", start=first * PER_PROMPT)
    features = FeatureSet(reference, EffLite0Network(device))
    return Context(
        prompts=prompts,
        resolution=IMAGE_SIZE,
        reference=reference,
        features=features,
        rows=FeatureRows(len(prompts), features.network.num_features),
        reward_folder=PRESETS["benchtop"].reward_folder(),
        judges_folder=JUDGES_FOLDER,
        trained_rewards=(),
        device=device,
    )


def clean_images(context: Context, draw: int) -> Tensor:
    """(n, 3, 64, 64) scenes that show what the prompts ask for.

    Args:
        context: of the prompts.
        draw: number of the set; each has jitter, rotation and texture of its own.
    """
    prompts = context.prompts.prompts
    scenes = Scenes.from_dicts([prompt.scene for prompt in prompts if prompt.scene])
    return render(scenes, MODEL_SPLIT, np.arange(len(prompts)) + draw * len(prompts))


def plant(hack: str, dose: float, images: Tensor, context: Context, seed: int) -> Tensor:
    """Images with a hack in them, in [0, 1].

    Args:
        hack: name in ``HACKS``.
        dose: in its unit.
        images: clean ones.
        context: of their prompts.
        seed: of what is drawn.
    """
    size, patch = reward_geometry(context)
    ground = Ground(
        texts=[prompt.text for prompt in context.prompts.prompts],
        per_prompt=PER_PROMPT,
        generator=torch.Generator().manual_seed(seed),
        patch_period=patch * context.resolution / size,
        rewards={aa: shared_reward(context, aa).reward for aa in (True, False)},
    )
    place = context.device if HACKS[hack].attacks else images.device
    return HACKS[hack].plant(images.to(place), dose, ground).clamp(0, 1).cpu()


def measure(metrics: Sequence[str], context: Context, images: Tensor) -> list[Measurement]:
    """Figures of a set of images, as 8-bit files would hold them.

    Raises:
        RgbenchError: a figure that is undefined.
    """
    pixels = from_uint8(to_uint8(images)).to(context.device)
    found: list[Measurement] = []
    for metric in (resolve("metric", name)(context) for name in metrics):
        metric.update(pixels, context.prompts.prompts, np.arange(len(pixels)))
        found += metric.finish()
    for each in found:
        if each.value is None:
            raise RgbenchError(f"{each.quantity.metric.name} is undefined for these scenes: {', '.join(each.flags)}")
    return found


def image_counts(num_sets: int, num_prompts: int) -> tuple[Tensor, ...]:
    """One range of images per set, for a progress bar that counts images."""
    size = num_prompts * PER_PROMPT
    return torch.arange(num_sets * size).split(size)
