"""The shapes of benchtop scenes, as signed distances and as pixel coverage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")


def coverage(shape: Tensor, x: Tensor, y: Tensor, angle: Tensor, radius: Tensor) -> Tensor:
    """(B, s, s) share of each pixel that the shape covers, from its signed distance."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = (cos * x + sin * y) / radius[:, None, None], (cos * y - sin * x) / radius[:, None, None]
    distance = torch.zeros_like(x)
    for k, name in enumerate(SHAPES):
        rows = shape == k
        if rows.any():
            distance[rows] = signed_distance(name, x[rows], y[rows])
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1)


def signed_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of unit-radius shapes, negative inside (y grows downwards)."""
    if name == "circle":
        return torch.hypot(x, y) - 0.95
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82
    if name == "triangle":
        return torch.maximum(0.866 * x.abs() - 0.5 * (y - 0.15), y - 0.15) - 0.55
    if name == "cross":
        bar = torch.maximum(x.abs() - 0.32, y.abs() - 1.0)
        return torch.minimum(bar, torch.maximum(x.abs() - 1.0, y.abs() - 0.32))
    if name == "ring":
        return (torch.hypot(x, y) - 0.72).abs() - 0.26
    if name == "star":
        return _star(x, y)
    raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")


def _star(x: Tensor, y: Tensor, outer: float = 1.12, inner: float = 0.5) -> Tensor:
    """Five-pointed star, one point up: distance to the edge of the folded sector."""
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    r = torch.hypot(x, y)
    px, py = r * folded.cos(), r * folded.sin()
    ex, ey = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    t = (((px - outer) * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    dx, dy = px - outer - t * ex, py - t * ey
    inside = (px - outer) * ey - py * ex > 0
    distance = torch.hypot(dx, dy)
    return torch.where(inside, distance, -distance)
