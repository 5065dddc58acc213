"""Quality table of a benchtop: every part measured on scenes that no stage was trained on.

A row is a value with its floor, its ceiling and its aim; values are reported whatever they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rgbench.benchtop.gold import Gold
from rgbench.benchtop.oracle import ATTRIBUTES, CLASSIFIERS, Oracle, load_oracle, render_and_match, score_reading
from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS, PreferenceConfig
from rgbench.benchtop.scenes import IMAGE_SIZE, Scenes, captions, sample_scenes, scene_batch
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.run import provenance, stream_generator
from rgbench.judge.headroom import picks, within_correlation
from rgbench.judge.models import LCD, load_result_sets
from rgbench.metrics.fid import Moments, frechet_distance
from rgbench.metrics.networks import EffLite0Features
from rgbench.metrics.probes.spectrum import CUTOFF, band_energy, luma_chroma, octave_gaps, power_spectrum, ratio_db
from rgbench.models.pipeline import DiffusionModels, decode_images, load_models
from rgbench.models.presets import PRESETS
from rgbench.rewards.base import Reward
from rgbench.rewards.clip import HPSReward, nyquist
from rgbench.rewards.latent_proxy import PAIRS, LatentCLIP
from rgbench.train.lrm import LRM, correlation, gradient_cosine
from rgbench.train.recipe import PROXY_FOLDER, load_recipe
from rgbench.train.train import train
from tools.benchtop.align import FIRST, student_candidates, student_trainer
from tools.benchtop.clip import CLIP_IMAGE_SIZE, corrupt, preference_pairs
from tools.benchtop.degradations import HELDOUT_DEGRADATIONS, PLANTED, SPREAD, degrade

TEACHER = PRESETS["benchtop"]
REWARD_NYQUIST = nyquist(CLIP_IMAGE_SIZE, IMAGE_SIZE)  # 0.22 cycles/pixel
BATCH, ORACLE_BATCH = 64, 128
TEACHER_BAND = 0.55, 0.80  # of images with all right
NUM_DRAWS = 8  # images of each prompt, to pick from
FIRST_CANDIDATE = FIRST + 10**6  # of pictures that neither students nor the proxy saw
CANDIDATES = ("prediction", "target", "truth")
QUALITY_HEADROOM = "trained reward of real scenes above LCD samples"
PERCENT = 100  # of a cosine, in which results hold the reward
NUM_MATCHED = 256  # images that render-and-match reads, which is slow


@dataclass(frozen=True)
class Row:
    """One value and its bounds.

    Attributes:
        name: what is measured.
        value: None where it could not be measured.
        floor: least acceptable value; None for values that are only reported.
        aim: what is hoped for.
        unit: of value, floor, aim and ceiling.
        ceiling: largest acceptable value.
    """

    name: str
    value: float | None
    floor: float | None = None
    aim: float | None = None
    unit: str = "share"
    ceiling: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the value is within its bounds; a missing value with a bound is not."""
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


def check(
    assets: Path,
    device: torch.device,
    *,
    num: int,
    student: Path | None,
    lrm: Sequence[Path] = (),
    results: Path | None = None,
    say: Callable[[Row], None],
    out: Path | None,
) -> list[Row]:
    """Measure the quality table of a benchtop.

    Args:
        assets: folder of its parts.
        device: where networks run.
        num: scenes per split.
        student: ``pipeline`` folder of a finished LCD run; trained first from the recipe ``lcd`` if None.
        lrm: finished LRM runs, whose proxies are measured as training left them.
        results: folder with LCD seeds, whose spread is the unit of the headroom in quality; None measures no spread.
        say: called with each row as it comes.
        out: JSON file to write, with provenance; None writes nothing.
    """
    rows = []
    for row in _rows(assets, student, lrm, results, num, device):
        say(row)
        rows.append(row)
    if out is not None:
        document = {"schema_version": 1, "num": num, "rows": [r.to_dict() for r in rows]}
        document |= {"provenance": provenance(device.type), "manifest": read_json(assets / "manifest.json")}
        write_json_atomic(out, document)
    return rows


