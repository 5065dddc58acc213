"""Real images that probes compare with, at the evaluated size or not at all.

the benchtop's scenes   one for each prompt: both sides are left out, or resampled, together
a user's own folder     of no prompt: each side is left out, or resampled, by itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.metrics.contract import Context
from rgbench.metrics.real_crops import RealCrops
from rgbench.metrics.real_images import ReferenceFolder
from rgbench.metrics.reference import from_uint8
from rgbench.worlds.scenes import IMAGE_SIZE

CHUNK = 256
NO_CAPTIONS = "no gap to real: nothing says what the real images show"


class RealScenes:
    """One scene for each prompt.

    Args:
        context: whose prompts all have a scene, at the scenes' size.
    """

    paired = True
    flags: tuple[str, ...] = ()

    def __init__(self, context: Context) -> None:
        self.context, self.num = context, len(context.prompts)

    def fields(self) -> dict[str, Any]:
        """Protocol fields."""
        return self.context.reference.fields()

    def batches(self, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Scenes of the first ``num`` prompts with their positions.

        Yields:
            (B, 3, H, W) float32 in [0, 1] on the CPU, and (B,) int64.
        """
        num = self.num if num is None else num
        chunks = np.array_split(np.arange(num), -(-num // CHUNK))
        for at in self.context.track(chunks, "real scenes: probes"):
            yield from_uint8(self.context.reference.images[at]), at

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, once per pixels, fields and code."""
        return self.context.reference.keep(owner, fields, make)


Real = RealScenes | RealCrops


def find_real(context: Context) -> tuple[Real | None, str]:
    """What probes compare with, and why there is nothing where it was asked for.

    A folder that the set metrics compare with serves the probes too. Without real images a probe
    gives absolute levels, to be set beside those of the teacher and of the LCD student.
    """
    folder = context.features.reference
    if isinstance(folder, ReferenceFolder):
        crops = context.features.remember(f"crops {context.resolution}", lambda: _told(folder, context.resolution))
        return (None, crops.lacking) if crops.lacking else (crops, "")
    return (RealScenes(context), "") if has_scenes(context) else (None, "")


def _told(folder: ReferenceFolder, side: int) -> RealCrops:
    crops = RealCrops(folder, side)
    crops.tell()
    return crops


def has_scenes(context: Context) -> bool:
    """Whether every prompt has a real scene of the evaluated size."""
    if context.resolution != IMAGE_SIZE:
        return False
    try:
        return len(context.reference.scenes) == len(context.prompts)
    except UsageError:  # a prompt without a scene
        return False


def without_real(context: Context) -> dict[str, Any]:
    """Protocol fields of a level: it compares only with levels of images of one size."""
    return {"reference": None, "image_px": context.resolution}


def of_real(
    real: Real, probe: object, protocol: Mapping[str, Any], context: Context, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """What a probe reads in the real images, float64: made once, and kept for every model evaluated after."""
    return real.keep(probe, {"protocol": protocol, "device": str(context.device)}, make)
