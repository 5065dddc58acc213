"""A data set of the Hugging Face ``datasets`` library: a folder of its own, parquet files, or one on the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.data.config import HFDatasetData
from rgbench.data.contract import Batch
from rgbench.data.reading import TolerantReader, UnreadableSample, decode_caption, decode_image
from rgbench.errors import UsageError

NUM_FINGERPRINTED = 64  # rows whose contents are hashed; all of a data set would take hours


class HFDatasetSource:
    """Rows of one split, in order.

    Images are decoded by rgbench, never by the library, and no code that comes with a data set is run.

    Args:
        section: ``data:`` of the recipe.

    Raises:
        UsageError: the library is not installed, nothing found, no such split or column, or too much that is
            unreadable.
    """

    name = "hf_dataset"

    def __init__(self, section: HFDatasetData) -> None:
        self._section = section
        self._rows = _open(section)
        self.length: int | None = len(self._rows)
        self._reader = TolerantReader(section.path, len(self._rows), self._read)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over the captions and images of some rows; where they lie does not matter."""
        digest = hashlib.sha256()
        for index in np.linspace(0, len(self._rows) - 1, NUM_FINGERPRINTED).astype(int).tolist():
            row = self._rows[index]
            image = row[self._section.image_column] or {}
            digest.update(f"{index} {row[self._section.caption_column]!r} ".encode())
            digest.update(hashlib.sha256(image.get("bytes") or b"").digest())
        about = {"kind": self.name, "resolution": self._section.resolution, "split": self._section.split}
        return about | {"num": self.length, "sha256": digest.hexdigest()}

    def load(self, indices: list[int]) -> Batch:
        """Read, resize and crop the images at ``indices``.

        Raises:
            UsageError: more than 0.1 % are unreadable.
        """
        return self._reader.load(indices)

    def _read(self, index: int) -> tuple[np.ndarray, str, str]:
        row, where = self._rows[index], f"row {index}"
        image, caption = row[self._section.image_column], row[self._section.caption_column]
        if isinstance(caption, list) and caption:
            caption = caption[0]  # of several, the first: which one must not depend on chance
        if image is None or not isinstance(caption, str):
            raise UnreadableSample(f"{where}: no image or no caption")
        source = image["bytes"] if image.get("bytes") else Path(image.get("path") or "")
        return decode_image(source, self._section.resolution, where), decode_caption(caption.encode(), where), where


def _open(section: HFDatasetData) -> Any:
    """The rows, images undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError("data.kind hf_dataset needs the datasets library: pip install 'rgbench[datasets]'") from error
    datasets.disable_progress_bars()
    rows = _split(section, datasets)
    for key in ("image_column", "caption_column"):
        column = getattr(section, key)
        if column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UsageError(f"{section.path}: no column {column!r} (data.{key}); it has {known}")
    if not len(rows):
        raise UsageError(f"{section.path}: split {section.split!r} holds no row")
    return rows.cast_column(section.image_column, datasets.Image(decode=False))


def _split(section: HFDatasetData, datasets: Any) -> Any:
    place = Path(section.path).expanduser()
    try:
        if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
            found = datasets.load_from_disk(str(place))
            return found[section.split] if isinstance(found, datasets.DatasetDict) else found
        files = sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else [str(place)]
        if place.exists() and files:
            return datasets.load_dataset("parquet", data_files=files, split="train")
        if place.exists():
            raise UsageError(f"{place}: neither a folder that save_to_disk wrote nor one with parquet files")
        return datasets.load_dataset(section.path, split=section.split, revision=section.revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"{section.path}: cannot be opened as a data set: {error}") from error
