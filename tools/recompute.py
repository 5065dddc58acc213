"""Metric values of one model, recomputed without rgbench: ``python -m tools.recompute RESULTS PIPELINE [--out FILE]``.

| | by |
|---|---|
| images | diffusers' StableDiffusionPipeline, with the folder's scheduler |
| features | efficientnet_lite_pytorch, resized by torchvision |
| FD | torch-fidelity |
| precision, recall, density, coverage | the papers' definitions over SciPy's distances |
| Vendi | its definition over all pairs |
| reward | open_clip, resized by torchvision |
| spectrum | NumPy's whole plane, not half of it |

rgbench gives the data alone: the prompts, a real scene for each, the rule that seeds the noise, and the values to
compare with. Exit code 1 where a value differs by more than rounding images to 8 bits in different batches explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline
from efficientnet_lite_pytorch import EfficientNet
from scipy.spatial.distance import cdist
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.transforms.v2.functional import InterpolationMode, resize

from rgbench.core.io import load_pickled_state_dict, write_json_atomic
from rgbench.data.prompts import PromptSet, benchtop_prompts
from rgbench.evaluate.images import noise_seed
from rgbench.evaluate.results import ModelResult, load_results
from rgbench.metrics.networks import efflite0_weights
from rgbench.metrics.reference import ReferenceScenes
from rgbench.metrics.values import MetricValue, metric_info
from rgbench.models.presets import find_preset

BATCH = 64
NEAREST = 5
TOLERANCE = 1e-4  # relative, to a value or to its unit's step in STEPS, whichever is larger
STEPS = {"dB": 0.1, "": 0.01}
REWARDS = {"hps": True, "hps_no_antialias": False}  # name → antialiased


@torch.no_grad()
def generate(folder: Path, prompts: PromptSet, sampling: Mapping[str, Any], seed: int) -> Tensor:
    """(n, 3, H, W) uint8 images of a diffusers folder, one CPU generator each."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for first in range(0, len(prompts), BATCH):
        some = prompts.prompts[first : first + BATCH]
        images = pipeline(
            [prompt.text for prompt in some],
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance_scale"],
            generator=[torch.Generator().manual_seed(noise_seed(prompt.id, seed)) for prompt in some],
            output_type="np",
        ).images
        made.append(torch.from_numpy(np.rint(images * 255).astype(np.uint8)).permute(0, 3, 1, 2))
        print(f"\r{first + len(some)} of {len(prompts)} images", end="", file=sys.stderr)
    print(file=sys.stderr)
    return torch.cat(made)


def bicubic(images: Tensor, size: int, antialias: bool) -> Tensor:
    """(B, 3, size, size) of uint8 images, in [0, 1] but for the overshoot."""
    return resize(images / 255, [size, size], InterpolationMode.BICUBIC, antialias=antialias)


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """(n, 1280) float32 pooled features of the reference package."""
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(load_pickled_state_dict(efflite0_weights()))
    parts = [(bicubic(part, 128, True).clamp(0, 1) * 255 - 127) / 128 for part in images.split(BATCH)]
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in parts])


