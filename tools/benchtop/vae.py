"""Autoencoder of the benchtop: Stable Diffusion's losses at 1/8 scale, in two stages.

``train_vae`` trains encoder and decoder on L1 + perceptual + KL (Rombach et al. 2022, appendix G). ``train_texture``
freezes the encoder, so that latents and all that is trained on them stay valid, and adds the patch-adversarial term
(hinge, weighted by the ratio of gradient norms at the reconstruction, Esser et al. 2021, eq. 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from rgbench.metrics.networks import load_efflite0
from tools.benchtop.stage import StageLog, autocast, linear_decay, set_lr, stage_seed, training_scenes

VAE_CONFIG = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}


@dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters of the reconstruction stage."""

    seed: int = 0
    steps: int = 3000
    batch_size: int = 32
    lr: float = 2e-3
    perceptual_weight: float = 0.05
    kl_weight: float = 2e-4  # on the mean over latent elements
    dtype: str = "bf16"


@dataclass(frozen=True)
class TextureConfig:
    """Hyper-parameters of the adversarial stage.

    The decoder rests for the first ``discriminator_steps`` of the ``steps``: against an untrained discriminator it
    would wander, and the discriminator would never catch up.
    """

    seed: int = 0
    steps: int = 1200
    discriminator_steps: int = 100
    batch_size: int = 32
    lr: float = 2e-4
    discriminator_lr: float = 5e-4
    perceptual_weight: float = 0.05
    adversarial_weight: float = 0.5
    dtype: str = "bf16"


class PerceptualLoss(nn.Module):
    """LPIPS-style distance (Zhang et al. 2018) on EfficientNet-Lite0 stages of stride 2, 4, 8."""

    def __init__(self) -> None:
        super().__init__()
        network: Any = load_efflite0()
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = nn.ModuleList(network.blocks[:3])

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.stem((images * 255 - 127) / 128)
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x / (x.pow(2).sum(1, keepdim=True) + 1e-4).sqrt())
        return out

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(reference)
        terms = [(a - b).pow(2).sum(1).mean() for a, b in zip(self.features(images), target, strict=True)]
        return torch.stack(terms).sum()


class PatchDiscriminator(nn.Module):
    """Patch discriminator (Isola et al. 2017), its first layer at full resolution: (B, 3, H, W) → (B, 1, H/4, W/4)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 3 * width, 4, 2, 1),
            nn.GroupNorm(8, 3 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(3 * width, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _reconstruction_loss(images: Tensor, decoded: Tensor, perceptual: PerceptualLoss, weight: float) -> Tensor:
    l1 = (decoded - 2 * images + 1).abs().mean()
    return l1 + weight * perceptual(decoded / 2 + 0.5, images)


def train_vae(config: VAEConfig, out: Path, device: torch.device) -> None:
    """Train encoder and decoder on all scenes; write ``out/vae`` with its scaling factor."""
    torch.manual_seed(stage_seed(config.seed, "vae", -1))
    vae = AutoencoderKL(**VAE_CONFIG).to(device)
    perceptual = PerceptualLoss().to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    log = StageLog(out / "vae.jsonl")
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "vae", step))
        set_lr(optimiser, config.lr * linear_decay(step, config.steps))
        images, _, _ = training_scenes("all", step, config.batch_size, device)
        with autocast(device, config.dtype):
            posterior = vae.encode(2 * images - 1).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            loss = _reconstruction_loss(images, decoded.float(), perceptual, config.perceptual_weight)
            kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimiser.zero_grad(set_to_none=True)
        (loss + config.kl_weight * kl).backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        mse = (decoded.detach().float() / 2 + 0.5 - images).pow(2).mean()
        log(step, loss=loss, kl=kl, psnr_db=-10 * mse.log10(), grad_norm=norm)
    vae.register_to_config(scaling_factor=_latent_scaling_factor(vae, device))
    vae.eval().cpu().save_pretrained(out / "vae")


@torch.no_grad()
def _latent_scaling_factor(vae: AutoencoderKL, device: torch.device) -> float:
    """1 / standard deviation of sampled latents, over 512 training scenes."""
    images, _, _ = training_scenes("train", 0, 512, device)
    std = torch.cat([vae.encode(2 * x - 1).latent_dist.mean for x in images.split(64)]).std()
    return round(1 / float(std), 5)


def train_texture(config: TextureConfig, out: Path, device: torch.device) -> None:
    """Train the decoder of ``out/vae`` further with the adversarial term; write ``out/vae_texture``."""
    vae = AutoencoderKL.from_pretrained(out / "vae").to(device).requires_grad_(False)
    torch.manual_seed(stage_seed(config.seed, "vae_texture", -1))
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    perceptual = PerceptualLoss().to(device)
    discriminator = PatchDiscriminator().to(device)
    optimiser = torch.optim.AdamW(decoder, lr=config.lr, betas=(0.5, 0.99), weight_decay=1e-4)
    optimiser_d = torch.optim.AdamW(discriminator.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.99))
    log = StageLog(out / "vae_texture.jsonl")
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "vae_texture", step))
        factor = min(1.0, 2 * linear_decay(step, config.steps))
        set_lr(optimiser, config.lr * factor)
        set_lr(optimiser_d, config.discriminator_lr * factor)
        images, _, _ = training_scenes("all", step, config.batch_size, device)
        with autocast(device, config.dtype):
            with torch.no_grad():
                latents = vae.encode(2 * images - 1).latent_dist.sample()
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        rec, adv, weight = _adversarial_backward(images, decoded, perceptual, discriminator, config)
        norm = nn.utils.clip_grad_norm_(decoder, 1.0)
        if step >= config.discriminator_steps:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        real, fake = discriminator(2 * images - 1), discriminator(decoded.detach())
        loss_d = (F.relu(1 - real) + F.relu(1 + fake)).mean()
        optimiser_d.zero_grad(set_to_none=True)
        loss_d.backward()
        optimiser_d.step()
        gap = _high_pass_energy_db(decoded.detach() / 2 + 0.5, images)
        log(step, loss=rec, adversarial=adv, weight=weight, discriminator=loss_d, grad_norm=norm, high_pass_db=gap)
    vae.eval().cpu().save_pretrained(out / "vae_texture")


def _adversarial_backward(
    images: Tensor, decoded: Tensor, perceptual: PerceptualLoss, discriminator: nn.Module, config: TextureConfig
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = decoded.detach().requires_grad_(True)
    rec = _reconstruction_loss(images, leaf, perceptual, config.perceptual_weight)
    (grad_rec,) = torch.autograd.grad(rec, leaf)
    adv = -discriminator(leaf).mean()
    (grad_adv,) = torch.autograd.grad(adv, leaf)
    weight = config.adversarial_weight * (grad_rec.norm() / (grad_adv.norm() + 1e-8)).clamp(max=1e4)
    decoded.backward(grad_rec + weight * grad_adv)
    return rec.detach(), adv.detach(), weight


def _high_pass_energy_db(images: Tensor, reference: Tensor) -> Tensor:
    """Energy ratio of the Laplacian's fine band in dB: a cheap value for the log."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]

    def energy(x: Tensor) -> Tensor:
        return F.conv2d(x.mean(1, keepdim=True), kernel).pow(2).mean()

    return 10 * (energy(images) / energy(reference)).log10()
