"""Central crops of a user's own real images at native pixels: what probes compare generated ones with.

A real image is never resized, for interpolation changes the very spectrum that is looked at: one whose shorter side
is below the generated resolution cannot serve, nor one that 8-bit RGB cannot hold; both are counted. The images belong
to no prompt, so the two sides of a comparison are independent samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from rgbench.files import open_image
from rgbench.metrics.intervals import NUM_GROUPS
from rgbench.metrics.jpeg_history import History, history_of
from rgbench.metrics.kept import keep_array
from rgbench.metrics.real_images import ReferenceFolder
from rgbench.metrics.reference import BATCH, from_uint8
from rgbench.process import available_cores

MIN_IMAGES = 2 * NUM_GROUPS  # two in each jackknife group
MAX_IMAGES = 5000  # more than a probe's generated images; all of COCO's val2017
LOSSY = "real images were lossy"  # flag of every figure that is a gap to them

log = logging.getLogger(__name__)


class RealCrops:
    """Central crops of one size from a folder of real images.

    Args:
        folder: of images.
        side: of the crops, and of the generated images, in pixels.

    Raises:
        UsageError: a file that is no image; it is named.
    """

    paired = False

    def __init__(self, folder: ReferenceFolder, side: int) -> None:
        self.folder, self.side = folder, side
        plain = [header for header in folder.headers if header.inexact is None]
        self.num_other = len(folder) - len(plain)
        self.num_small = sum(min(header.size) < side for header in plain)
        fitting = [i for i, header in enumerate(folder.headers) if header.inexact is None and min(header.size) >= side]
        spread = np.linspace(0, len(fitting) - 1, min(len(fitting), MAX_IMAGES)).round().astype(int)
        self.chosen = [fitting[i] for i in spread]

    @property
    def num(self) -> int:
        """How many images serve."""
        return len(self.chosen)

    @property
    def lacking(self) -> str:
        """Why they cannot be compared with, or nothing."""
        if self.num >= MIN_IMAGES:
            return ""
        return f"no gap to real: {self.num:,} of {len(self.folder):,} images serve, {MIN_IMAGES} needed{self._left_out}"

    @cached_property
    def history(self) -> History:
        """Of the images that serve."""
        return history_of([self.folder.headers[i] for i in self.chosen])

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader of a gap to them must know."""
        return (LOSSY,) if self.history.lossy else ()

    def fields(self) -> dict[str, Any]:
        """Protocol fields: which images, how many were left out and why, what compression did to them."""
        return {
            "kind": "real images of a folder, central crops at native size",
            "images_sha256": self.folder.content,
            "crop_px": self.side,
            "num": self.num,
            "num_in_folder": len(self.folder),
            "num_too_small": self.num_small,
            "num_not_8_bit_rgb": self.num_other,
            "history": self.history.text,
            "lossy": self.history.lossy,
            "pairing": "none: the two sides are independent samples",
        }

    def tell(self) -> None:
        """Say what serves and what does not, and warn of lossy compression."""
        name, of = self.folder.folder, f"of {len(self.folder):,} real images"
        if self.lacking:
            log.warning("%s: probes give levels, %s", name, self.lacking)
            return
        log.info(
            "%s: probes compare with the central %s px at native size of %s %s%s; %s",
            *(name, self.side, f"{self.num:,}", of, self._left_out, self.history.text),
        )
        if self.history.lossy:
            log.warning(
                "%s: lossy compression took from the real images' high frequencies and left 8 px block edges: a clean "
                "model reads as too sharp and with weaker grid peaks than real. Compare gaps between models and with "
                "the teacher, not with 0",
                name,
            )

    def batches(self, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The first ``num`` crops, batch by batch, with their positions.

        Yields:
            (B, 3, side, side) float32 in [0, 1] on the CPU, and (B,) int64.

        Raises:
            UsageError: a file that cannot be decoded; it is named.
        """
        positions = torch.arange(self.num if num is None else num)
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.folder.track(positions.split(BATCH), f"{self.folder.folder.name}: probes"):
                files = [self.folder.files[self.chosen[i]] for i in at]
                yield from_uint8(torch.stack(list(pool.map(partial(_crop, self.side), files)))), at.numpy()

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, once per images, crop, fields and code: what ``owner`` reads in them, in the cache folder."""
        key = {"crops": self.fields(), "pillow": PIL.__version__, **fields}
        return keep_array(self.folder.cache, owner, key, make)

    @property
    def _left_out(self) -> str:
        found = {f"shorter than {self.side} px": self.num_small, "not plain 8-bit RGB or grey": self.num_other}
        told = [f"{num:,} {why}" for why, num in found.items() if num]
        return f" ({', '.join(told)})" if told else ""


def _crop(side: int, path: Path) -> Tensor:
    """(3, side, side) uint8."""
    image = open_image(path)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image, dtype=np.uint8)[top : top + side, left : left + side]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
