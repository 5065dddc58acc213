"""Align stage: the latent proxy learns its expert's scores before it guides anything.

An LCD student is distilled first. What it predicts at all timesteps, what its target network predicts, and the ground
truths are decoded and scored by the reward model once; the proxy's image tower then regresses the standardised scores
over several epochs. Its text tower becomes the reward model's and stays so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rgbench.data.sources import open_source
from rgbench.models.pipeline import load_models
from rgbench.rewards.clip import read_clip
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.base import StepDraws
from rgbench.train.lrm import LRM
from rgbench.train.recipe import load_recipe
from rgbench.train.train import train
from tools.benchtop.stage import StageLog, linear_decay, set_lr, stage_seed

FIRST = 5_000_000  # of the web's pictures that no student sees


@dataclass(frozen=True)
class AlignConfig:
    """Hyper-parameters of the align stage."""

    seed: int = 0
    student_seed: int = 100
    student_steps: int = 250
    num_batches: int = 240
    epochs: int = 5
    batch_size: int = 64
    lr: float = 3e-4
    weight_decay: float = 0.01


def align_proxy(config: AlignConfig, out: Path, device: torch.device) -> None:
    """Align ``out/proxy`` with ``out/reward``; write ``out/latent_proxy``."""
    parts = [
        f"model={{path: {out.resolve() / 'teacher'}}}",
        f"train.steps={config.student_steps}",
        "train.sample_every=0",
    ]
    student = out / "align" / "student"
    train("lcd", [*parts, f"seed={config.student_seed}"], out=student, device=device.type)
    cache = out / "align" / "candidates.safetensors"
    if not cache.exists():
        reward = [f"reward.path={out / 'reward'}", f"proxy.path={out / 'proxy'}", "proxy.loss=kl"]
        recipe = load_recipe("lrm", [*parts, *reward, f"seed={stage_seed(config.seed, 'candidates', -1)}"])
        _save_candidates(config, recipe, student / "pipeline" / "unet", cache, device)
    proxy = LatentCLIP.load(out / "proxy", "cpu")
    _, expert = read_clip(out / "reward")
    own = proxy.clip.state_dict()
    proxy.clip.load_state_dict(own | {name: expert[name] for name in own if not name.startswith("visual.")})
    fit(proxy, cache, config, StageLog(out / "align.jsonl"))
    proxy.clip.half()
    proxy.eval().save(out / "latent_proxy")


@torch.no_grad()
def _save_candidates(config: AlignConfig, recipe: Any, unet: Path, path: Path, device: torch.device) -> None:
    """Write ``latents`` (3, N, 4, 8, 8) float16 and ``scores`` (3, N), with N prompts in the metadata."""
    trainer = LRM.build(recipe, load_models(recipe.model.teacher_folder(), device, torch.float32))
    weights = UNet2DConditionModel.from_pretrained(unet).float().state_dict()
    for network in (trainer.student, trainer.target):
        network.load_state_dict(weights)
    source, size = open_source(recipe.data), recipe.train.batch_size
    latents, scores, prompts = [], [], []
    for step in range(config.num_batches):
        batch = source.load(list(range(FIRST + step * size, FIRST + (step + 1) * size)))
        inputs = trainer.prepare(batch, StepDraws(recipe.seed, step, size))
        candidates = trainer.candidates(inputs, trainer.distil(inputs), batch.prompts)
        scores.append(trainer.expert_scores(candidates).cpu())
        latents.append(candidates.latents.unflatten(0, (3, size)).half().cpu())
        prompts += batch.prompts
    tensors = {"latents": torch.cat(latents, 1), "scores": torch.cat(scores, 1)}
    save_file(tensors, path, {"prompts": "\n".join(prompts)})


def read_candidates(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Latents (3, N, 4, 8, 8), scores (3, N) and N prompts of a cache."""
    with safe_open(path, "pt") as file:
        prompts = file.metadata()["prompts"].split("\n")
    tensors = load_file(path)
    return tensors["latents"], tensors["scores"], prompts


def fit(proxy: LatentCLIP, cache: Path, config: AlignConfig, log: StageLog) -> None:
    """Regress the standardised scores, a · cosine + b, with a and b learned along."""
    latents, scores, prompts = read_candidates(cache)
    parameters = proxy.unfreeze("all", 0)
    with torch.no_grad():
        cosines = proxy(latents[0, :512].float(), prompts[:512])
    head = nn.Parameter(torch.stack([1 / cosines.std(), -cosines.mean() / cosines.std()]))
    wanted = (scores - scores.mean()) / scores.std()
    optimiser = torch.optim.AdamW(
        [*parameters, head], lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    steps = config.epochs * len(prompts) // config.batch_size
    generator = torch.Generator().manual_seed(stage_seed(config.seed, "align", -1))
    for step in range(steps):
        set_lr(optimiser, config.lr * linear_decay(step, steps))
        rows = torch.randint(len(prompts), (config.batch_size,), generator=generator).tolist()
        cosines = proxy(latents[:, rows].float().flatten(0, 1), [prompts[row] for row in rows] * 3).view(3, -1)
        loss = 0.5 * (head[0] * cosines + head[1] - wanted[:, rows]).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        proxy.clamp_logit_scale()
        log(step, loss=loss)