def set_values(ours: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """FD, precision, recall, density, coverage, and Vendi's difference to real, of (n, d) features."""
    statistics = [fid_features_to_statistics(torch.from_numpy(x).double()) for x in (ours, real)]
    distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    between = cdist(ours, real)
    own, theirs = (np.sort(cdist(x, x), axis=1)[:, NEAREST] for x in (ours, real))  # column 0 is the image itself
    in_real = between < theirs[None]
    return {
        "fd_efflite0": float(distance),
        "precision_efflite0": (between <= theirs[None]).any(1).mean(),
        "recall_efflite0": (between <= own[:, None]).any(0).mean(),
        "density_efflite0": in_real.sum(1).mean() / NEAREST,
        "coverage_efflite0": in_real.any(0).mean(),
        "vendi_efflite0": vendi(ours) - vendi(real),
    }


def vendi(rows: np.ndarray) -> float:
    """Vendi score of (n, d) features under the cosine kernel."""
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    spectrum = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    spectrum = spectrum[spectrum > 1e-15]
    return float(np.exp(-(spectrum * np.log(spectrum)).sum()))


@torch.no_grad()
def rewards(images: Tensor, prompts: PromptSet, folder: Path) -> dict[str, float]:
    """Mean 100 · cosine of the world's reward model, with antialias and without."""
    source = f"local-dir:{folder}"
    model, tokenizer = open_clip.create_model(source).eval(), open_clip.get_tokenizer(source)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    size = model.visual.image_size[0]
    found: dict[str, list[Tensor]] = {name: [] for name in REWARDS}
    for first in range(0, len(prompts), BATCH):
        part = images[first : first + BATCH]
        texts = [prompt.text for prompt in prompts.prompts[first : first + BATCH]]
        text = model.encode_text(tokenizer(texts), normalize=True)
        for name, rows in found.items():
            seen = model.encode_image((bicubic(part, size, REWARDS[name]) - mean) / std, normalize=True)
            rows.append((seen * text).sum(1))
    return {name: float(torch.cat(rows).double().mean() * 100) for name, rows in found.items()}


def power(images: Tensor) -> np.ndarray:
    """(H, W) mean |F|² of Rec. 601 luma under a periodic Hann window, the mean removed before."""
    rgb = images.double().numpy() / 255
    luma = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    hann = np.hanning(luma.shape[-1] + 1)[:-1]
    luma = (luma - luma.mean((1, 2), keepdims=True)) * np.outer(hann, hann)
    return (np.abs(np.fft.fft2(luma)) ** 2).mean(0)


def spectrum_values(ours: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Differences of HFER, band energy and slope to real, and the log-spectral distance, of (H, H) power."""
    side = len(ours)
    frequency = np.fft.fftfreq(side)
    radius = np.sqrt(frequency[:, None] ** 2 + frequency[None] ** 2)
    high, ring = radius > 0.25, np.rint(radius * side)
    energy = [x[high].sum() for x in (ours, real)]
    share = [x[high].sum() / x[radius > 0].sum() for x in (ours, real)]
    profiles = [np.array([x[ring == k].mean() for k in range(1, side // 2 + 1)]) for x in (ours, real)]
    centres = np.arange(1, side // 2 + 1) / side
    fitted = (centres >= 0.02) & (centres <= 0.35)
    slopes = [np.polyfit(np.log(centres[fitted]), np.log(profile[fitted]), 1)[0] for profile in profiles]
    decibels = 10 * np.log10(profiles[0] / profiles[1])
    return {
        "hfer_db": 10 * np.log10(share[0] / share[1]),
        "band_db": 10 * np.log10(energy[0] / energy[1]),
        "slope": slopes[0] - slopes[1],
        "log_spectral_distance_db": np.sqrt((decibels**2).mean()),
    }


def recompute(result: ModelResult, pipeline: Path, scratch: Path) -> list[dict[str, Any]]:
    """Recompute the values of a model; one row for each value that both have.

    Args:
        result: its values.
        pipeline: diffusers folder of the model.
        scratch: folder that caches the rendered real scenes.
    """
    fields, generation = result.values[0].protocol.fields, result.head.generation.fields
    prompts = benchtop_prompts(fields["prompts"]["num"])
    images = generate(pipeline, prompts, generation, fields["seeds"][0])
    real = ReferenceScenes(prompts, scratch).images
    found = rewards(images, prompts, find_preset(result.head.world).reward_folder())
    found |= spectrum_values(power(images), power(real))
    found |= set_values(features(images).numpy(), features(real).numpy())
    return [compare(value, float(found[value.metric])) for value in result.values if value.metric in found]


def compare(value: MetricValue, recomputed: float) -> dict[str, Any]:
    """Both values, their difference, and whether they agree."""
    assert value.value is not None
    step = STEPS.get(metric_info(value.metric).unit, 1.0)
    return {
        "metric": value.metric,
        "protocol": value.protocol.id,
        "rgbench": value.value,
        "recomputed": recomputed,
        "difference": recomputed - value.value,
        "agrees": bool(abs(recomputed - value.value) <= TOLERANCE * max(abs(value.value), step)),
    }


def main(words: Sequence[str]) -> int:
    """Print the table; write it as JSON where asked; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.recompute", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="of one model, like results/benchtop/lcd-s0")
    parser.add_argument("pipeline", type=Path, help="its diffusers folder, like runs/lcd-s0/pipeline")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(words)
    results = load_results(given.results)
    if len(results) != 1:
        parser.error(f"{given.results}: {len(results)} results; name the folder of one model and generation")
    rows = recompute(results[0], given.pipeline, given.results.parent.parent / ".cache")
    print(f"{'metric':26} {'rgbench':>14} {'recomputed':>14} {'difference':>12}")
    for row in rows:
        print("{metric:26} {rgbench:14.6f} {recomputed:14.6f} {difference:12.2e}".format(**row))
    if given.out:
        write_json_atomic(given.out, {"model": results[0].head.model, "rows": rows})
    apart = [row["metric"] for row in rows if not row["agrees"]]
    print("differ: " + ", ".join(apart) if apart else f"{len(rows)} values agree")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
