"""CMMD: maximum mean discrepancy of CLIP image features (Jayasumana et al., 2024, arXiv 2401.09603).

    k(x, y) = exp(−|x − y|² / 2σ²),  σ = 10,  x, y normalised features of CLIP ViT-L/14 at 336 pixels
    CMMD = 1000 · (mean k(x, x') + mean k(y, y') − 2 mean k(x, y))

The means run over all pairs, each image with itself included, and images are resized by Pillow's bicubic, antialiased
and in 8 bits: both as in the authors' code, which gave the published values. It assumes no Gaussian, and CLIP saw far
more kinds of images than Inception did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file
from rgbench.core.progress import Track, untracked
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import SetMetric
from rgbench.metrics.context import Context
from rgbench.metrics.features import FeatureSet, check_finite
from rgbench.metrics.kid import kernel_sum, pair_sums, self_sum
from rgbench.metrics.reference import from_uint8, to_uint8
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol
from rgbench.rewards.clip import CLIP_MEAN, CLIP_STD, WEIGHTS, image_features, load_clip

SIGMA = 10.0
SCALE = 1000.0
MIN_IMAGES = 2
DISTANCE = Direction.LOWER, Family.SET_DISTANCE
HOW = (
    "give CLIP ViT-L/14 at 336 pixels with --judge cmmd=FOLDER: config.json and model.safetensors as transformers "
    "saves them (of openai/clip-vit-large-patch14-336, which holds pytorch_model.bin: load it with CLIPModel and "
    "save_pretrained it; 1.7 GB)"
)


def gaussian_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, n) kernel values of (m, d) and (n, d) features."""
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return np.exp(-squared.clip(min=0) / (2 * SIGMA**2))


def cmmd(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, sum_y: float | None = None, track: Track = untracked
) -> tuple[float, list[float]]:
    """CMMD of two feature sets, and with each group of the first left out.

    Args:
        x: (m, d) normalised features of the evaluated images.
        y: (n, d) of the reference; may be a memory map.
        groups: (m,) group of each row of ``x``.
        sum_y: of the kernel over all pairs of ``y``, where it is known already.
        track: shows progress.
    """
    parts = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    within = pair_sums(x, parts, gaussian_kernel, track)
    cross = np.array([kernel_sum(x[part], y, gaussian_kernel) for part in track(parts, "kernel: generated and real")])
    sum_y = self_sum(y, gaussian_kernel, track) if sum_y is None else sum_y
    sizes, of_y = np.array([len(part) for part in parts]), sum_y / len(y) ** 2

    def value(keep: np.ndarray) -> float:
        num = sizes[keep].sum()
        own = within[np.ix_(keep, keep)].sum() / num**2
        return float(SCALE * (own + of_y - 2 * cross[keep].sum() / (num * len(y))))

    every = np.arange(len(parts))
    left = [value(every != g) for g in every] if len(parts) > 1 else []
    return value(every >= 0), left


class CLIPNetwork:
    """CLIP's image tower as a feature network: centre square, Pillow's bicubic to its side, normalised features.

    Args:
        folder: in transformers' layout.
        device: where it runs.

    Raises:
        UsageError: a file is missing or no CLIP's.
    """

    suffix = ""
    smallest: int | None = None

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model, self.device = load_clip(folder, device, torch.float32), device
        self.num_features = int(self.model.config.projection_dim)
        self.size = int(self.model.config.vision_config.image_size)
        self.sha256 = sha256_file(folder / WEIGHTS)
        self.name = f"clip-{self.sha256[:8]}"

    def fields(self) -> dict[str, Any]:
        """Protocol fields: the resize of both sides, the weights."""
        return {
            "resize": f"Pillow bicubic to {self.size}, 8 bits",
            "crop": "centre square",
            "antialias": True,
            "network": "CLIP image features, normalised",
            "network_sha256": self.sha256,
            "dtype": "float32",
        }

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], multiples of 1/255 → (B, 3, size, size), normalised, on the CPU."""
        side = min(images.shape[-2:])
        top, left = ((n - side) // 2 for n in images.shape[-2:])
        square = to_uint8(images[..., top : top + side, left : left + side]).permute(0, 2, 3, 1).cpu().numpy()
        size = (self.size, self.size)
        resized = [np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) for pixels in square]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (from_uint8(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)) - mean) / std

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, d) float32 on the CPU."""
        return image_features(self.model, inputs.to(self.device)).cpu()


class CMMD(SetMetric):
    """CMMD to the reference of the set metrics, with jackknife interval.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: no weights (says how to get them), or fewer than 2 images on a side.
    """

    name = "cmmd"
    infos = (MetricInfo.of(name, "CMMD", "kernel distance on CLIP features", *DISTANCE, decimals=3),)
    default = False
    needs = ("cmmd",)
    per_image_state = ("rows",)
    min_images = MIN_IMAGES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if "cmmd" not in context.judges:
            raise UsageError(f"metric cmmd: {HOW}")
        network = CLIPNetwork(context.judges["cmmd"], context.device)
        self.features = FeatureSet(context.features.reference, network)
        kernel = {"kernel": "Gaussian", "sigma": SIGMA, "scale": SCALE, "pairs": "all, each image with itself included"}
        fields = context.set_protocol(self.features, **kernel, jackknife=f"{NUM_GROUPS} groups")
        self.planned = ((self.name, Protocol.of(self.name, fields)),)
        self.rows = np.zeros((network.num_features, len(context.prompts)), dtype=np.float32)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        values = self.features(images).numpy()
        check_finite(values, positions, "the evaluated set")
        self.rows[:, positions] = values.T

    def compute(self) -> list[MetricValue]:
        num = len(self.context.prompts)
        groups = cluster_groups(self.context.clusters(num))
        y, track = self.features.reference_rows(), self.context.track
        sum_y = self.features.remember("cmmd", lambda: self_sum(y, gaussian_kernel, track))
        value, left = cmmd(self.rows.T, y, groups, sum_y, track)
        interval = jackknife_interval(value, left)
        extra = {"num_reference": len(self.features.reference), "jackknife": left}
        return [MetricValue(*self.planned[0], value, interval, num, flags=self.context.departures, extra=extra)]
