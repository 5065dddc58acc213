"""Inception features as clean-fid 0.1.35 takes them (Parmar et al., 2022, arXiv 2104.11222), under the named crops.

The network is NVIDIA's TorchScript translation of the TensorFlow Inception of 2015-12-05, pool3, 2,048 features.

    square256   centre square, Lanczos to 256 on 8 bits (what DMD2 and SiD-LSG do to both sides), then clean-fid
    patch299    the central 299 × 299 at native size; images with a side under 299 stay whole, as in DMD2
    clean-fid   each channel as float32, PIL's antialiased bicubic to 299 × 299, clipped to [0, 255], not rounded
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.files import load_torchscript, sha256_file
from rgbench.metrics.protocols import Crop
from rgbench.metrics.reference import to_uint8
from rgbench.process import available_cores

FILE = "inception-2015-12-05.pt"
FILE_BYTES = 95_607_719
FILE_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
FILE_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
SIDE = 299
SQUARE = 256

CROPS = {
    "square256": f"centre square, PIL Lanczos to {SQUARE}, 8 bits",
    "patch299": f"central {SIDE} px at native size; whole where a side is shorter",
}


def find_inception(path: Path | None) -> Path:
    """The network's file: the one named, else where it is usually kept.

    Args:
        path: the file or its folder; None for ``$XDG_CACHE_HOME/rgbench`` and clean-fid's ``/tmp``.

    Raises:
        UsageError: it is not there, or another file; says its size and the command that gets it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgbench"
    usual = [cache / FILE, Path("/tmp") / FILE]
    places = usual if path is None else [path / FILE if path.is_dir() else path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"the FID network {FILE} ({FILE_BYTES / 1e6:.1f} MB) is not at {' or '.join(map(str, places))}; get it "
            f"with: mkdir -p {cache} && curl -o {cache / FILE} {FILE_URL}   or name it with --inception PATH"
        )
    digest = sha256_file(found)
    if digest != FILE_SHA256:
        raise UsageError(f"{found}: not the Inception of 2015-12-05 (sha256 {digest}, expected {FILE_SHA256})")
    return found


class InceptionNetwork:
    """Inception as a feature network.

    Args:
        weights: the TorchScript file; see :func:`find_inception`.
        crop: what is cut from an image before clean-fid's resize.
        device: where it runs.
    """

    name, suffix, num_features = "inception", "", 2048

    def __init__(self, weights: Path, crop: Crop, device: torch.device) -> None:
        self.weights, self.crop, self.device = weights, crop, device
        self.smallest = SIDE if crop == "patch299" else None
        self._resize = build_resizer("clean")

    @cached_property
    def _layers(self) -> Any:
        return load_torchscript(self.weights).eval().to(self.device).layers

    @cached_property
    def _sha256(self) -> str:
        return sha256_file(self.weights)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(available_cores())

    def label(self, of: str) -> str:
        """FID for the Fréchet distance, KID for the kernel distance."""
        return {"FD": "FID", "KD": "KID"}.get(of, of)

    def fields(self) -> dict[str, Any]:
        """Protocol fields: crop, resize, weights."""
        return {
            "crop": CROPS[self.crop],
            "resize": f"clean-fid: float32 PIL bicubic to {SIDE} per channel, clipped, not rounded",
            "antialias": True,
            "network": "Inception 2015-12-05, TorchScript, pool3",
            "network_sha256": self._sha256,
            "dtype": "float32",
        }

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], multiples of 1/255 → (B, 3, 299, 299) float32 in [0, 255] on the CPU."""
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        return torch.stack(list(self._pool.map(self._prepare, pixels)))

    def _prepare(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(self._resize(cropped(pixels, self.crop))).permute(2, 0, 1)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, 2048) float32 on the CPU."""
        features = self._layers.forward((inputs.to(self.device) - 128) / 128)
        return features.reshape(len(inputs), self.num_features).float().cpu()


def cropped(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """What clean-fid's resize is given of an image, both (H, W, 3) uint8."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if crop == "patch299" and short < SIDE:
        return pixels
    side = SIDE if crop == "patch299" else short
    # torchvision's center_crop rounds half to even, and DMD2 uses it
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    square = pixels[top : top + side, left : left + side]
    if crop == "patch299":
        return square
    return np.asarray(Image.fromarray(square).resize((SQUARE, SQUARE), Image.Resampling.LANCZOS))
