"""A folder of images with captions beside them or in one table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rgbench.data.config import ImageFolderData
from rgbench.data.contract import Batch
from rgbench.data.reading import IMAGE_SUFFIXES, TolerantReader, UnreadableSample, decode_caption, decode_image
from rgbench.errors import UsageError


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
