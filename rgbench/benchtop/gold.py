"""Gold: an image's utility as the simulated annotators see it, read back from its pixels.

    utility = share of the caption's attributes that are right − λ · degradation

The share is the oracle's vote. The degradation is the median of three regressors of different architectures, trained on
known strengths and never on a reward model's scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgbench.benchtop.oracle import CLASSIFIERS, backbone, load_frozen


class DegradationRegressor(nn.Module):
    """(B, 3, 64, 64) images in [0, 1] → (B,) strength of their degradation in (0, 1)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone: Any
        self.backbone, width = backbone(kind)
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone.forward_features((images - 0.45) / 0.25)
        return self.head(features.flatten(1))[:, 0].sigmoid()


def load_regressor(folder: Path, device: torch.device | str = "cpu") -> DegradationRegressor:
    """A trained regressor, frozen; the folder's name is its architecture."""
    return load_frozen(DegradationRegressor(folder.name), folder, device)


class Gold:
    """Reads the degradation of benchtop images.

    Args:
        folder: of the three regressors.
        device: where they run.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.regressors = {name: load_regressor(folder / name, device) for name in CLASSIFIERS}

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """(3, B) strengths of (B, 3, 64, 64) images, one row a regressor."""
        images = images.to(self.device)
        return torch.stack([network(images) for network in self.regressors.values()])

    def degradation(self, images: Tensor) -> Tensor:
        """(B,) median of the three regressors."""
        return self.read(images).median(0).values
