"""Render-and-match: read a scene by matched filtering against rendered templates.

Nothing is learned. For every colour, the error of explaining a pixel by that colour
minus the error of explaining it by the local background is summed under each template
(shape, size, rotation) at each place, by FFT; the lowest sum is the best explanation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rgbench.worlds.scenes import (
    CENTRES,
    IMAGE_SIZE,
    JITTER,
    LAYOUTS,
    MAX_ROTATION,
    PALETTE,
    POSITIONS,
    RADII,
    SIZES,
)
from rgbench.worlds.shapes import SHAPES, coverage

_ROTATIONS = (-0.75 * MAX_ROTATION, 0.0, 0.75 * MAX_ROTATION)
_SLACK = 2.0  # pixels beyond the scenes' own jitter


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


@torch.no_grad()
def render_and_match(images: Tensor, count: Tensor) -> Tensor:
    """Read every head by matched filtering.

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        count: (B,) number of objects to look for, 1 or 2.

    Returns:
        (B, 7) int64 classes in the order of ``judges.HEADS``; slot 1 is -1 for one object.
    """
    return torch.cat([_match(x, c) for x, c in zip(images.float().split(16), count.split(16), strict=True)])


def _match(images: Tensor, count: Tensor) -> Tensor:
    spectra, labels = _templates()
    windows, pairs = _windows()
    background = images.flatten(2).median(-1).values[:, :, None, None]
    to_background = (images - background).pow(2).sum(1)
    to_colour = torch.stack([(images - torch.tensor(c)[:, None, None]).pow(2).sum(1) for c in PALETTE], 1)
    gain = torch.fft.rfft2(to_colour - to_background[:, None])  # (B, C, s, s//2+1)
    best = []  # per window: lowest score, its colour and its template
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
