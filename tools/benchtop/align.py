"""Align stage: the latent proxy learns its expert's scores before it guides anything.

An LCD student is distilled first. What it and its target network predict at all timesteps, and the ground truths, are
decoded once; the proxy's image tower then regresses the reward model's score of each image with every prompt of a
batch, in cycles: a second one on more candidates took pair accuracy from .66 to over .68. Its text tower becomes the
reward model's and stays so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rgbench.core.io import sha256_tree
from rgbench.data.sources import open_source
from rgbench.models.pipeline import decode_images, load_models
from rgbench.rewards.clip import HPSReward, read_clip, unit
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.base import StepDraws
from rgbench.train.lrm import LRM
from rgbench.train.recipe import load_recipe
from rgbench.train.train import train
from tools.benchtop.clip import update
from tools.benchtop.stage import StageLog, digest, linear_decay, set_lr, stage_seed

FIRST = 5_000_000  # of the web's pictures that no student sees


@dataclass(frozen=True)
class AlignConfig:
    """Hyper-parameters of the align stage; each of ``cycles`` is (batches of candidates, steps, learning rate)."""

    seed: int = 0
    student_seed: int = 100
    student_steps: int = 250
    num_batches: int = 1200
    cycles: tuple[tuple[int, int, float], ...] = ((300, 600, 1e-3), (1200, 600, 5e-4))
    batch_size: int = 64
    weight_decay: float = 0.05


def align_proxy(config: AlignConfig, out: Path, device: torch.device) -> None:
    """Align ``out/proxy`` with ``out/reward``; write ``out/latent_proxy``.

    Student and candidates are kept in ``out`` between calls.
    """
    parts = [
        f"model={{path: {out.resolve() / 'teacher'}}}",
        f"train.steps={config.student_steps}",
        "train.sample_every=0",
    ]
    kept = candidates_folder(config, out)
    student, cache = kept / "student", kept / "candidates.safetensors"
    train("lcd", [*parts, f"seed={config.student_seed}"], out=student, device=device.type)
    if not cache.exists():
        reward = [f"reward.path={out / 'reward'}", f"proxy.path={out / 'proxy'}", "proxy.loss=kl"]
        recipe = load_recipe("lrm", [*parts, *reward, f"seed={stage_seed(config.seed, 'candidates', -1)}"])
        _save_candidates(config, recipe, student / "pipeline" / "unet", cache, device)
    proxy = LatentCLIP.load(out / "proxy", "cpu")
    _, expert = read_clip(out / "reward")
    own = proxy.clip.state_dict()
    proxy.clip.load_state_dict(own | {name: expert[name] for name in own if not name.startswith("visual.")})
    data = {name: value.float() for name, value in load_file(cache).items()}
    log = StageLog(out / "align.jsonl")
    for cycle in range(len(config.cycles)):
        fit(proxy, data, config, cycle, log)
    proxy.clip.half()
    proxy.eval().save(out / "latent_proxy")


def candidates_folder(config: AlignConfig, out: Path) -> Path:
    """Where student and candidates are kept: under the digest of what they are made from."""
    inputs = [sha256_tree(out / name) for name in ("teacher", "reward")]
    settings = {name: getattr(config, name) for name in ("seed", "student_seed", "student_steps", "num_batches")}
    return out / f"align-{digest(inputs, settings)}"


def student_trainer(recipe: Any, unet: Path, device: torch.device) -> LRM:
    """The trainer of an LRM recipe, with a finished student as student and target."""
    trainer = LRM.build(recipe, load_models(recipe.model.teacher_folder(), device, torch.float32))
    weights = UNet2DConditionModel.from_pretrained(unet).float().state_dict()
    for network in (trainer.student, trainer.target):
        network.load_state_dict(weights)
    return trainer


def student_candidates(trainer: LRM, recipe: Any, first: int, num_batches: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Unscaled latents (3 · B, 4, 8, 8) of prediction, target and truth at all timesteps, and B prompts.

    Args:
        trainer: with the student.
        recipe: its own.
        first: of the pictures.
        num_batches: how many.
    """
    source, size = open_source(recipe.data), recipe.train.batch_size
    for step in range(num_batches):
        with torch.no_grad():
            batch = source.load(list(range(first + step * size, first + (step + 1) * size)))
            inputs = trainer.prepare(batch, StepDraws(recipe.seed, step, size))
            latents = trainer.candidates(inputs, trainer.distil(inputs), batch.prompts).latents
        yield latents, batch.prompts


@torch.no_grad()
def _save_candidates(config: AlignConfig, recipe: Any, unet: Path, path: Path, device: torch.device) -> None:
    """Write ``latents`` (3, N, 4, 8, 8), unit ``images`` (3, N, D) and ``texts`` (N, D) of the reward, in float16."""
    trainer = student_trainer(recipe, unet, device)
    size, expert = recipe.train.batch_size, cast(HPSReward, trainer.expert)
    parts: dict[str, list[Tensor]] = {"latents": [], "images": [], "texts": []}
    for latents, prompts in student_candidates(trainer, recipe, FIRST, config.num_batches):
        pixels = expert.preprocess(decode_images(trainer.models.vae, latents))
        parts["latents"].append(latents.unflatten(0, (3, size)).cpu())
        parts["images"].append(unit(expert.model.encode_image(pixels)).unflatten(0, (3, size)).cpu())
        parts["texts"].append(expert.text_features(prompts).cpu())
    dims = {"latents": 1, "images": 1, "texts": 0}
    save_file({name: torch.cat(rows, dims[name]).half().contiguous() for name, rows in parts.items()}, path)


def fit(proxy: LatentCLIP, data: dict[str, Tensor], config: AlignConfig, cycle: int, log: StageLog) -> None:
    """Regress the scores of all images with all prompts of a batch; an image's own prompt counts as all others."""
    num_batches, steps, lr = config.cycles[cycle]
    num = num_batches * len(data["texts"]) // config.num_batches
    spread = (data["images"][:, :num] * data["texts"][:num]).sum(-1).std()
    parameters = proxy.unfreeze("all", 0)
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(stage_seed(config.seed, "align", cycle - 1))
    for step in range(steps):
        set_lr(optimiser, lr * linear_decay(step, steps))
        rows = torch.randint(num, (config.batch_size,), generator=generator)
        found = proxy.encode_latents(data["latents"][:, rows].flatten(0, 1)).unflatten(0, (3, len(rows)))
        errors = (found - data["images"][:, rows]) @ data["texts"][rows].T / spread  # (3, B, B)
        own = errors.diagonal(dim1=1, dim2=2)
        loss = 0.5 * own.square().mean() + 0.5 * errors.square().mean()
        update(proxy.clip, optimiser, loss)
        log(step, cycle=cycle, loss=loss, own=own.square().mean().sqrt())
    proxy.clip.half().float()  # as it is stored