def _rows(
    assets: Path, student: Path | None, lrm: Sequence[Path], results: Path | None, num: int, device: torch.device
) -> Iterator[Row]:
    """All rows, in the order of the stages."""
    oracle = load_oracle(assets / "classifiers", device)
    reward = HPSReward.load(assets / "reward", antialias=True, device=device)
    models = load_models(assets / "teacher", device, torch.float32)
    yield from classifier_rows(oracle, num)
    yield from reward_rows(reward, num)
    yield from vae_rows(models, oracle, reward, num)
    yield from regressor_rows(assets / "regressors", models, num, device)
    samples = {
        split: sample(models, split, num, TEACHER.teacher_steps, TEACHER.teacher_guidance)
        for split in ("test", "heldout")
    }
    yield from teacher_rows(oracle, samples, num)
    scenes = sample_scenes("test", range(num))
    yield from agreement_rows(oracle, samples["test"], scenes, "teacher samples")
    with tempfile.TemporaryDirectory() as folder:
        parts = [f"model={{path: {assets.resolve() / 'teacher'}}}"]
        run = student or train("lcd", parts, out=Path(folder) / "lcd", device=str(device)) / "pipeline"
        for row in student_rows(run, models, oracle, reward, samples["test"], num, device):
            yield row
            if row.name == QUALITY_HEADROOM and row.value is not None and results is not None:
                yield spread_row(row.value, results)
        yield from proxy_rows(assets, assets / "latent_proxy", run / "unet", num, device)
    for run in lrm:
        first, *_ = proxy_rows(assets, run / PROXY_FOLDER, run / "pipeline" / "unet", num, device)
        name = f"{run.name}: pair accuracy of its proxy after training, on its student's candidates"
        yield Row(name, first.value, 0.65)


