"""Real images that probes compare with: one for each prompt, at the evaluated size or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.metrics.contract import Context
from rgbench.metrics.reference import from_uint8
from rgbench.worlds.scenes import IMAGE_SIZE

CHUNK = 256


def has_real(context: Context) -> bool:
    """Whether every prompt has a real image of the evaluated size.

    A real image is never resized: interpolation changes the very spectrum that is looked at.
    Without real images a probe gives absolute levels, to be set beside those of the teacher
    and of the LCD student.
    """
    if context.resolution != IMAGE_SIZE:
        return False
    try:
        return len(context.reference.scenes) == len(context.prompts)
    except UsageError:  # a prompt without a scene
        return False


def real_batches(context: Context, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Real images of the first ``num`` prompts with their positions.

    Yields:
        (B, 3, H, W) float32 in [0, 1] on the context's device, and (B,) int64.
    """
    num = len(context.prompts) if num is None else num
    chunks = np.array_split(np.arange(num), -(-num // CHUNK))
    for at in context.track(chunks, "real scenes: probes"):
        yield from_uint8(context.reference.images[at]).to(context.device), at
