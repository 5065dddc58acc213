"""Folders of what can be computed again: kept out of git, and made again where a file is not what was written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rgbench.errors import UsageError
from rgbench.writing import write_text_atomic

IGNORE = ".gitignore"

T = TypeVar("T")

log = logging.getLogger(__name__)


def cache_folder(folder: Path) -> Path:
    """The folder, made where it is not there, with a ``.gitignore`` of all in it.

    Processes may ask for one folder at once. A ``.gitignore`` that is there already stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / IGNORE).is_file():
        write_text_atomic(folder / IGNORE, "*\n")
    return folder


def read_whole(path: Path, read: Callable[[], T | None]) -> T | None:
    """What ``read`` gives; None where the file is damaged, which is warned of: it is to be made again.

    Args:
        path: the file, for the warning.
        read: gives None where the contents do not match their checksum, and raises UsageError where the file cannot
            be read at all.
    """
    try:
        found = read()
    except UsageError as error:
        log.warning("%s; made again", error)
        return None
    if found is None:
        log.warning("%s: contents do not match their checksum; made again", path)
    return found