def student_rows(
    run: Path,
    teacher: DiffusionModels,
    oracle: Oracle,
    reward: Reward,
    teacher_samples: Tensor,
    num: int,
    device: torch.device,
) -> Iterator[Row]:
    """An LCD student against its teacher, and what picking among its own images could bring."""
    models, guidance = load_models(run, device, torch.float32), student_guidance(run.parent)
    scenes = sample_scenes("test", range(num))
    images = sample(models, "test", num, 4, guidance)
    yield from agreement_rows(oracle, images, scenes, "LCD student samples")
    short = sample(teacher, "test", num, 4, TEACHER.teacher_guidance)
    distance, of_teacher = (fd_to_real(x, num, device) for x in (images, short))
    name = "LCD student, 4 steps: FD-EffLite0 over the teacher's at 4 DDIM steps"
    yield Row(name, distance / of_teacher, unit="ratio", ceiling=1.0)
    own, long = (attribute_scores(oracle, x, scenes)["mean"].mean() for x in (images, teacher_samples))
    yield Row("LCD student, 4 steps: mean attribute accuracy, share of the teacher's at 50", float(own / long), 0.97)
    few = range(-(-num * 3 // 8))  # 192 prompts of 512
    draws = [sample(models, "test", len(few), 4, guidance, first=d * len(few)) for d in range(NUM_DRAWS)]
    prompts = captions(scenes[: len(few)], "test", few)
    scores = [attribute_scores(oracle, x, scenes[: len(few)]) for x in draws]
    rewards = torch.stack([score(reward, x, prompts) for x in draws], 1).double().numpy()
    right, mean = (torch.stack([each[key] for each in scores], 1).double().numpy() for key in ("all", "mean"))
    yield from pick_rows(rewards, right, mean)
    real, _ = scene_batch("test", few)
    gap = _mean(score(reward, real, prompts)) - float(rewards.mean())
    yield Row(QUALITY_HEADROOM, gap, unit="cosine")


def spread_row(headroom: float, results: Path) -> Row:
    """The headroom in quality, a cosine, as a multiple of the standard deviation between stored LCD seeds."""
    (found,) = load_result_sets(results)
    column = found.column("hps")
    assert column is not None
    (lcd,) = [model for model in found.models if model.method == LCD and len(model.results) > 1]
    values = [value.value for seed in lcd.results if (value := lcd.result(column, seed)) and value.value is not None]
    name = f"{QUALITY_HEADROOM}, over the standard deviation between {len(values)} LCD seeds"
    return Row(name, PERCENT * headroom / stdev(values), 3.0, unit="sd")


def pick_rows(rewards: np.ndarray, right: np.ndarray, mean: np.ndarray) -> list[Row]:
    """Best-of-n of LCD samples, by the reward and by the oracle, and how they agree within a prompt.

    Args:
        rewards: (P, n) of the trained reward.
        right: 1 where everything is right, else 0.
        mean: the oracle's mean over attributes.
    """
    _, ours, best = picks({"reward": rewards, "right": right}, ["reward", "right"])
    name = f"LCD student, best of {rewards.shape[1]}, all right"
    agreed = within_correlation(rewards, mean)
    return [
        Row(f"{name}: the reward's pick above a random pick", ours.gains["right"].value, 0.06),
        Row(f"{name}: the oracle's pick above a random pick", best.gains["right"].value, 0.12),
        Row(
            "LCD student: correlation of trained reward and oracle's mean within a prompt",
            float(agreed.mean()) if len(agreed) else None,
            0.25,
            unit="r",
        ),
    ]


def regressor_rows(folder: Path, models: DiffusionModels, num: int, device: torch.device) -> list[Row]:
    """Rank correlation of gold's degradation with the strength, within a kind; what gold reads where there is none.

    The bounds are for the kinds that nothing was trained on. Those of reconstructions say how much of a degradation is
    still to be read after the VAE, which repairs a part of it.
    """
    text = "regressors: rank correlation with the strength of"
    if not folder.is_dir():
        return [Row(f"{text} {_words(kind)}", None, 0.85, unit="ρ") for kind in HELDOUT_DEGRADATIONS]
    gold, images = Gold(folder, device), scene_batch("test", range(num))[0]

    def read(x: Tensor) -> Tensor:
        return torch.cat([gold.degradation(batch).cpu() for batch in x.split(ORACLE_BATCH)])

    rows, others = [], []
    for kind in (*HELDOUT_DEGRADATIONS, *TRAINED_DEGRADATIONS, *PLANTED, *SPREAD):
        generator = torch.Generator().manual_seed(4)
        strength = torch.rand(num, generator=generator)
        worse = degrade(images, strength, (kind,), generator)
        value = rank_correlation(read(worse), strength)
        if kind in PLANTED + SPREAD:
            others.append(value)
            continue
        rows.append(Row(f"{text} {_words(kind)}", value, 0.85 if kind in HELDOUT_DEGRADATIONS else None, unit="ρ"))
        rebuilt = rank_correlation(read(reconstruct(models, worse)), strength)
        rows.append(Row(f"{text} {_words(kind)}, VAE reconstructions", rebuilt, unit="ρ"))
    rows += [
        Row(f"{text} {len(others)} other kinds in training, {word}", of(others), unit="ρ")
        for word, of in (("lowest", min), ("mean", fmean))
    ]
    for word, x in (("clean scenes", images), ("VAE reconstructions", reconstruct(models, images))):
        rows.append(Row(f"regressors: mean strength read in {word}", _mean(read(x))))
    return rows


def _words(kind: Callable) -> str:
    return kind.__name__.replace("_", " ")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def classifier_rows(oracle: Oracle, num: int) -> list[Row]:
    """Each attribute classifier on each attribute of clean scenes, and render-and-match."""
    rows = []
    for split in ("test", "heldout"):
        images, scenes = scene_batch(split, range(num))
        readings = [oracle.read(x) for x in images.split(ORACLE_BATCH)]
        for name in CLASSIFIERS:
            scores = score_reading(torch.cat([r[name].cpu() for r in readings]), scenes)
            rows += [Row(f"classifier {name}, {a}, {split} scenes", _mean(scores[a]), 0.99) for a in ATTRIBUTES]
        few = slice(0, min(num, NUM_MATCHED))
        matched = score_reading(render_and_match(images[few], scenes[few].count), scenes[few])
        rows.append(Row(f"render-and-match, mean, {split} scenes", _mean(matched["mean"])))
    return rows


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
            rows.append(Row(f"reward: clean above {_words(kind)}, {split}", wins[-1]))
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
    ours, real = (power_spectrum(luma_chroma(x)[:, 0]).mean(0).numpy() for x in (rebuilt, images))
    gap = ratio_db(band_energy(ours, CUTOFF), band_energy(real, CUTOFF))
    rows = [Row(f"VAE: energy above {CUTOFF} against real", gap, -4.0, 2.0, "dB", 4.0)]
    for octave, gap in octave_gaps(ours, real).items():
        rows.append(Row(f"VAE: energy in octave {octave} against real", gap, -4.0, 2.0, "dB", 4.0))
    return rows


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


def proxy_rows(assets: Path, folder: Path, unet: Path, num: int, device: torch.device) -> list[Row]:
    """Proxy and reward model on what a student and its target predict at all timesteps, and on the truths."""
    changes = [f"model={{path: {assets.resolve() / 'teacher'}}}", f"reward.path={assets.resolve() / 'reward'}"]
    recipe = load_recipe("lrm", [*changes, f"proxy.path={folder.resolve()}", "seed=5"])
    trainer = student_trainer(recipe, unet, device)
    proxy = LatentCLIP.load(folder, device)
    expert, ours, cosines = [], [], []
    num_batches = max(2, 2 * num // recipe.train.batch_size)
    for latents, prompts in student_candidates(trainer, recipe, FIRST_CANDIDATE, num_batches):
        with torch.no_grad():
            images = decode_images(trainer.models.vae, latents)
            expert.append(trainer.expert(images, prompts * 3).view(3, -1).double().cpu())
            ours.append(proxy(latents, prompts * 3).view(3, -1).double().cpu())
        cosines.append(gradient_cosines(trainer, proxy, latents.chunk(3)[0], prompts))
    return agreement_with_expert(torch.cat(ours, 1), torch.cat(expert, 1), torch.cat(cosines))


def agreement_with_expert(ours: Tensor, expert: Tensor, cosines: Tensor) -> list[Row]:
    """The proxy's rows.

    Args:
        ours: (3, N) scores of the proxy, of predictions, targets and truths.
        expert: likewise of the reward model.
        cosines: (N,) of their gradients at the predictions.
    """
    rows, agreed = [], []
    for a, b in PAIRS:
        agreed.append(_mean(((ours[a] > ours[b]) == (expert[a] > expert[b])).float()))
        rows.append(Row(f"latent proxy: pair accuracy, {CANDIDATES[a]} and {CANDIDATES[b]}", agreed[-1]))
    return [
        Row("latent proxy: pair accuracy on an LCD student's candidates", sum(agreed) / len(agreed), 0.68),
        *rows,
        Row(
            "latent proxy: correlation with the reward model over predictions",
            correlation(ours[0], expert[0]),
            0.85,
            unit="r",
        ),
        Row("latent proxy: cosine of its gradient and the reward model's", _mean(cosines), aim=0.1, unit="cosine"),
    ]


def gradient_cosines(trainer: LRM, proxy: LatentCLIP, latents: Tensor, prompts: list[str]) -> Tensor:
    """(B,) cosine between the gradients of proxy and expert, with respect to unscaled latents."""
    slopes = []
    for of in (lambda z: proxy(z, prompts), lambda z: trainer.expert(decode_images(trainer.models.vae, z), prompts)):
        at = latents.detach().clone().requires_grad_(True)
        slopes.append(torch.autograd.grad(of(at).sum(), at)[0])
    return gradient_cosine(*slopes).cpu()


def teacher_rows(oracle: Oracle, samples: dict[str, Tensor], num: int) -> list[Row]:
    """Right attributes of DDIM-50 samples; the teacher must be neither broken nor perfect."""
    rows = []
    for split in samples:
        scenes = sample_scenes(split, range(num))
        found = attribute_scores(oracle, samples[split], scenes)
        floor, ceiling = TEACHER_BAND if split == "test" else (None, None)
        rows.append(Row(f"teacher, DDIM 50: all right, {split} prompts", _mean(found["all"]), floor, ceiling=ceiling))
        rows.append(Row(f"teacher, DDIM 50: mean right, {split} prompts", _mean(found["mean"])))
        for count in (1, 2):
            value = _mean(found["all"][scenes.count == count])
            rows.append(Row(f"teacher, DDIM 50: all right, {count} object(s), {split} prompts", value))
    return rows


def agreement_rows(oracle: Oracle, images: Tensor, scenes: Scenes, name: str) -> list[Row]:
    """Agreement of the attribute classifiers with one another and with render-and-match, on generated images."""
    few = slice(0, NUM_MATCHED)
    scores = oracle.score(images[few], scenes[few], match=True)
    keys = ("agreement", "match_agreement", "mean", "match_mean", *(f"mean:{j}" for j in CLASSIFIERS))
    return [Row(f"oracle on {name}: {k.replace(':', ' of ').replace('_', ' ')}", _mean(scores[k])) for k in keys]


def sample(models: DiffusionModels, split: str, num: int, steps: int, guidance: float, first: int = 0) -> Tensor:
    """(num, 3, 64, 64) images of the captions of scenes 0 … num − 1 of a split, from noises ``first`` and on."""
    prompts = captions(sample_scenes(split, range(num)), split, range(num))
    out = []
    for start in range(0, num, BATCH):
        texts = prompts[start : start + BATCH]
        generators = [stream_generator(0, "world_check", first + start + i) for i in range(len(texts))]
        out.append(models.sample(texts, generators, num_steps=steps, guidance_scale=guidance).cpu())
    return torch.cat(out)


def student_guidance(run: Path) -> float:
    """The guidance a run says its student is sampled with, in the pipelines' form."""
    return float(read_json(run / "run.json")["sampling"]["guidance_scale"])


def fd_to_real(images: Tensor, num: int, device: torch.device) -> float:
    """FD-EffLite0 to scenes of the same captions, rendered elsewhere in the nuisance stream."""
    network = EffLite0Features().to(device)

    def features(x: Tensor) -> np.ndarray:
        return torch.cat([network(b.to(device)).cpu() for b in x.split(BATCH)]).numpy()

    real, _ = scene_batch("test", range(num, 2 * num))
    return frechet_distance(Moments.of(features(images)), Moments.of(features(real)))


@torch.no_grad()
def reconstruct(models: DiffusionModels, images: Tensor) -> Tensor:
    """VAE reconstructions (posterior mean) of images in [0, 1]."""
    out = []
    for x in images.split(BATCH):
        mean, _ = models.encode_images(x)
        out.append(models.decode(mean * models.scaling_factor))
    return torch.cat(out).cpu()


def high_energy(images: Tensor) -> Tensor:
    """(B,) luma energy above 0.22 cycles/pixel, differentiable."""
    luma = luma_chroma(images)[:, 0]
    power = torch.fft.fft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
    f = torch.fft.fftfreq(luma.shape[-1], device=images.device)
    return power[:, torch.hypot(f[:, None], f[None]) > REWARD_NYQUIST].sum(1)


def reward_share(reward: Reward, images: Tensor, reference: Tensor, prompts: list[str]) -> float:
    """Mean reward of images over the mean reward of reference images."""
    return _mean(score(reward, images, prompts)) / _mean(score(reward, reference, prompts))


@torch.no_grad()
def score(reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> Tensor:
    """(B,) rewards of images, or of latents where the reward reads those, in batches."""
    batches = zip(images.split(ORACLE_BATCH), _split(prompts, ORACLE_BATCH), strict=True)
    return torch.cat([reward(x, p).cpu() for x, p in batches])


def attribute_scores(oracle: Oracle, images: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """The oracle's scores in batches, each (B,)."""
    parts = [
        oracle.score(x, scenes[i * ORACLE_BATCH : i * ORACLE_BATCH + len(x)])
        for i, x in enumerate(images.split(ORACLE_BATCH))
    ]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _split(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
