"""Sources of training data: benchtop scenes, folders of images, data sets of the Hugging Face library."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rgbench.benchtop.scenes import captions
from rgbench.benchtop.web import described_scenes, training_batch
from rgbench.core.errors import UsageError
from rgbench.core.io import file_stamp
from rgbench.core.registry import resolve
from rgbench.data.batches import Batch, DataSource
from rgbench.data.config import DataConfig, HFDatasetData, ImageFolderData, ScenesData, WebDatasetData
from rgbench.data.files import IMAGE_SUFFIXES, NamedFiles, image_files, read_captions, walk_files
from rgbench.data.samples import (
    HASHED,
    TolerantReader,
    UnreadableSample,
    check_caption,
    decode_caption,
    decode_image,
    hash_contents,
)
from rgbench.data.tars import index_part


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
    """Do one rank's share of the work that every rank's :func:`open_source` then finds done.

    Args:
        section: ``data:`` of the recipe.
        part: this rank's number.
        num_parts: ranks.

    Raises:
        UsageError: as :func:`open_source`, for this rank's share.
    """
    if isinstance(section, WebDatasetData):
        index_part(section, part, num_parts)


class ScenesSource:
    """Benchtop scenes of one split, rendered when they are loaded.

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
        texts = captions(described_scenes(self._split, first), self._split, first)
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        return {"kind": "scenes", "split": self._split, "num": self.length, "sha256": digest}

    def load(self, indices: list[int]) -> Batch:
        """Render the scenes at ``indices``; (B, 3, 64, 64)."""
        images, _, texts = training_batch(self._split, indices)
        return Batch(images, texts, [f"{self._split}/{index}" for index in indices])


class ImageFolderSource:
    """Images of a folder and its subfolders, in the order of their paths or of the table's rows.

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
        found = list(_captioned_images(self._folder, section.captions, dropped))
        if not found and not dropped:
            raise UsageError(_nothing_found(self._folder))
        self._names, self._captions = [name for name, _ in found], [caption for _, caption in found]
        self.length: int | None = len(found)
        self._reader = TolerantReader(str(self._folder), len(found), self._read, dropped)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over names, sizes, captions and contents; where the folder lies does not matter."""
        digest = hashlib.sha256()
        for name, caption in zip(self._names, self._captions, strict=True):
            size = (self._folder / name).stat().st_size
            digest.update(json.dumps([name, size, caption]).encode())
        contents = hash_contents(len(self._names), lambda index: [(self._folder / self._names[index]).read_bytes()])
        digest.update(contents.encode())
        about = {"kind": self.name, "resolution": self._resolution, "num": self.length}
        return about | {"sha256": digest.hexdigest(), **HASHED}

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


def _captioned_images(folder: Path, captions: str, dropped: list[str]) -> Iterator[tuple[str, str]]:
    """Relative path and caption of every usable image; the reason of every other goes to ``dropped``."""
    files = NamedFiles(folder)
    if captions == "txt":
        images = image_files(folder)
        named = Counter(image.with_suffix("") for image in images)
        for image in images:
            name = image.relative_to(folder)
            try:
                if named[image.with_suffix("")] > 1:
                    raise UnreadableSample(f"{name}: another image has its caption file {name.stem}.txt")
                text = files.find(name.with_suffix(".txt").as_posix())
                if text is None:
                    raise UnreadableSample(f"{name}: no caption file {name.stem}.txt beside it")
                yield name.as_posix(), decode_caption(text.read_bytes(), str(text.relative_to(folder)))
            except UnreadableSample as error:
                dropped.append(str(error))
        return
    for caption in read_captions(folder / captions):
        found = files.find(caption.file_name)
        try:
            if found is None:
                raise UnreadableSample(f"{caption.where}: the image {caption.file_name} does not exist")
            yield found.relative_to(folder).as_posix(), check_caption(caption.text, caption.where)
        except UnreadableSample as error:
            dropped.append(str(error))


