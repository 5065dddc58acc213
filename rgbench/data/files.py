"""Files that users bring: images of a folder, texts, and tables of captions.

Training, prompts and evaluation read them through this file alone, so that all count and read the same.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rgbench.core.errors import UsageError
from rgbench.core.io import normal_form, parse_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
OTHERS_FOLDERS = ("__MACOSX", "@eaDir")  # copies and thumbnails that archives and file servers leave beside images

# Characters that a text holds and nobody sees: controls, byte order marks, zero-width spaces, marks of direction, tags.
INVISIBLE = re.compile(
    "[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_IDLE_JOINER = re.compile(r"(?<![^\x00-\x7f\s])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f\s])")
_BLANK = "\u2800\u3164\u115f\u1160\uffa0"  # letters and symbols that print as nothing
_BROKEN = re.compile("[\x00\ud800-\udfff]")


def walk_files(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders at and below a folder, each once, with the names of their files.

    What is hidden is left out, such as notebooks' copies, and so is what archives and file servers leave. Links to
    folders are followed after the folders themselves: a link that leads back up would give every file many times.

    Raises:
        UsageError: a folder that cannot be read; it is named.
    """
    entered: set[str] = set()
    starts = [folder]
    for start in starts:  # grows by the links that are found
        for parent, folders, names in os.walk(start, onerror=_unreadable):
            real = os.path.realpath(parent)
            folders[:] = [] if real in entered else sorted(name for name in folders if is_data_name(name))
            if real in entered:
                continue
            entered.add(real)
            starts += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            yield Path(parent), sorted(name for name in names if is_data_name(name))


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders, sorted by path; raises as :func:`walk_files`."""
    return sorted(parent / name for parent, names in walk_files(folder) for name in names if is_image_name(name))


def is_image_name(name: str) -> bool:
    """Whether a file may be an image, by its name; its contents decide what it is."""
    return name.lower().endswith(IMAGE_SUFFIXES) and is_data_name(name)


def is_data_name(name: str) -> bool:
    """Whether a file or folder is none that is hidden, or left by archives and file servers."""
    return not name.startswith(".") and name not in OTHERS_FOLDERS


def _unreadable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from error


class NamedFiles:
    """Files of a folder by name, where "é" as one character and as two, as macOS writes it, are the same.

    Args:
        folder: that names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path | None:
        """The file of a relative name, or None."""
        path = self.folder
        for part in PurePosixPath(name).parts:
            path = path / part if (path / part).exists() else path / self._list(path).get(normal_form(part), part)
        return path if path.is_file() else None

    def _list(self, folder: Path) -> dict[str, str]:
        if folder not in self._listed:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            self._listed[folder] = {normal_form(name): name for name in names}
        return self._listed[folder]


def decode_text(data: bytes, where: str | Path) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        UsageError: not UTF-8; names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{where}:{line}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from error


def clean_text(text: str, where: str) -> str:
    """Strip a text and take out what nobody sees in it; what is left is visible or empty.

    Joiners stay between letters of scripts that need them, and in emoji.

    Raises:
        UsageError: it holds NUL or half a character, and so is damaged.
    """
    if broken := _BROKEN.search(text):
        raise UsageError(f"{where}: the text holds U+{ord(broken[0]):04X}, which no text has; repair it")
    seen = _IDLE_JOINER.sub("", INVISIBLE.sub("", text)).strip()
    return seen if seen.strip(_BLANK) else ""


def json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a file with one JSON value a line, each with its 1-based line.

    Raises:
        UsageError: a line that is not strict JSON; it is named.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_json_text(line, f"{path}:{number}")


def parse_json_text(text: str, where: str) -> Any:
    """Parse strict JSON; a UsageError names the place."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from error


class Caption(NamedTuple):
    """A row of a table of captions.

    Attributes:
        file_name: relative path of the image, in the table's spelling.
        text: clean; empty where nothing is to be seen.
        where: ``table:line``, for messages.
    """

    file_name: str
    text: str
    where: str


def read_captions(path: Path) -> list[Caption]:
    """Read a table of captions: ``.jsonl`` objects, or ``.csv`` with a header, of ``file_name`` and ``text``.

    Raises:
        UsageError: no such file, not UTF-8, a row without the two, or one whose file_name is no path below the table's
            folder; the line is named.
    """
    try:
        text = decode_text(path.read_bytes(), path)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the table of captions: {error.strerror}") from error
    rows = json_lines(text, path) if path.suffix == ".jsonl" else _csv_rows(text, path)
    captions = []
    for number, row in rows:
        where = f"{path}:{number}"
        name, caption = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(caption, str):
            found = f", got {sorted(map(str, row))}" if isinstance(row, dict) else ""
            raise UsageError(f"{where}: expected 'file_name' and 'text', both text{found}")
        if not _is_below(name):
            raise UsageError(f"{where}: file_name {name!r:.80} leads out of the folder; name files inside it")
        captions.append(Caption(name, clean_text(caption, where), where))
    return captions


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        check_header(reader.fieldnames or (), path)
        for row in reader:
            if None in row:
                raise UsageError(f"{path}:{reader.line_num}: more cells than columns; quote texts that hold commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def check_header(columns: Sequence[str], path: Path) -> None:
    """Refuse a table two of whose columns have one name: of one, nothing would be read.

    Raises:
        UsageError: names the column.
    """
    if twice := [name for name, num in Counter(columns).items() if name and num > 1]:
        raise UsageError(f"{path}:1: two columns are called {twice[0]!r:.80}; rename or remove one")


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not {"/", ".."} & set(parts) and "\0" not in name and max(map(len, parts)) <= 255
