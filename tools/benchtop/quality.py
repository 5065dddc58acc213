"""The quality a benchtop world must reach, measured on scenes that no stage trained on.

Each function measures some rows; a row is a figure, its floor and its aim. The measured
figure is reported as it is, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rgbench.benchtop.oracle import ATTRIBUTES, JUDGES, Oracle, render_and_match, score_reading
from rgbench.benchtop.preferences import HELDOUT_DEGRADATIONS, PreferenceConfig, corrupt, degrade
from rgbench.benchtop.scenes import IMAGE_SIZE, Scenes, captions, sample_scenes, scene_batch
from rgbench.metrics.probes.spectrum import CUTOFF, band_energy, luma_chroma, octave_gaps, power_spectrum, ratio_db
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.base import Reward
from rgbench.rewards.clip import nyquist
from tools.benchtop.clip import preference_pairs

REWARD_NYQUIST = nyquist(28, IMAGE_SIZE)


@dataclass(frozen=True)
class Row:
    """One measured figure against what it must reach.

    Attributes:
        name: what is measured.
        value: the figure; None where it could not be measured.
        floor: least acceptable value; None for figures that are only reported.
        aim: what is hoped for.
        unit: of value, floor and aim.
        ceiling: largest acceptable value, for two-sided rows.
    """

    name: str
    value: float | None
    floor: float | None = None
    aim: float | None = None
    unit: str = "share"
    ceiling: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the figure is within its bounds; a missing figure with a bound is not."""
        if self.floor is None and self.ceiling is None:
            return True
        if self.value is None:
            return False
        above = self.floor is None or self.value >= self.floor
        return above and (self.ceiling is None or self.value <= self.ceiling)

    def __str__(self) -> str:
        bounds = [f"{sign} {b:g}" for sign, b in (("≥", self.floor), ("≤", self.ceiling)) if b is not None]
        value = "—" if self.value is None else f"{self.value:.4f}"
        return f"{'ok' if self.ok else 'SHORT':6}{value:>9} {self.unit:6} {', '.join(bounds):12} {self.name}"

    def to_dict(self) -> dict:
        return {**asdict(self), "ok": self.ok}


def judge_rows(oracle: Oracle, num: int) -> list[Row]:
    """Each judge on each attribute of clean scenes, and render-and-match."""
    rows = []
    for split in ("test", "heldout"):
        images, scenes = scene_batch(split, range(num))
        readings = [oracle.read(x) for x in images.split(128)]
        floor = 0.99
        for name in JUDGES:
            scores = score_reading(torch.cat([r[name].cpu() for r in readings]), scenes)
            rows += [Row(f"judge {name}, {a}, {split} scenes", _mean(scores[a]), floor) for a in ATTRIBUTES]
        few = slice(0, min(num, 256))
        matched = score_reading(render_and_match(images[few], scenes[few].count), scenes[few])
        rows.append(Row(f"render-and-match, mean, {split} scenes", _mean(matched["mean"])))
    return rows


@torch.no_grad()
def reconstruct(models: DiffusionModels, images: Tensor) -> Tensor:
    """VAE reconstructions (posterior mean) of images in [0, 1]."""
    out = []
    for x in images.split(64):
        mean, _ = models.encode_images(x)
        out.append(models.decode(mean * models.scaling_factor))
    return torch.cat(out).cpu()


def vae_rows(models: DiffusionModels, oracle: Oracle, reward: Reward, num: int) -> list[Row]:
    """Reconstructions: oracle accuracy, band energies, trained reward."""
    rows = []
    for split, bound in (("test", True), ("heldout", False)):
        images, scenes = scene_batch(split, range(num))
        rebuilt = reconstruct(models, images)
        mean = _mean(oracle.score(rebuilt, scenes)["mean"])
        rows.append(Row(f"VAE: oracle accuracy, mean, {split}", mean, 0.95 if bound else None, 0.98))
        share = reward_share(reward, rebuilt, images, captions(scenes, split, range(num)))
        rows.append(Row(f"VAE: trained reward, share of the scenes', {split}", share, 0.90 if bound else None, 0.97))
        if bound:
            rows += spectrum_rows(rebuilt, images)
            psnr = -10 * (rebuilt - images).pow(2).mean((1, 2, 3)).log10()
            rows.append(Row("VAE: PSNR", _mean(psnr), unit="dB"))
    rows.append(Row("VAE: decoder's reach above 0.22", decoder_reach_db(models), 6.0, unit="dB"))
    return rows


def spectrum_rows(rebuilt: Tensor, images: Tensor) -> list[Row]:
    """Luma energy of reconstructions against the scenes', above 0.25 cycles/pixel and per octave."""
    height, width = images.shape[-2:]
    ours, real = (power_spectrum(luma_chroma(x)[:, 0]).mean(0).numpy() for x in (rebuilt, images))
    gap = ratio_db(band_energy(ours, height, width, CUTOFF), band_energy(real, height, width, CUTOFF))
    rows = [Row(f"VAE: energy above {CUTOFF} against real", gap, -4.0, 2.0, "dB", 4.0)]
    for octave, gap in octave_gaps(ours, real, height, width).items():
        rows.append(Row(f"VAE: energy in octave {octave} against real", gap, -4.0, 2.0, "dB", 4.0))
    return rows


def reward_share(reward: Reward, images: Tensor, reference: Tensor, prompts: list[str]) -> float:
    """Mean reward of images over the mean reward of reference images."""
    return _mean(score(reward, images, prompts)) / _mean(score(reward, reference, prompts))


