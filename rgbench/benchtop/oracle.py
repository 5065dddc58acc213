"""The oracle: which of a caption's attributes does an image show?

Three attribute classifiers of different architectures, trained apart, vote on each attribute. Render-and-match, which
learns nothing, reads the same attributes by matched filtering: for every colour, the error of explaining a pixel by
that colour minus the error of explaining it by the background is summed under each template (shape, size, rotation) at
each place, by FFT; the lowest sum is the best explanation. The vote is the oracle's answer, and the agreement of all
four is reported beside it, because a network alone can be fooled.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from rgbench.benchtop.scenes import (
    CENTRES,
    COLOURS,
    IMAGE_SIZE,
    JITTER,
    LAYOUTS,
    MAX_ROTATION,
    PALETTE,
    POSITIONS,
    RADII,
    SHAPES,
    SIZES,
    Scenes,
    coverage,
)
from rgbench.core.io import check_tensors, load_safetensors

N = TypeVar("N", bound=nn.Module)

# Heads in output order: attribute, slot, number of classes.
HEADS = (
    ("layout", None, len(LAYOUTS)),
    ("shape", 0, len(SHAPES)),
    ("colour", 0, len(COLOURS)),
    ("size", 0, len(SIZES)),
    ("shape", 1, len(SHAPES)),
    ("colour", 1, len(COLOURS)),
    ("size", 1, len(SIZES)),
)
ATTRIBUTES = ("shape", "colour", "size", "layout")
CLASSIFIERS = ("resnet", "vit", "convnext")
_ROTATIONS = (-0.75 * MAX_ROTATION, 0.0, 0.75 * MAX_ROTATION)
_SLACK = 2.0  # pixels beyond the scenes' own jitter


def load_oracle(folder: Path, device: torch.device | str = "cpu") -> Oracle:
    """The oracle from the folder of the classifiers."""
    return Oracle({name: load_classifier(folder / name, device) for name in CLASSIFIERS}, device)


class Oracle:
    """Reads and scores benchtop images.

    Args:
        classifiers: by name.
        device: where they run.
    """

    def __init__(self, classifiers: dict[str, Classifier], device: torch.device | str = "cpu") -> None:
        self.classifiers, self.device = classifiers, device

    @torch.inference_mode()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Predicted class per classifier and head.

        Args:
            images: (B, 3, 64, 64) in [0, 1].

        Returns:
            classifier → (B, 7) int64, columns as ``HEADS``.
        """
        images = images.to(self.device)
        return {name: torch.stack([x.argmax(1) for x in net(images)], 1) for name, net in self.classifiers.items()}

    def vote(self, readings: dict[str, Tensor]) -> Tensor:
        """(B, 7) majority of the classifiers; -1 where all differ."""
        stacked = torch.stack(list(readings.values()))
        mode = stacked.mode(0).values
        return torch.where((stacked == mode).sum(0) > len(stacked) // 2, mode, -1)

    def score(self, images: Tensor, scenes: list[dict[str, str]] | Scenes, match: bool = False) -> dict[str, Tensor]:
        """Share of each attribute that is right, per image.

        Args:
            images: (B, 3, 64, 64) in [0, 1].
            scenes: the wanted attributes of each image.
            match: also run render-and-match (slow), as ``match_mean`` and ``match_agreement``.

        Returns:
            (B,) float32 each: ``shape``, ``colour``, ``size``, ``layout`` over the scene's slots, ``mean`` over
            attributes, ``share`` of all slots together, ``all`` (1 where everything is right), ``agreement`` (share of
            heads on which the classifiers are unanimous), and each classifier's own ``mean:{name}``.
        """
        wanted = scenes if isinstance(scenes, Scenes) else Scenes.from_dicts(scenes)
        readings = {name: r.cpu() for name, r in self.read(images).items()}
        out = score_reading(self.vote(readings), wanted)
        present = heads_present(wanted)
        stacked = torch.stack(list(readings.values()))
        unanimous = (stacked == stacked[0]).all(0)
        out["agreement"] = _share(unanimous, present)
        for name, reading in readings.items():
            out[f"mean:{name}"] = score_reading(reading, wanted)["mean"]
        if match:
            matched = render_and_match(images.cpu(), wanted.count)
            out["match_mean"] = score_reading(matched, wanted)["mean"]
            out["match_agreement"] = _share(matched == self.vote(readings), present)
        return out


def heads_present(wanted: Scenes) -> Tensor:
    """(B, 7) bool: the heads that the wanted scene's slots fill."""
    two = wanted.count == 2
    return torch.stack([two | (slot != 1) for _, slot, _ in HEADS], 1)


def score_reading(reading: Tensor, wanted: Scenes) -> dict[str, Tensor]:
    """Share right per attribute, ``mean`` over the four, ``share`` of all slots together, and ``all``, each (B,).

    Args:
        reading: (B, 7) predicted classes, columns as ``HEADS``.
        wanted: the wanted scenes.
    """
    truth = torch.stack([wanted.layout if s is None else getattr(wanted, n)[:, s] for n, s, _ in HEADS], 1)
    present = heads_present(wanted)
    right = (reading == truth) & present
    out = {}
    for attribute in ATTRIBUTES:
        columns = [i for i, (name, _, _) in enumerate(HEADS) if name == attribute]
        out[attribute] = _share(right[:, columns], present[:, columns])
    out["mean"] = torch.stack([out[a] for a in ATTRIBUTES]).mean(0)
    out["share"] = _share(right, present)
    out["all"] = (right | ~present).all(1).float()
    return out


def _share(hits: Tensor, present: Tensor) -> Tensor:
    return (hits & present).sum(1).float() / present.sum(1).float()


class Classifier(nn.Module):
    """An attribute classifier: (B, 3, 64, 64) images in [0, 1] → seven tensors of logits, one per head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone: Any
        self.backbone, width = backbone(kind)
        self.head = nn.Linear(width, sum(n for _, _, n in HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features((images - 0.45) / 0.25)
        return self.head(features.flatten(1)).split([n for _, _, n in HEADS], 1)


def backbone(kind: str) -> tuple[Any, int]:
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
    raise ValueError(f"unknown classifier {kind!r}; known: {', '.join(CLASSIFIERS)}")


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> Classifier:
    """A trained classifier, frozen; the folder's name is its architecture."""
    return load_frozen(Classifier(folder.name), folder, device)


def load_frozen(network: N, folder: Path, device: torch.device | str) -> N:
    """A network with the weights of a folder in float32, frozen.

    Raises:
        UsageError: the weights are damaged, or another network's.
    """
    state = load_safetensors(folder / "model.safetensors")
    check_tensors(folder / "model.safetensors", state, network.state_dict(), "this network")
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return network.eval().requires_grad_(False).to(device)


def targets(scenes: Scenes) -> list[Tensor]:
    """Class index (B,) per head; -1 where the slot is empty."""
    return [scenes.layout if slot is None else getattr(scenes, name)[:, slot] for name, slot, _ in HEADS]


@torch.no_grad()
def render_and_match(images: Tensor, count: Tensor) -> Tensor:
    """Read every head by matched filtering.

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        count: (B,) number of objects, 1 or 2.

    Returns:
        (B, 7) int64 classes in the order of ``HEADS``; slot 1 is -1 for one object.
    """
    return torch.cat([_match(x, c) for x, c in zip(images.float().split(16), count.split(16), strict=True)])


def _match(images: Tensor, count: Tensor) -> Tensor:
    spectra, labels = _templates()
    windows, pairs = _windows()
    background = images.flatten(2).median(-1).values[:, :, None, None]
    to_background = (images - background).pow(2).sum(1)
    to_colour = torch.stack([(images - torch.tensor(c)[:, None, None]).pow(2).sum(1) for c in PALETTE], 1)
    gain = torch.fft.rfft2(to_colour - to_background[:, None])  # (B, C, s, s//2+1)
    best = []  # for each window: lowest score, its colour and its template
    scores = torch.fft.irfft2(gain[:, :, None] * spectra.conj()[None, None], s=(IMAGE_SIZE, IMAGE_SIZE))
    flat = scores.flatten(1, 2).flatten(2)  # (B, C·T, s·s)
    for window in windows:
        low, where = flat[:, :, window.flatten()].amin(-1).min(-1)
        best.append((low, where // len(labels), labels[where % len(labels)]))
    out = torch.full((len(images), 7), -1)
    for b in range(len(images)):
        two = int(count[b]) == 2
        options = [k for k in range(len(LAYOUTS)) if (k >= len(POSITIONS)) == two]
        totals = [sum(float(best[w][0][b]) for w, (k, _) in enumerate(pairs) if k == layout) for layout in options]
        out[b, 0] = layout = options[totals.index(min(totals))]
        for w, (k, slot) in enumerate(pairs):
            if k == layout:
                _, colour, label = best[w]
                out[b, 1 + 3 * slot : 4 + 3 * slot] = torch.stack([label[b, 0], colour[b], label[b, 1]])
    return out


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor]:
    """Spectra (T, s, s//2+1) of centred coverage masks, and (T, 2) their (shape, size)."""
    s = IMAGE_SIZE
    grid = torch.arange(s, dtype=torch.float32) - s // 2
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    labels = [(k, z) for k in range(len(SHAPES)) for z in range(len(SIZES)) for _ in _ROTATIONS]
    shape = torch.tensor([k for k, _ in labels])
    radius = torch.tensor([RADII[z] for _, z in labels])
    angle = torch.tensor(_ROTATIONS).repeat(len(SHAPES) * len(SIZES))
    n = len(labels)
    masks = coverage(shape, xx.expand(n, s, s), yy.expand(n, s, s), angle, radius)
    return torch.fft.rfft2(torch.fft.ifftshift(masks, dim=(-2, -1))), torch.tensor(labels)


def _windows() -> tuple[Tensor, list[tuple[int, int]]]:
    """(W, s, s) bool: where the centre of (layout, slot) may lie, and the list of those pairs."""
    grid = torch.arange(IMAGE_SIZE, dtype=torch.float32) - IMAGE_SIZE // 2 + 0.5
    pairs = [(k, slot) for k, name in enumerate(LAYOUTS) for slot in range(len(CENTRES[name]))]
    windows = []
    for k, slot in pairs:
        x, y = CENTRES[LAYOUTS[k]][slot]
        reach = JITTER[k >= len(POSITIONS)] + _SLACK
        windows.append(((grid - y).abs() <= reach)[:, None] & ((grid - x).abs() <= reach)[None])
    return torch.stack(windows), pairs
