"""Images that exist already, in place of a model: read once to check them, then streamed into the metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import PromptSet
from rgbench.errors import UsageError
from rgbench.evaluation.generate import BATCH_SIZE, ImageBatch
from rgbench.evaluation.matching import NUM_NAMED, match_images
from rgbench.evaluation.results import Generation, identify
from rgbench.files import open_image, sha256_file
from rgbench.metrics.tracking import Track, untracked
from rgbench.process import available_cores

LOSSY = (".jpg", ".jpeg", ".webp")
CHUNK = 256


class GivenImages:
    """The images of a folder, one per prompt.

    Args:
        folder: of images.
        prompts: those whose images are measured.
        known: all that the folder may hold images of.
        seed: of the noise they were made from, as their names say.
        batch_size: images at once, 64 by default.
        track: shows the reading.

    Raises:
        UsageError: see :func:`rgbench.evaluation.matching.match_images`; or images that are damaged, not exactly
            8-bit RGB, not square, or of several sizes. All faults are found before anything is measured, and the
            files named.
    """

    def __init__(
        self,
        folder: Path,
        prompts: PromptSet,
        known: PromptSet,
        seed: int,
        batch_size: int | None,
        track: Track = untracked,
    ) -> None:
        self.prompts, self.batch_size = prompts.prompts, batch_size or BATCH_SIZE
        self.files = match_images(folder, prompts, known, seed)
        lossy = sorted({path.suffix.lower() for path in self.files if path.suffix.lower() in LOSSY})
        self.jpeg = f"as given ({', '.join(lossy)})" if lossy else None
        self.resolution, digest = _check(folder, self.files, track)
        fields = {
            "sampler": "images",
            "resolution": self.resolution,
            "images_sha256": digest,
            "num": len(self.files),
            "files": sorted({path.suffix.lower() for path in self.files}),
        }
        self.generation = Generation(id=identify("images", fields), fields=fields)
        self.images_per_sec, self.network_evaluations = None, None
        self.label = "images"

    def stream(self, positions: np.ndarray, step: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch; one is read too fast for ``step``."""
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(positions), self.batch_size):
                at = positions[start : start + self.batch_size]
                images = torch.stack(list(pool.map(_decode, [self.files[i] for i in at])))
                yield ImageBatch(images, [self.prompts[i] for i in at], at)


def _decode(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path, exact=True), dtype=np.uint8)).permute(2, 0, 1)


def _check(folder: Path, files: Sequence[Path], track: Track) -> tuple[int, str]:
    """Side and content hash of the images; every file is decoded once."""
    digest = hashlib.sha256()
    faults: list[str] = []
    sizes: dict[tuple[int, int], Path] = {}
    with ThreadPoolExecutor(available_cores()) as pool:
        for chunk in track(torch.arange(len(files)).split(CHUNK), f"{folder.name}: reading"):
            for i, (size, found) in zip(chunk.tolist(), pool.map(_inspect, [files[i] for i in chunk]), strict=True):
                if size is None:
                    faults.append(found)
                else:
                    digest.update(f"{i} {found}\n".encode())
                    sizes.setdefault(size, files[i])
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:NUM_NAMED])
        more = f"\n  … and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
        raise UsageError(f"{folder}: {len(faults)} of {len(files)} images cannot be measured:{listed}{more}")
    if len(sizes) > 1:
        listed = ", ".join(f"{width}×{height} ({path.name})" for (width, height), path in sizes.items())
        raise UsageError(f"{folder}: images of several sizes: {listed}; figures of a mixture would mean nothing")
    ((width, height),) = sizes
    if width != height:
        raise UsageError(f"{folder}: images of {width}×{height} pixels; square ones are measured: crop them first")
    return width, digest.hexdigest()


def _inspect(path: Path) -> tuple[tuple[int, int] | None, str]:
    """Size and sha256 of a file, or None and what is wrong with it."""
    try:
        return open_image(path, exact=True).size, sha256_file(path)
    except (UsageError, OSError) as error:
        return None, str(error)