@torch.no_grad()
def score(reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> Tensor:
    """(B,) rewards of images, or of latents where the reward reads those, in batches of 128."""
    batches = zip(images.split(128), _split(prompts, 128), strict=True)
    return torch.cat([reward(x, p).cpu() for x, p in batches])


def decoder_reach_db(models: DiffusionModels, steps: int = 60) -> float:
    """How far ascent on latents raises the energy above the reward model's Nyquist limit.

    Adam on 32 latents, each held to the norm it started with; the gain in dB over the
    scenes' own energy above 0.22 cycles/pixel.
    """
    images, _ = scene_batch("test", range(32))
    mean, _ = models.encode_images(images)
    latents = (mean * models.scaling_factor).detach().clone()
    norm = latents.flatten(1).norm(dim=1)[:, None, None, None]
    latents.requires_grad_(True)
    optimiser = torch.optim.Adam([latents], lr=0.1)
    for _ in range(steps):
        decoded = models.vae.decode(latents / models.scaling_factor).sample / 2 + 0.5
        optimiser.zero_grad()
        (-high_energy(decoded.clamp(0, 1)).log().mean()).backward()
        optimiser.step()
        with torch.no_grad():
            latents.mul_(norm / latents.flatten(1).norm(dim=1)[:, None, None, None])
    reached = high_energy(models.decode(latents.detach()))
    return float(10 * (reached.mean() / high_energy(images).mean()).log10())


def high_energy(images: Tensor) -> Tensor:
    """(B,) luma energy above 0.22 cycles/pixel, differentiable."""
    luma = luma_chroma(images)[:, 0]
    power = torch.fft.fft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
    f = torch.fft.fftfreq(luma.shape[-1], device=images.device)
    return power[:, torch.hypot(f[:, None], f[None]) > REWARD_NYQUIST].sum(1)


def reward_rows(reward: Reward, num: int) -> list[Row]:
    """Clean, right images above degraded ones and above wrong captions; simulated choices."""
    rows = []
    for split, bound in (("test", True), ("heldout", False)):
        generator = torch.Generator().manual_seed(1)
        images, scenes = scene_batch(split, range(num))
        prompts = captions(scenes, split, range(num))
        clean = score(reward, images, prompts)
        wins = []
        for kind in HELDOUT_DEGRADATIONS:
            strength = 0.3 + 0.7 * torch.rand(num, generator=generator)
            worse = score(reward, degrade(images, strength, (kind,), generator), prompts)
            wins.append(_mean((clean > worse).float()))
            rows.append(Row(f"reward: clean above {kind.__name__.replace('_', ' ')}, {split}", wins[-1]))
        wrong = corrupt(scenes, torch.ones(num, dtype=torch.long), generator)
        worse = score(reward, images, captions(wrong, split, range(num, 2 * num)))
        wins.append(_mean((clean > worse).float()))
        rows.append(Row(f"reward: right above one-attribute-wrong caption, {split}", wins[-1]))
        total = (sum(wins[:-1]) / len(wins[:-1]) + wins[-1]) / 2
        rows.append(Row(f"reward: clean above degraded or wrong-caption, {split}", total, 0.90 if bound else None))
    scenes = sample_scenes("test", range(num))
    pair, first, _ = preference_pairs(scenes, 10**6, PreferenceConfig(), torch.Generator().manual_seed(2))
    prompts = captions(scenes, "test", range(num))
    agreed = (score(reward, pair[0], prompts) > score(reward, pair[1], prompts)) == first
    rows.append(Row("reward: agreement with simulated choices (flips included)", _mean(agreed.float())))
    return rows


def attribute_scores(oracle: Oracle, images: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """The oracle's scores in batches, each (B,)."""
    parts = [oracle.score(x, scenes[i * 128 : i * 128 + len(x)]) for i, x in enumerate(images.split(128))]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def teacher_rows(models: DiffusionModels, oracle: Oracle, samples: dict[str, Tensor], num: int) -> list[Row]:
    """DDIM-50 samples against reconstructions of the same scenes, per object count."""
    rows = []
    for split, bound in (("test", True), ("heldout", False)):
        images, scenes = scene_batch(split, range(num))
        rebuilt = attribute_scores(oracle, reconstruct(models, images), scenes)
        sampled = attribute_scores(oracle, samples[split], scenes)
        for count in (1, 2):
            own = scenes.count == count
            for key, floor, aim in (("mean", 0.95, 0.99), ("all", 0.85, 0.95)):
                value = _mean(sampled[key][own]) / _mean(rebuilt[key][own])
                name = f"teacher, DDIM 50: {key} right, {count} object(s), share of reconstructions', {split}"
                rows.append(Row(name, value, floor if bound else None, aim))
                rows.append(Row(name.replace("share of reconstructions'", "absolute"), _mean(sampled[key][own])))
    return rows


def agreement_rows(oracle: Oracle, images: Tensor, scenes: Scenes, name: str) -> list[Row]:
    """How far the judges and render-and-match agree on generated images."""
    scores = oracle.score(images, scenes, match=True)
    keys = ("agreement", "match_agreement", "mean", "match_mean", *(f"mean:{j}" for j in JUDGES))
    return [Row(f"oracle on {name}: {k.replace(':', ' of ').replace('_', ' ')}", _mean(scores[k])) for k in keys]


def _split(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
