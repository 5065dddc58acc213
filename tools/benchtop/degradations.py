"""Degradations that the regressors are trained on beside the annotators' own, and three that nothing is trained on.

Four are what optimisers plant in images; the rest spread the training wide, so that a kind never seen is read as well.
Each maps images (B, 3, 64, 64) in [0, 1], strengths (B,) in (0, 1] and a CPU generator to degraded images, not clamped.
Pixelation, salt and pepper and motion blur are kept for the check.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS, blur, convolve_each

REACH = torch.arange(-6.0, 7.0)  # of a kernel of 13 pixels
BLOCK = 8  # pixels of a JPEG block
ROW = torch.arange(BLOCK)[:, None]
DCT = (math.pi * (2 * ROW.T + 1) * ROW / (2 * BLOCK)).cos() * torch.where(ROW == 0, 0.5, 0.5 * math.sqrt(2)) / 2**0.5


def sharpen(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Unsharp mask of σ = 1 pixel, up to four times the detail."""
    soft = blur(images, torch.full_like(strength, 0.35), generator)
    return images + 4 * _wide(strength) * (images - soft)


def grid(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A square wave of period 2, 4 or 8 pixels, amplitude up to 0.15."""
    side = images.shape[-1]
    period = 2 ** torch.randint(1, 4, (len(images), 1), generator=generator)
    wave = 1 - 2 * ((torch.arange(side)[None] // (period // 2).clamp(min=1)) % 2).float()
    return images + 0.15 * _wide(strength) * (wave[:, None, :, None] * wave[:, None, None])


def cast(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """One channel raised and another lowered, by up to a half."""
    order = torch.rand(len(images), 3, generator=generator).argsort(1)
    gain = torch.tensor([1.0, 0.0, -1.0])[order]
    return images * (1 + 0.5 * _wide(strength) * gain[:, :, None, None])


def coarse_noise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of 2-pixel grain, standard deviation up to 0.25."""
    side = images.shape[-1] // 2
    drawn = torch.randn(len(images), 3, side, side, generator=generator)
    return images + 0.25 * _wide(strength) * drawn.repeat_interleave(2, -1).repeat_interleave(2, -2)


def defocus(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a disc, radius up to 4.5 pixels."""
    disc = (1 + 4 * strength[:, None, None] - torch.hypot(REACH[:, None], REACH)).clamp(0, 1)
    return convolve_each(images, disc / disc.sum((1, 2), keepdim=True))


def smear(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur along a line of any direction, σ up to 3.5 pixels."""
    angle = math.pi * torch.rand(len(images), 1, 1, generator=generator)
    along = angle.cos() * REACH + angle.sin() * REACH[:, None]
    across = angle.cos() * REACH[:, None] - angle.sin() * REACH
    line = (-0.5 * ((along / (0.3 + 3.2 * strength[:, None, None])) ** 2 + (across / 0.3) ** 2)).exp()
    return convolve_each(images, line / line.sum((1, 2), keepdim=True))


def ghost(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A copy moved by 3 to 6 pixels in any direction, mixed in up to a half."""
    angle = 2 * math.pi * torch.rand(len(images), generator=generator)
    far = 3 + 3 * torch.rand(len(images), generator=generator)
    x, y = (6 + (far * f(angle)).round().long() for f in (torch.cos, torch.sin))
    kernels = torch.zeros(len(images), 13, 13)
    kernels[torch.arange(len(images)), y, x] = 0.5 * strength
    kernels[:, 6, 6] = 1 - 0.5 * strength
    return convolve_each(images, kernels)


def resample(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Resolution lowered to down to an eighth, then raised by linear or cubic interpolation."""
    side, out = images.shape[-1], []
    for image, s, cubic in zip(images, strength, torch.rand(len(images), generator=generator) < 0.5, strict=True):
        small = F.interpolate(image[None], size=round(side * 8 ** -float(s)), mode="area")
        out.append(F.interpolate(small, size=side, mode="bicubic" if cubic else "bilinear"))
    return torch.cat(out)


def ring(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Frequencies cut off sharply, down to above 0.06 cycles/pixel."""
    f = torch.fft.fftfreq(images.shape[-1])
    kept = torch.hypot(f[:, None], f[: images.shape[-1] // 2 + 1].abs()) <= 0.5 * 8 ** -_wide(strength)
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=images.shape[-2:])


def compress(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """8 × 8 DCT coefficients rounded, as JPEG does; more coarsely the higher the frequency."""
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK).transpose(3, 4)
    step = (strength[:, None, None] * (0.1 + 0.25 * (ROW + ROW.T))).reshape(b, 1, 1, 1, BLOCK, BLOCK)
    rounded = (DCT @ blocks @ DCT.T / step).round() * step
    return (DCT.T @ rounded @ DCT).transpose(3, 4).reshape(b, c, h, w)


def posterise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Channels rounded to steps of up to a half."""
    step = 0.5 * _wide(strength)
    return (images / step).round() * step


def impulse(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Up to 25 % of the pixels set to one colour, which is drawn for each image."""
    u = torch.rand(len(images), 1, *images.shape[2:], generator=generator)
    colour = torch.rand(len(images), 3, 1, 1, generator=generator)
    return torch.where(u < 0.25 * _wide(strength), colour, images)


def frost(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel taken from a place nearby, a standard deviation of up to 3 pixels away."""
    b, _, h, w = images.shape
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float()
    moved = places + 3 * strength[:, None, None, None] * torch.randn(b, 2, h, w, generator=generator)
    y, x = (moved[:, i].round().long().clamp(0, n - 1) for i, n in ((0, h), (1, w)))
    return images[torch.arange(b)[:, None, None], :, y, x].permute(0, 3, 1, 2)


def pixelate(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blocks of 4 × 4 or 8 × 8 pixels, mixed in by strength."""
    block = torch.where(strength > 0.5, 8, 4)
    small = torch.stack([F.avg_pool2d(x, int(k)).repeat_interleave(int(k), -1).repeat_interleave(int(k), -2)
                         for x, k in zip(images, block, strict=True)])  # fmt: skip
    s = (0.4 + 0.6 * strength)[:, None, None, None]
    return (1 - s) * images + s * small


def salt_and_pepper(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Up to 25 % of the pixels set to black or white."""
    u = torch.rand(images.shape[0], 1, *images.shape[2:], generator=generator)
    p = 0.125 * strength[:, None, None, None]
    return torch.where(u < p, 0.0, torch.where(u > 1 - p, 1.0, images))


def motion_blur(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Horizontal box blur of up to 13 pixels."""
    x = torch.arange(-6, 7).abs().float()
    box = (x[None] <= 6 * strength[:, None]).float()
    kernels = torch.zeros(len(images), 13, 13)
    kernels[:, 6] = box / box.sum(1, keepdim=True)
    return convolve_each(images, kernels)


def _wide(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


PLANTED = (sharpen, grid, cast, coarse_noise)
SPREAD = (defocus, smear, ghost, resample, ring, compress, posterise, impulse, frost)
KINDS = (*2 * TRAINED_DEGRADATIONS, *PLANTED, *SPREAD)  # the annotators' own are drawn twice as often
HELDOUT_DEGRADATIONS = (pixelate, salt_and_pepper, motion_blur)


def degrade(images: Tensor, strength: Tensor, kinds: tuple, generator: torch.Generator) -> Tensor:
    """Degrade each image by one kind drawn at random, clamped to [0, 1].

    Args:
        images: (B, 3, H, W) in [0, 1].
        strength: (B,) in [0, 1]; 0 leaves the image as it is.
        kinds: the functions to draw from; with none, images stay as they are.
        generator: CPU generator.
    """
    if not kinds:
        return images
    kind = torch.randint(len(kinds), (len(images),), generator=generator)
    out = images.clone()
    for k, function in enumerate(kinds):
        rows = (kind == k) & (strength > 0)
        if rows.any():
            out[rows] = function(images[rows], strength[rows], generator)
    return out.clamp(0, 1)
