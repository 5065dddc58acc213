"""Folders of images and open arenas, for the arena's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rgbench.arena.contest import Contest, Sources, open_contest

NAMES = ("alpha-model", "beta-model")


def make_images(folder: Path, num: int = 4, level: int = 0, side: int = 32, texts: Sequence[str] = ()) -> Path:
    """A folder of images with a table; every file names its model in its metadata."""
    folder.mkdir(parents=True)
    told = PngInfo()
    told.add_text("model", folder.name)
    rows = []
    for i in range(num):
        pixels = np.random.default_rng([i, level]).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", pnginfo=told, icc_profile=folder.name.encode())
        rows.append(json.dumps({"file_name": f"{i}.png", "text": texts[i] if texts else f"prompt number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def make_models(root: Path, names: Sequence[str] = NAMES, num: int = 4, **given: object) -> tuple[str, ...]:
    """Folders of images of several models."""
    return tuple(str(make_images(root / name, num, level, **given)) for level, name in enumerate(names))  # type: ignore[arg-type]


@contextmanager
def opened(root: Path, models: Sequence[str]) -> Iterator[Contest]:
    """The arena of some folders, in ``root / "arena"``."""
    with open_contest(root / "arena", Sources(models=tuple(models)), 0) as contest:
        yield contest
