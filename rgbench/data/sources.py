"""Training data: scenes, image folders, webdataset tars; one sampler; prompt sets.

Benchtop scenes as training data: rendered when asked for, without end or in epochs.

A folder of images with captions beside them or in one table.

A data set of the Hugging Face ``datasets`` library: a folder of its own, parquet files, or one on the hub.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rgbench.benchtop.scenes import captions, sample_scenes, scene_batch
from rgbench.core.errors import UsageError
from rgbench.core.registry import resolve
from rgbench.data.batches import IMAGE_SUFFIXES, Batch, TolerantReader, UnreadableSample, decode_caption, decode_image
from rgbench.data.config import HFDatasetData, ImageFolderData, ScenesData

if TYPE_CHECKING:
    from rgbench.data.batches import DataSource
    from rgbench.data.config import DataConfig


def open_source(section: DataConfig) -> DataSource:
    """Open the data source that a recipe's ``data:`` section describes.

    Args:
        section: one of the models in :mod:`rgbench.data.config`, by its ``kind``.

    Raises:
        UsageError: an unknown kind, nothing found at the path, a folder that is not
            what the section says, or more than 0.1 % unreadable samples.
    """
    return resolve("data", section.kind)(section)


def prepare_source(section: DataConfig, part: int, num_parts: int) -> None:
    """Do one rank's share of the work that every rank's :func:`open_source` will then find done.

    Args:
        section: ``data:`` of the recipe.
        part: this rank's number.
        num_parts: ranks.

    Raises:
        UsageError: as :func:`open_source`, for what this rank has looked at.
    """
    if section.kind == "webdataset":
        from rgbench.data.tars import index_part

        index_part(section, part, num_parts)


class ScenesSource:
    """Scenes of one split, by index.

    Args:
        section: ``data:`` of the recipe; its ``num`` gives the length.
    """

    name = "scenes"

    def __init__(self, section: ScenesData):
        self._split = section.split
        self.length: int | None = section.num

    def fingerprint(self) -> dict[str, Any]:
        """Split, length, and a hash over the first captions, which changes when the world does."""
        first = range(64)
        texts = captions(sample_scenes(self._split, first), self._split, first)
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        return {"kind": "scenes", "split": self._split, "num": self.length, "sha256": digest}

    def load(self, indices: list[int]) -> Batch:
        """Render the scenes at ``indices``; (B, 3, 64, 64)."""
        images, scenes = scene_batch(self._split, indices)
        ids = [f"{self._split}/{index}" for index in indices]
        return Batch(images, captions(scenes, self._split, indices), ids)


class ImageFolderSource:
    """Images of a folder and its subfolders, in the order of their names or of the table's rows.

    Args:
        section: ``data:`` of the recipe.

    Raises:
        UsageError: nothing found, a folder of something else, a broken table, or too much that is unreadable.
    """

    name = "image_folder"

    def __init__(self, section: ImageFolderData):
        self._folder = Path(section.path).expanduser()
        self._resolution = section.resolution
        _check_folder(self._folder)
        dropped: list[str] = []
        found = _list_captioned(self._folder, section.captions, dropped)
        if not found and not dropped:
            raise UsageError(_nothing_found(self._folder))
        self._names, self._captions = [name for name, _ in found], [caption for _, caption in found]
        self.length: int | None = len(found)
        self._reader = TolerantReader(str(self._folder), len(found), self._read, dropped)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over names, sizes and captions; where the folder lies does not matter."""
        digest = hashlib.sha256()
        for name, caption in zip(self._names, self._captions, strict=True):
            size = (self._folder / name).stat().st_size
            digest.update(json.dumps([name, size, caption]).encode())
        return {"kind": self.name, "resolution": self._resolution, "num": self.length, "sha256": digest.hexdigest()}

    def load(self, indices: list[int]) -> Batch:
        """Read, resize and crop the images at ``indices``.

        Raises:
            UsageError: more than 0.1 % are unreadable.
        """
        return self._reader.load(indices)

    def _read(self, index: int) -> tuple[np.ndarray, str, str]:
        name = self._names[index]
        return decode_image(self._folder / name, self._resolution, name), self._captions[index], name


def _check_folder(folder: Path) -> None:
    if folder.is_file() and folder.suffix == ".tar":
        raise UsageError(f"{folder}: is a tar, not a folder of images; use kind: webdataset")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; data.path names the folder that holds the images")


def _list_captioned(folder: Path, captions: str, dropped: list[str]) -> list[tuple[str, str]]:
    """(name, caption) of every usable image; the reason of every other goes to ``dropped``."""
    rows = _caption_files(folder) if captions == "txt" else _table(folder, captions)
    found = []
    for name, caption, where in rows:
        try:
            if not (folder / name).is_file():
                raise UnreadableSample(f"{where}: the image {name} does not exist")
            if caption is None:
                raise UnreadableSample(f"{name}: no caption file {Path(name).stem}.txt beside it")
            found.append((name, decode_caption(caption, where)))
        except UnreadableSample as error:
            dropped.append(str(error))
    return found


def _caption_files(folder: Path) -> Iterator[tuple[str, bytes | None, str]]:
    for name in _image_names(folder):
        path = (folder / name).with_suffix(".txt")
        yield name, path.read_bytes() if path.is_file() else None, str(path.relative_to(folder))


def _image_names(folder: Path) -> list[str]:
    """Paths of the images, relative to the folder, sorted; hidden files left out."""
    names = []
    for parent, _, files in os.walk(folder, followlinks=True):
        relative = Path(parent).relative_to(folder)
        names += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)


def _table(folder: Path, table: str) -> Iterator[tuple[str, bytes | None, str]]:
    path = folder / table
    if not path.is_file():
        raise UsageError(f"{path}: no such file, and data.captions says that it holds the captions")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8 text") from error
    for number, row in _jsonl_rows(path, text) if table.endswith(".jsonl") else _csv_rows(path, text):
        where = f"{table}:{number}"
        name, caption = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UsageError(
                f"{path}:{number}: a row needs 'file_name' and 'text', both text; got {sorted(map(str, row))}"
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"{path}:{number}: file_name {name!r} leads out of the folder; name files inside it")
        yield name, caption.encode(), where


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: expected an object with 'file_name' and 'text'")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _nothing_found(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return f"{folder}: holds tars and no images; use kind: webdataset"
    return f"{folder}: no image found (looked for {', '.join(IMAGE_SUFFIXES)} in it and in its subfolders)"


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