def _nothing_found(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return f"{folder}: holds tars and no images; use kind: webdataset"
    return f"{folder}: no image found (looked for {', '.join(IMAGE_SUFFIXES)} in it and in its subfolders)"


class HFDatasetSource:
    """Rows of one split of a data set, in order.

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
        self._rows, self._root = _open_rows(section)
        self.length: int | None = len(self._rows)
        self._reader = TolerantReader(section.path, len(self._rows), self._read)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over captions and images of some rows; where they lie does not matter."""
        about = {"kind": self.name, "resolution": self._section.resolution, "split": self._section.split}
        return about | {"num": self.length, "sha256": hash_contents(len(self._rows), self._contents), **HASHED}

    def load(self, indices: list[int]) -> Batch:
        """Read, resize and crop the images at ``indices``.

        Raises:
            UsageError: more than 0.1 % are unreadable.
        """
        return self._reader.load(indices)

    def _contents(self, index: int) -> list[bytes]:
        image, caption = self._row(index)
        try:
            source = self._image(image, "")
        except UnreadableSample:
            source = b""
        return [source if isinstance(source, bytes) else source.read_bytes(), repr(caption).encode()]

    def _read(self, index: int) -> tuple[np.ndarray, str, str]:
        where = f"row {index}"
        image, caption = self._row(index)
        if isinstance(caption, list) and caption:
            caption = caption[0]  # of several, the first: which one must not depend on chance
        if image is None or not isinstance(caption, str):
            raise UnreadableSample(f"{where}: no image or no caption")
        pixels = decode_image(self._image(image, where), self._section.resolution, where)
        return pixels, decode_caption(caption.encode("utf-8", "surrogatepass"), where), where

    def _row(self, index: int) -> tuple[dict[str, Any] | None, Any]:
        row = self._rows[index]
        return row[self._section.image_column], row[self._section.caption_column]

    def _image(self, image: dict[str, Any] | None, where: str) -> bytes | Path:
        """An image's bytes, or its file where that lies in the data set's folder."""
        image = image or {}
        if image.get("bytes"):
            return image["bytes"]
        path = (self._root / (image.get("path") or "")).resolve()
        if not path.is_file() or not path.is_relative_to(self._root.resolve()):
            raise UnreadableSample(f"{where}: image {image.get('path')!r} is no file of the data set {self._root}")
        return path


def _open_rows(section: HFDatasetData) -> tuple[Any, Path]:
    """The rows, images undecoded, and the folder that images without bytes must lie in."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError("data.kind hf_dataset needs the datasets library: pip install 'rgbench[datasets]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs is in what it raises
    place = Path(section.path).expanduser()
    on_hub = not place.exists()
    if on_hub:
        place = _hub_snapshot(section)
    try:
        rows = _load_split(place, section.split, on_hub, datasets)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).split("\n", 1)[0]
        raise UsageError(f"{section.path}: cannot be opened as a data set: {reason}") from error
    for key in ("image_column", "caption_column"):
        column = getattr(section, key)
        if column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UsageError(f"{section.path}: no column {column!r} (data.{key}); it has {known}")
    if not len(rows):
        raise UsageError(f"{section.path}: split {section.split!r} holds no row")
    root = place.parents[1] if on_hub else place if place.is_dir() else place.parent  # the cache links to its blobs
    try:
        return rows.cast_column(section.image_column, datasets.Image(decode=False)), root
    except (pa.ArrowException, ValueError, TypeError) as error:
        column = section.image_column
        raise UsageError(f"{section.path}: column {column!r} (data.image_column) holds no images: {error}") from error


def _load_split(place: Path, split: str, on_hub: bool, datasets: Any) -> Any:
    if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
        found = datasets.load_from_disk(str(place))
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    files = [str(place)]
    if place.is_dir():
        files = sorted(str(p / name) for p, names in walk_files(place) for name in names if name.endswith(".parquet"))
    if not files:
        raise UsageError(f"{place}: neither a folder that save_to_disk wrote nor one with parquet files")
    if on_hub:  # the names of its files say the split
        return datasets.load_dataset(str(place), split=split)
    stamp = str([file_stamp(Path(file)) for file in files])  # the library's cache knows files by one time alone
    return datasets.load_dataset("parquet", data_files=files, split="train", description=stamp)


def _hub_snapshot(section: HFDatasetData) -> Path:
    """The folder of a data set of the hub in the local cache; rgbench downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, revision = section.path, section.revision
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        pinned = ["--revision", revision] if revision else []
        command = shlex.join(["hf", "download", name, "--repo-type", "dataset", *pinned])
        raise UsageError(
            f"data.path {name}: no such file or folder; if it is a data set of the hub, get it with: {command}"
        ) from error
