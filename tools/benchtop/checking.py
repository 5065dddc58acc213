"""``python -m tools.benchtop check``: measures the quality table of a world and writes it down."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.preferences import HELDOUT_DEGRADATIONS, TRAINED_DEGRADATIONS, PreferenceConfig
from rgbench.benchtop.scenes import captions, sample_scenes, scene_batch
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.run import provenance, stream_generator
from rgbench.metrics.fid import Moments, frechet_distance
from rgbench.metrics.networks import EffLite0Features
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.models.presets import PRESETS
from rgbench.rewards.base import Reward
from rgbench.rewards.clip import HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.train import train
from tools.benchtop.clip import preference_pairs
from tools.benchtop.quality import (
    Row,
    agreement_rows,
    attribute_scores,
    judge_rows,
    reward_rows,
    score,
    teacher_rows,
    vae_rows,
)

TEACHER = PRESETS["benchtop"]
BATCH = 64


def measure(assets: Path, student: Path | None, num: int, device: torch.device) -> Iterator[Row]:
    """Every row of the quality table, in the order of the stages.

    Args:
        assets: folder of the world's parts.
        student: a finished LCD run's ``pipeline``; trained here from ``lcd.yaml`` if None.
        num: scenes per split.
        device: where networks run.
    """
    oracle = load_oracle(assets / "judges", device)
    reward = HPSReward.load(assets / "reward", antialias=True, device=device)
    models = load_models(assets / "teacher", device, torch.float32)
    yield from judge_rows(oracle, num)
    yield from reward_rows(reward, num)
    yield from vae_rows(models, oracle, reward, num)
    yield from proxy_rows(LatentCLIP.load(assets / "latent_proxy", device), models, reward, num)
    samples = {
        split: sample(models, split, num, TEACHER.teacher_steps, TEACHER.teacher_guidance)
        for split in ("test", "heldout")
    }
    yield from teacher_rows(models, oracle, samples, num)
    scenes = sample_scenes("test", range(num))
    few = min(num, 256)
    yield from agreement_rows(oracle, samples["test"][:few], scenes[slice(0, few)], "teacher samples")
    with tempfile.TemporaryDirectory() as folder:
        run = student or train("lcd", [], out=Path(folder) / "lcd", device=str(device)) / "pipeline"
        images = sample(load_models(run, device, torch.float32), "test", num, 4, student_guidance(run.parent))
    yield from agreement_rows(oracle, images[:few], scenes[slice(0, few)], "LCD student samples")
    short = sample(models, "test", num, 4, TEACHER.teacher_guidance)
    distance, teacher_distance = (fd_to_real(x, num, device) for x in (images, short))
    yield Row("LCD student, 4 steps: FD-EffLite0 over the teacher's at 4 DDIM steps", distance / teacher_distance,
              unit="ratio", ceiling=1.0)  # fmt: skip
    own, reference = (attribute_scores(oracle, x, scenes)["mean"].mean() for x in (images, samples["test"]))
    yield Row(
        "LCD student, 4 steps: mean attribute accuracy, share of the teacher's at 50", float(own / reference), 0.95
    )


def student_guidance(run: Path) -> float:
    """The guidance a run says its student is sampled with, in the pipelines' form."""
    return float(read_json(run / "run.json")["sampling"]["guidance_scale"])


def sample(models: DiffusionModels, split: str, num: int, steps: int, guidance: float) -> Tensor:
    """(num, 3, 64, 64) images of the captions of scenes 0 … num − 1 of a split."""
    prompts = captions(sample_scenes(split, range(num)), split, range(num))
    out = []
    for start in range(0, num, BATCH):
        texts = prompts[start : start + BATCH]
        generators = [stream_generator(0, "world_check", start + i) for i in range(len(texts))]
        out.append(models.sample(texts, generators, num_steps=steps, guidance_scale=guidance).cpu())
    return torch.cat(out)


def fd_to_real(images: Tensor, num: int, device: torch.device) -> float:
    """FD-EffLite0 to scenes of the same captions, rendered elsewhere in the nuisance stream."""
    network = EffLite0Features().to(device)

    def features(x: Tensor) -> np.ndarray:
        return torch.cat([network(b.to(device)).cpu() for b in x.split(BATCH)]).numpy()

    real, _ = scene_batch("test", range(num, 2 * num))
    return frechet_distance(Moments.of(features(images)), Moments.of(features(real)))


@torch.no_grad()
def proxy_rows(proxy: LatentCLIP, models: DiffusionModels, reward: Reward, num: int) -> list[Row]:
    """Share of pairs of encoded images that proxy and reward model order alike.

    Pairs are those of the simulated preferences (wrong attributes and degradations), on
    test scenes; once with the degradations of training, once with unseen ones.
    """
    rows = []
    scenes = sample_scenes("test", range(num))
    prompts = captions(scenes, "test", range(num))
    for name, kinds, floor in (
        ("degradations as trained", TRAINED_DEGRADATIONS, 0.75),
        ("unseen degradations", HELDOUT_DEGRADATIONS, None),
        ("contents only", (), None),
    ):
        generator = torch.Generator().manual_seed(3)
        pair, _, _ = preference_pairs(scenes, 2 * 10**6, PreferenceConfig(), generator, kinds)
        ours, expert = [], []
        for images in pair:
            latents = torch.cat([models.encode_images(x)[0] for x in images.split(BATCH)])
            ours.append(score(proxy, latents, prompts))
            expert.append(score(reward, images, prompts))
        agreed = ((ours[0] > ours[1]) == (expert[0] > expert[1])).float().mean()
        rows.append(Row(f"latent proxy: agreement with the reward model, {name}", float(agreed), floor, 0.85))
    return rows


def check_world(
    assets: Path, student: Path | None, num: int, device: torch.device, out: Path | None, quiet: bool = False
) -> list[Row]:
    """Measure, print each row as it comes unless ``quiet``, and write all of them to ``out``."""
    rows = []
    for row in measure(assets, student, num, device):
        if not quiet:
            print(row, flush=True)
        rows.append(row)
    if out is not None:
        document = {"schema_version": 1, "num": num, "rows": [r.to_dict() for r in rows]}
        document["provenance"] = provenance(device.type)
        document["manifest"] = read_json(assets / "manifest.json")
        write_json_atomic(out, document)
    return rows
