"""What lossy compression did to real images, read from the headers of their files.

JPEG divides each of an 8 × 8 block's 64 frequencies by a number of its quantisation table and
rounds: the highest ones are lost first. libjpeg scales one table by a quality q in 1 … 100:

    T_q = clamp(⌊(T · s + 50) / 100⌋, 1, 255),   s = ⌊5000 / q⌋ below 50, else 200 − 2 q,   T: ITU-T T.81, table K.1

so q is read back exactly from files that libjpeg wrote; of other tables the nearest mean is taken,
and their number is told. What an image went through before its file was written, no header says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, median

from rgbench.pixel_modes import ImageHeader

LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)  # ITU-T T.81, table K.1
LOSSLESS = ("PNG", "BMP")


@dataclass(frozen=True)
class History:
    """What the files of some images say of their compression.

    Attributes:
        text: formats, how many files of each, JPEG qualities and chroma subsampling.
        lossy: whether any of them is, or may be, lossy.
    """

    text: str
    lossy: bool


def libjpeg_table(quality: int) -> tuple[int, ...]:
    """libjpeg's luma table of a quality in 1 … 100, in natural order."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (entry * scale + 50) // 100)) for entry in LUMA)


@lru_cache(maxsize=4096)
def quality_of(table: tuple[int, ...]) -> tuple[int, bool]:
    """The libjpeg quality whose luma table is nearest in mean, and whether it is that very table."""
    found = min(range(1, 101), key=lambda quality: abs(fmean(libjpeg_table(quality)) - fmean(table)))
    exact = [quality for quality in range(1, 101) if libjpeg_table(quality) == table]
    return (exact[0], True) if exact else (found, False)


def history_of(headers: Sequence[ImageHeader]) -> History:
    """What the headers of some files say."""
    jpegs = [header for header in headers if header.format == "JPEG"]
    parts = [_of_jpeg(jpegs)] if jpegs else []
    parts += [
        f"{name}: {num:,} files, {'lossless, earlier history unknown' if name in LOSSLESS else 'loss unknown'}"
        for name in sorted({header.format for header in headers} - {"JPEG"})
        if (num := sum(header.format == name for header in headers))
    ]
    return History("; ".join(parts), any(header.format not in LOSSLESS for header in headers))


def _of_jpeg(headers: Sequence[ImageHeader]) -> str:
    found = [quality_of(header.table) for header in headers if header.table]
    parts = [f"JPEG: {len(headers):,} files"]
    if found:
        qualities = sorted(quality for quality, _ in found)
        span = f"{qualities[0]}" if qualities[0] == qualities[-1] else f"{qualities[0]} to {qualities[-1]}"
        parts.append(f"libjpeg quality {span}" + (f" (median {median(qualities):g})" if " to " in span else ""))
    if others := sum(not exact for _, exact in found):
        parts.append(f"{others:,} of them by other tables, quality from their mean")
    if samplings := sorted({header.sampling for header in headers if header.sampling}):
        parts.append(f"chroma {' or '.join(samplings)}")
    return ", ".join(parts)
