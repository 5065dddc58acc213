"""Proxy stage: contrastive pre-training of the latent CLIP on (latent, caption) pairs.

The text tower starts from the CLIP's; the image tower reads 4×8×8 latents. Same loss and
hard negatives as the CLIP stage: the expert's preferences come only later, in ``lrm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from rgbench.benchtop.scenes import captions, sample_scenes
from rgbench.rewards.latent_proxy import LatentCLIP
from tools.benchtop.clip import contrastive_loss, hard_negatives, scene_key, update, weight_groups
from tools.benchtop.common import StageLog, autocast, linear_decay, set_lr, stage_seed

VISION_CONFIG = {"image_size": 8, "patch_size": 1, "layers": 4, "width": 96, "head_width": 24}


@dataclass(frozen=True)
class ProxyConfig:
    """Hyper-parameters of the proxy's pre-training."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 128
    lr: float = 1e-3
    dtype: str = "fp32"


def train_proxy(config: ProxyConfig, out: Path, device: torch.device) -> None:
    """Train on the cached latents of the latents stage; write ``out/latent_proxy``."""
    scale = float(AutoencoderKL.load_config(out / "vae")["scaling_factor"])
    cache = load_file(out / "latents.safetensors")
    torch.manual_seed(stage_seed(config.seed, "proxy", -1))
    proxy = LatentCLIP.from_clip(out / "clip", VISION_CONFIG, latent_channels=4, latent_scale=scale).to(device).train()
    optimiser = torch.optim.AdamW(weight_groups(proxy.clip, 0.05), lr=config.lr, betas=(0.9, 0.98))
    log = StageLog(out / "proxy.jsonl")
    n = len(cache["mean"])
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "proxy", step))
        generator = torch.Generator().manual_seed(stage_seed(config.seed, "proxy_negatives", step))
        set_lr(optimiser, config.lr * linear_decay(step, config.steps))
        index = np.random.default_rng(stage_seed(config.seed, "proxy_batch", step)).integers(n, size=config.batch_size)
        mean, std = (cache[k][torch.from_numpy(index)].float() for k in ("mean", "std"))
        latents = (mean + std * torch.randn(mean.shape)).to(device)
        scenes = sample_scenes("train", index)
        texts = captions(scenes, "train", index + n * (1 + step))
        wrong, wrong_texts = hard_negatives(scenes, generator)
        with autocast(device, config.dtype):
            image, text = proxy.encode_latents(latents), proxy.encode_texts(texts + wrong_texts)
        key = scene_key(scenes).to(device)
        text_key = torch.cat([key, scene_key(wrong).to(device)])
        loss = contrastive_loss(image.float(), text.float(), proxy.logit_scale(), key, text_key)
        update(proxy.clip, optimiser, loss)
        hit = (image @ text[: len(image)].T).argmax(1)
        log(step, loss=loss, retrieval=(key[hit] == key).float().mean(), logit_scale=proxy.logit_scale())
    proxy.clip.half()
    proxy.eval().save(out / "latent_proxy")
