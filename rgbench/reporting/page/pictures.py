"""Images on the page: each once, as data URIs, all together within a budget of bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from rgbench.files import open_image
from rgbench.metrics.tracking import Track, untracked
from rgbench.reporting.grids import enlarge

SMALL = 128  # images up to this side keep every pixel as long as the budget allows
# (longest side, WebP quality), from the best to the smallest; small images are lossless on the first
LEVELS = ((256, 82), (224, 70), (160, 60), (128, 45))
SAMPLE, HOPELESS = 16, 1.3  # a level is not tried where so many images foretell so many times the budget


class Album:
    """Images by file, encoded at the best of `LEVELS` at which all together fit.

    Args:
        budget: bytes of all data URIs together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._numbers: dict[Path, int] = {}

    def add(self, file: Path) -> int:
        """The image's number; the same file has the same one."""
        return self._numbers.setdefault(file, len(self._numbers))

    def encode(self, track: Track = untracked) -> list[str]:
        """Data URIs by number; at the smallest level they may exceed the budget.

        Args:
            track: shows how far it is.

        Raises:
            UsageError: an image cannot be read.
        """
        for level in range(self._first_level(), len(LEVELS)):
            uris = self._encode_at(level, track)
            if uris is not None:
                return uris
        raise AssertionError("the last level has no limit")

    def _first_level(self) -> int:
        """The level from which on it is worth trying all images, by a sample of them."""
        files = list(self._numbers)
        sample = files[:: max(1, len(files) // SAMPLE)]
        for level in range(len(LEVELS) - 1):
            mean = sum(len(webp_uri(open_image(file), level)) for file in sample) / max(1, len(sample))
            if mean * len(files) < HOPELESS * self.budget:
                return level
        return len(LEVELS) - 1

    def _encode_at(self, level: int, track: Track) -> list[str] | None:
        """None as soon as the budget is spent, but on the last level."""
        uris: list[str] = []
        used = 0
        for file in track(list(self._numbers), "images of the page", "files"):
            uris.append(webp_uri(open_image(file), level))
            used += len(uris[-1])
            if used > self.budget and level < len(LEVELS) - 1:
                return None
        return uris


def webp_uri(image: Image.Image, level: int = 0) -> str:
    """An image as a WebP data URI; small ones without loss at level 0."""
    side, quality = LEVELS[level]
    out = io.BytesIO()
    if max(image.size) <= SMALL and level == 0:
        image.save(out, format="WEBP", lossless=True, quality=40, method=3)
    else:
        smaller = image if max(image.size) <= side else enlarge(image, side)
        smaller.save(out, format="WEBP", quality=quality, method=3)
    return data_uri(out.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a URI that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
