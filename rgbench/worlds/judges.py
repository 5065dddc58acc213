"""The oracle's judges: three architectures that read a scene's attributes off its image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from rgbench.worlds.scenes import COLOURS, IMAGE_SIZE, LAYOUTS, SHAPES, SIZES, Scenes

# Heads in output order: attribute name, slot, number of classes.
HEADS = (
    ("layout", None, len(LAYOUTS)),
    ("shape", 0, len(SHAPES)),
    ("colour", 0, len(COLOURS)),
    ("size", 0, len(SIZES)),
    ("shape", 1, len(SHAPES)),
    ("colour", 1, len(COLOURS)),
    ("size", 1, len(SIZES)),
)
JUDGES = ("resnet", "vit", "convnext")


class Judge(nn.Module):
    """(B, 3, 64, 64) images in [0, 1] → seven tensors of logits, one per entry of ``HEADS``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone: Any
        self.backbone, width = _backbone(kind)
        self.head = nn.Linear(width, sum(n for _, _, n in HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features((images - 0.45) / 0.25)
        return self.head(features.flatten(1)).split([n for _, _, n in HEADS], 1)


def _backbone(kind: str) -> tuple[Any, int]:
    if kind == "resnet":
        channels = (24, 48, 96, 96)
        network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, stem_width=12, stem_type="deep", channels=channels)
        network.maxpool = nn.Identity()  # 64 px: one halving fewer than at 224
        return network, 96 * 4 * 4
    if kind == "vit":
        network = VisionTransformer(
            IMAGE_SIZE,
            patch_size=8,
            embed_dim=96,
            depth=4,
            num_heads=3,
            mlp_ratio=3,
            num_classes=0,
            class_token=False,
            global_pool="",
        )
        return network, 96 * 64
    if kind == "convnext":
        network = ConvNeXt(3, num_classes=0, depths=(1, 1, 2, 1), dims=(24, 48, 96, 96), patch_size=2, output_stride=16)
        return network, 96 * 4 * 4
    raise ValueError(f"unknown judge {kind!r}; known: {', '.join(JUDGES)}")


def targets(scenes: Scenes) -> list[Tensor]:
    """Class index (B,) per head; -1 where the slot is empty."""
    return [scenes.layout if slot is None else getattr(scenes, name)[:, slot] for name, slot, _ in HEADS]


def load_judge(folder: Path, device: torch.device | str = "cpu") -> Judge:
    """A trained judge, frozen; the folder's name is its architecture."""
    judge = Judge(folder.name)
    state = load_file(folder / "model.safetensors")
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return judge.eval().requires_grad_(False).to(device)
