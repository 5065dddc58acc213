"""A folder of real images, such as COCO's val2014: what set metrics compare with, and probes take crops from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rgbench.errors import UsageError
from rgbench.files import inspect_image, open_image, read_json, sha256_file, write_json_atomic
from rgbench.metrics.caching import cache_folder
from rgbench.metrics.features import FeatureNetwork, InputBatch
from rgbench.metrics.reference import BATCH, from_uint8
from rgbench.metrics.tracking import Track, untracked
from rgbench.pixel_modes import ImageHeader
from rgbench.process import available_cores

NUM_NAMED = 5  # of the files at fault, in a message
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ReferenceFolder:
    """All images of a folder and its subfolders, in order of their paths.

    Each is read as RGB; its EXIF orientation is not applied, as in clean-fid. What 8-bit RGB cannot hold (CMYK,
    transparency, 16 bits) is counted and told, and refused by :meth:`require_plain`.

    Args:
        folder: of images.
        cache: folder for what can be computed again.
        track: shows the reading.

    Raises:
        UsageError: no such folder, or no image in it.
    """

    def __init__(self, folder: Path, cache: Path, track: Track = untracked) -> None:
        self.folder, self.cache, self.track = folder, cache, track
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of reference images")
        self.files = sorted(image_files(folder))
        if not self.files:
            raise UsageError(f"{folder}: no reference image found (looked for {', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def content(self) -> str:
        """sha256 over the files' bytes in order; remembered by their names, sizes and times of change.

        Raises:
            UsageError: a file that cannot be read; it is named.
        """
        names = [path.relative_to(self.folder).as_posix() for path in self.files]
        try:
            stats = [path.stat() for path in self.files]
        except OSError as error:  # such as a link to a file that is gone
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; mend or remove it") from error
        listed = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
        key = hashlib.sha256(json.dumps([str(self.folder.resolve()), listed]).encode()).hexdigest()[:32]
        remembered = self.cache / f"folder-{key}.json"
        if remembered.is_file():
            return str(read_json(remembered)["content"])
        digest = hashlib.sha256()
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.track(torch.arange(len(self.files)).split(BATCH), f"{self.folder.name}: hashing"):
                for found in pool.map(sha256_file, [self.files[i] for i in at]):
                    digest.update(f"{found}\n".encode())
        cache_folder(self.cache)
        write_json_atomic(remembered, {"content": digest.hexdigest()})
        return digest.hexdigest()

    def fields(self) -> dict[str, Any]:
        """Protocol fields: a hash of the images, and how many."""
        return {"kind": "folder of images", "images_sha256": self.content, "num": len(self)}

    @cached_property
    def headers(self) -> list[ImageHeader]:
        """Header of each file, in order.

        Raises:
            UsageError: a file that is no image; it is named.
        """
        with ThreadPoolExecutor(available_cores()) as pool:
            chunks = self.track(torch.arange(len(self.files)).split(BATCH), f"{self.folder.name}: headers")
            return [header for at in chunks for header in pool.map(inspect_image, [self.files[i] for i in at])]

    def require(self, metric: str, num: int) -> None:
        """Check that there are at least ``num`` images.

        Raises:
            UsageError: there are fewer.
        """
        if len(self) < num:
            raise UsageError(f"{self.folder}: metric {metric} needs at least {num} reference images, not {len(self)}")

    def require_plain(self, side: int) -> None:
        """Check that all images are 8-bit RGB or grey, and of the generated ones' size.

        Resizing one side alone moves every frequency of it, and a conversion in silence its mean.

        Args:
            side: of the generated images, in pixels.

        Raises:
            UsageError: some are not; the first are named.
        """
        headers = list(zip(self.files, self.headers, strict=True))
        faults = [f"{path.name} {header.inexact}" for path, header in headers if header.inexact]
        if faults:
            raise UsageError(
                f"{self.folder}: {len(faults):,} of {len(self):,} reference images are not plain 8-bit RGB or grey "
                f"({_first(faults)}); convert them first"
            )
        sizes = [(path.name, *header.size) for path, header in headers]
        others = [f"{name} {w}×{h}" for name, w, h in sizes if (w, h) != (side, side)]
        if others:
            raise UsageError(
                f"{self.folder}: {len(others):,} of {len(self):,} reference images are not {side}×{side} as the "
                f"generated ones are ({_first(others)}); resize them first, name a --protocol, which resizes both "
                "sides, or measure probes alone (--metric probes), which take native crops"
            )

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in order.

        Raises:
            UsageError: a file that cannot be read; it is named.
        """
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.track(torch.arange(len(self)).split(BATCH), f"{self.folder.name}: {network.name} features"):
                found = list(pool.map(partial(_prepared, network), [self.files[i] for i in at]))
                yield InputBatch(
                    torch.cat([batch.inputs for batch in found]),
                    sum(batch.num_small for batch in found),
                    tuple(why for batch in found for why in batch.converted),
                )


def image_files(folder: Path) -> Iterator[Path]:
    """Images of a folder and its subfolders, folder by folder, by name; hidden ones are left out.

    Links are followed, last, and into each folder once: one that leads back up would give every image many times.
    """
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(parent))
        links = {name for name in folders if os.path.islink(os.path.join(parent, name))}
        folders[:] = [*sorted(set(folders) - links), *sorted(links)]
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _first(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + (", …" if len(names) > NUM_NAMED else "")


def _prepared(network: FeatureNetwork, path: Path) -> InputBatch:
    """A network's input of one file."""
    why = inspect_image(path).inexact
    pixels = np.array(open_image(path), dtype=np.uint8)
    image = from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    small = network.smallest is not None and min(image.shape[-2:]) < network.smallest
    return InputBatch(network.prepare(image), int(small), (f"{path.name}: {why}",) if why else ())
