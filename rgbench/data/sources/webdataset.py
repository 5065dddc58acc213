"""Webdataset tars as training data: random access through an index, in the order of shards and members."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.data.config import WebDatasetData
from rgbench.data.contract import Batch
from rgbench.data.reading import IMAGE_SUFFIXES, TolerantReader, UnreadableSample, decode_caption, decode_image
from rgbench.data.tar_index import index_shard
from rgbench.errors import UsageError
from rgbench.files import TarMember, read_member


class WebDatasetSource:
    """Samples of all tars, numbered through.

    Args:
        section: ``data:`` of the recipe.

    Raises:
        UsageError: no tar found, a folder of something else, a damaged or hostile tar,
            or more than 0.1 % of samples without image, caption or readable content.
    """

    name = "webdataset"

    def __init__(self, section: WebDatasetData):
        self._resolution = section.resolution
        self._shards = _find_shards(section.path)
        where = section.path if isinstance(section.path, str) else f"{len(self._shards)} tars"
        indices = [index_shard(path) for path in self._shards]
        dropped = [reason for index in indices for reason in index.dropped]
        self._keys = [index.keys for index in indices]
        self._spans = [index.spans for index in indices]
        self._ends = np.cumsum([len(keys) for keys in self._keys])
        num = int(self._ends[-1])
        if not num and not dropped:
            raise UsageError(f"{where}: the tars hold no sample (looked for an image and a .txt of one key)")
        self.length: int | None = num
        self._reader = TolerantReader(where, num, self._read, dropped)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over the tars' names, keys and member positions; where they lie does not matter."""
        digest = hashlib.sha256()
        for path, keys, spans in zip(self._shards, self._keys, self._spans, strict=True):
            digest.update(b"\n".join([path.name.encode(), *keys.tolist(), b""]))
            digest.update(spans.tobytes())
        return {"kind": self.name, "resolution": self._resolution, "num": self.length, "sha256": digest.hexdigest()}

    def load(self, indices: list[int]) -> Batch:
        """Read, resize and crop the images at ``indices``.

        Raises:
            UsageError: more than 0.1 % are unreadable, or a tar has changed since it was opened.
        """
        return self._reader.load(indices)

    def _read(self, index: int) -> tuple[np.ndarray, str, str]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        path, key = self._shards[shard], self._keys[shard][within].decode()
        image_offset, image_size, text_offset, text_size = map(int, self._spans[shard][within])
        where = f"{path.name}: {key}"
        try:
            with open(path, "rb") as file:
                image = read_member(file, TarMember(key, image_offset, image_size))
                text = read_member(file, TarMember(key, text_offset, text_size))
        except OSError as error:
            raise UnreadableSample(f"{where}: {error}") from error
        return decode_image(image, self._resolution, where), decode_caption(text, where), f"{path.stem}/{key}"


def index_part(section: WebDatasetData, part: int, num_parts: int) -> None:
    """Index every ``num_parts``-th tar, from number ``part`` on; the indices are kept in the user's cache folder.

    Raises:
        UsageError: no tar found, or a damaged or hostile one.
    """
    for path in _find_shards(section.path)[part::num_parts]:
        index_shard(path)


def _find_shards(path: str | list[str]) -> list[Path]:
    if isinstance(path, list):
        if not path:
            raise UsageError("data.path: an empty list; name at least one tar")
        return sorted(Path(entry).expanduser() for entry in path)
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    shards = sorted(place.glob("*.tar"))
    if shards:
        return shards
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in place.rglob("*")):
        raise UsageError(f"{place}: holds images and no tars; use kind: image_folder")
    compressed = next((file.name for file in sorted(place.iterdir()) if ".tar." in file.name), None)
    hint = f"; {compressed} is compressed, and only plain .tar can be read at random" if compressed else ""
    raise UsageError(f"{place}: no tar found (looked for *.tar in this folder){hint}")
