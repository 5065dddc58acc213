"""Regressors stage: how degraded is an image? Each architecture trained apart, on known strengths.

Each begins with the trunk of the attribute classifier of its architecture. Half of the images have passed the teacher's
VAE, for a student's images come out of its decoder. Where they were degraded before, the VAE has repaired a part, and
the strength is that of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from rgbench.benchtop.gold import DegradationRegressor
from rgbench.benchtop.oracle import CLASSIFIERS, load_classifier
from rgbench.benchtop.scenes import scene_batch
from tools.benchtop.degradations import KINDS, degrade
from tools.benchtop.stage import StageLog, autocast, linear_decay, set_lr, stage_seed

FIRST = 5 * 10**8  # of the scenes that no other stage sees
CHUNK = 64  # images that the VAE takes at once


@dataclass(frozen=True)
class RegressorConfig:
    """Hyper-parameters of the regressors; ``steps`` by architecture, ``num_decoded`` scenes through the VAE."""

    seed: int = 0
    steps: dict[str, int] = field(default_factory=lambda: {"resnet": 2600, "vit": 2200, "convnext": 2800})
    batch_size: int = 32
    lr: float = 1e-3
    clean: float = 0.25
    num_decoded: int = 2048
    dtype: str = "bf16"


@dataclass(frozen=True)
class Decoded:
    """What the VAE makes of N scenes.

    Attributes:
        clean: (N, 3, 64, 64) of the scenes.
        degraded: (N, 3, 64, 64) of the scenes after they were degraded.
        strength: (N,) what is left of the degradation.
    """

    clean: Tensor
    degraded: Tensor
    strength: Tensor


@torch.no_grad()
def decoded_scenes(config: RegressorConfig, vae: AutoencoderKL) -> Decoded:
    """Scenes through the VAE, as they are and degraded.

    A degradation's strength falls by the share of it that the VAE repairs: that of the root mean square of what it
    changed in the image.
    """
    generator = torch.Generator().manual_seed(stage_seed(config.seed, "regressors", -1))
    parts = []
    for start in range(0, config.num_decoded, CHUNK):
        scenes, _ = scene_batch("all", range(FIRST + start, FIRST + min(start + CHUNK, config.num_decoded)))
        strength = draw_strength(len(scenes), config, generator)
        worse = degrade(scenes, strength, KINDS, generator)
        clean, degraded = (through(vae, x) for x in (scenes, worse))
        was, left = ((a - b).pow(2).mean((1, 2, 3)).sqrt() for a, b in ((worse, scenes), (degraded, clean)))
        parts.append((clean.half(), degraded.half(), strength * (left / was.clamp(min=1e-6)).clamp(max=1)))
    return Decoded(*(torch.cat(each) for each in zip(*parts, strict=True)))


def draw_strength(n: int, config: RegressorConfig, generator: torch.Generator) -> Tensor:
    """(n,) strengths: 0 with probability ``clean``, else uniform in (0, 1)."""
    return torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) >= config.clean)


def through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Reconstructions (posterior mean) of images (B, 3, 64, 64) in [0, 1]."""
    return (vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)


def regressor_batch(
    step: int, number: int, config: RegressorConfig, decoded: Decoded, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(B, 3, 64, 64) images and (B,) strengths.

    Half are fresh scenes, the rest decoded by the VAE; an eighth was degraded before it, all others are after.
    """
    n = config.batch_size
    fresh = n // 2
    start = FIRST * (number + 2) + step * fresh
    scenes, _ = scene_batch("all", range(start, start + fresh))
    chosen = torch.randint(len(decoded.clean), (n - fresh,), generator=generator)
    before, after = chosen[: n // 8], chosen[n // 8 :]
    images = torch.cat([scenes, decoded.clean[after].float()])
    strength = draw_strength(len(images), config, generator)
    images = torch.cat([degrade(images, strength, KINDS, generator), decoded.degraded[before].float()])
    return images, torch.cat([strength, decoded.strength[before]])


def train_regressors(config: RegressorConfig, out: Path, device: torch.device) -> None:
    """Train all regressors; write ``out/regressors/{name}/model.safetensors`` in fp16."""
    vae = AutoencoderKL.from_pretrained(out / "teacher" / "vae").eval().requires_grad_(False)
    decoded = decoded_scenes(config, vae)
    for number, name in enumerate(CLASSIFIERS):
        folder = out / "regressors" / name
        if not (folder / "model.safetensors").exists():
            network = train_regressor(name, number, config, decoded, out, device)
            folder.mkdir(parents=True, exist_ok=True)
            state = {k: v.contiguous().cpu() for k, v in network.state_dict().items()}
            state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
            save_file(state, folder / "model.safetensors")


def train_regressor(
    name: str, number: int, config: RegressorConfig, decoded: Decoded, out: Path, device: torch.device
) -> DegradationRegressor:
    torch.manual_seed(stage_seed(config.seed, f"regressor_{name}", -1))
    network = DegradationRegressor(name)
    network.backbone.load_state_dict(load_classifier(out / "classifiers" / name).backbone.state_dict())
    nn.init.zeros_(network.head.weight)  # a random head on the trunk's large features starts far off
    network.to(device).to(memory_format=torch.channels_last).train()
    lr = config.lr * (0.5 if name == "vit" else 1.0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    log = StageLog(out / f"regressor_{name}.jsonl")
    for step in range(config.steps[name]):
        generator = torch.Generator().manual_seed(stage_seed(config.seed, f"regressor_{name}", step))
        set_lr(optimiser, lr * linear_decay(step, config.steps[name]))
        images, strength = regressor_batch(step, number, config, decoded, generator)
        with autocast(device, config.dtype):
            predicted = network(images.to(device, memory_format=torch.channels_last)).float()
        loss = F.smooth_l1_loss(predicted, strength.to(device), beta=0.1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        log(step, loss=loss, error=(predicted.detach().cpu() - strength).abs().mean())
    return network.eval()
