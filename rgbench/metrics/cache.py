"""Disk cache: folders of what can be computed again, kept out of git, and arrays read in real images.

What was read in real images serves every model that is evaluated after. A damaged file is logged and made again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import rgbench
from rgbench.core.errors import UsageError
from rgbench.core.io import load_checked, save_checked, write_text_atomic

IGNORE = ".gitignore"
CODE = ("metrics", "rewards", "benchtop", "data")  # packages whose change may change a cached value

T = TypeVar("T")

log = logging.getLogger(__name__)


def cache_folder(folder: Path) -> Path:
    """The folder, created where it is missing, with a ``.gitignore`` of all in it.

    Several processes may ask for one folder at once. An existing ``.gitignore`` stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / IGNORE).is_file():
        write_text_atomic(folder / IGNORE, "*\n")
    return folder


def read_whole(path: Path, read: Callable[[Path], T]) -> T | None:
    """What ``read`` gives; None where there is no file, or, with a warning, a damaged one: it must be made again.

    Args:
        path: the file.
        read: raises UsageError where the file cannot be read or its contents do not match their checksum.
    """
    if not path.is_file():
        return None
    try:
        return read(path)
    except UsageError as error:
        log.warning("%s; made again", error)
        return None


def keep_array(folder: Path, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """``make()``, cached by fields, code and versions.

    Args:
        folder: of the cache.
        owner: what computes the array; the file of its class counts as code too, so that a plug-in's change is seen.
        fields: all that the array depends on, JSON values.
        make: gives a float64 array.
    """
    code = [type(owner).__qualname__, _source(type(owner)), code_digest(), torch.__version__]
    key = hashlib.sha256(json.dumps([fields, code], sort_keys=True).encode()).hexdigest()
    path = folder / f"{type(owner).__name__.lower()}-{key[:32]}.safetensors"
    cached = read_whole(path, _read)
    if cached is not None:
        return cached
    array = np.ascontiguousarray(make(), dtype=np.float64)
    cache_folder(folder)
    save_checked({"array": torch.from_numpy(array)}, path)
    return array


@cache
def code_digest() -> str:
    """sha256 of the package's sources that a cached value may depend on."""
    root, digest = Path(rgbench.__file__).parent, hashlib.sha256()
    for path in sorted(path for name in CODE for path in (root / name).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> np.ndarray:
    return load_checked(path)[0]["array"].numpy()


def _source(owner: type) -> str:
    """The text of the file that a class was written in; "" where it has none."""
    try:
        return Path(inspect.getfile(owner)).read_text()
    except (OSError, TypeError):
        return ""
