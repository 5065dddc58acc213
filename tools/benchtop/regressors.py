"""Regressors stage: how degraded is an image? Each architecture trained apart, on known strengths.

Half of the images go through the VAE, for a student's images come out of its decoder. The kinds are those that the
annotators know and four that optimisers plant; pixelation, salt and pepper and motion blur are kept for the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from rgbench.benchtop.gold import DegradationRegressor
from rgbench.benchtop.oracle import CLASSIFIERS
from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS, blur, degrade
from rgbench.benchtop.scenes import scene_batch
from tools.benchtop.stage import StageLog, linear_decay, set_lr, stage_seed

FIRST = 5 * 10**8  # of the scenes that no other stage sees


@dataclass(frozen=True)
class RegressorConfig:
    """Hyper-parameters of the regressors; ``steps`` by architecture."""

    seed: int = 0
    steps: dict[str, int] = field(default_factory=lambda: {"resnet": 600, "vit": 900, "convnext": 600})
    batch_size: int = 64
    lr: float = 1e-3
    clean: float = 0.25
    decoded: float = 0.5


def sharpen(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Unsharp mask of σ = 1 pixel, up to four times the detail."""
    soft = blur(images, torch.full_like(strength, 0.35), generator)
    return images + 4 * strength[:, None, None, None] * (images - soft)


def grid(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A square wave of period 2, 4 or 8 pixels, amplitude up to 0.15."""
    side = images.shape[-1]
    period = 2 ** torch.randint(1, 4, (len(images), 1), generator=generator)
    wave = 1 - 2 * ((torch.arange(side)[None] // (period // 2).clamp(min=1)) % 2).float()
    pattern = wave[:, None, :, None] * wave[:, None, None]
    return images + 0.15 * strength[:, None, None, None] * pattern


def cast(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """One channel raised and another lowered, by up to a half."""
    order = torch.rand(len(images), 3, generator=generator).argsort(1)
    gain = torch.tensor([1.0, 0.0, -1.0])[order]
    return images * (1 + 0.5 * strength[:, None, None, None] * gain[:, :, None, None])


def coarse_noise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of 2-pixel grain, standard deviation up to 0.25."""
    side = images.shape[-1] // 2
    drawn = torch.randn(len(images), 3, side, side, generator=generator)
    return images + 0.25 * strength[:, None, None, None] * drawn.repeat_interleave(2, -1).repeat_interleave(2, -2)


KINDS: tuple[Callable[[Tensor, Tensor, torch.Generator], Tensor], ...] = (
    *TRAINED_DEGRADATIONS,
    *(sharpen, grid, cast, coarse_noise),
)
SURVIVING = (*TRAINED_DEGRADATIONS, cast, coarse_noise)  # the VAE removes fine grids and sharpening


@torch.no_grad()
def regressor_batch(
    step: int, number: int, config: RegressorConfig, vae: AutoencoderKL, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B, 3, 64, 64) images and (B,) strengths; some images pass the VAE before, others after they are degraded."""
    n = config.batch_size
    start = FIRST * (number + 1) + step * n
    images, _ = scene_batch("all", range(start, start + n))
    strength = torch.rand(n, generator=generator)
    strength[torch.rand(n, generator=generator) < config.clean] = 0.0
    place = torch.rand(n, generator=generator)
    before, after = place < config.decoded / 2, place > 1 - config.decoded / 2
    images[before] = _through(vae, images[before])
    images[~after] = degrade(images[~after], strength[~after], KINDS, generator)
    images[after] = _through(vae, degrade(images[after], strength[after], SURVIVING, generator))
    return images, strength


def _through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    if not len(images):
        return images
    return (vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)


def train_regressors(config: RegressorConfig, out: Path, device: torch.device) -> None:
    """Train all regressors; write ``out/regressors/{name}/model.safetensors`` in fp16."""
    vae = AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False)
    for number, name in enumerate(CLASSIFIERS):
        folder = out / "regressors" / name
        if not (folder / "model.safetensors").exists():
            network = train_regressor(name, number, config, vae, out, device)
            folder.mkdir(parents=True, exist_ok=True)
            state = {k: v.half().cpu() if v.is_floating_point() else v.cpu() for k, v in network.state_dict().items()}
            save_file(state, folder / "model.safetensors")


def train_regressor(
    name: str, number: int, config: RegressorConfig, vae: AutoencoderKL, out: Path, device: torch.device
) -> DegradationRegressor:
    torch.manual_seed(stage_seed(config.seed, f"regressor_{name}", -1))
    network = DegradationRegressor(name).to(device).train()
    lr = config.lr * (0.5 if name == "vit" else 1.0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    log = StageLog(out / f"regressor_{name}.jsonl")
    for step in range(config.steps[name]):
        generator = torch.Generator().manual_seed(stage_seed(config.seed, f"regressor_{name}", step))
        set_lr(optimiser, lr * linear_decay(step, config.steps[name]))
        images, strength = regressor_batch(step, number, config, vae, generator)
        predicted = network(images.to(device))
        loss = F.smooth_l1_loss(predicted, strength.to(device), beta=0.1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        log(step, loss=loss, error=(predicted.cpu() - strength).abs().mean())
    return network.eval()
