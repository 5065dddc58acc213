"""Images kept as PNG, with an index that says what each shows."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.errors import UsageError
from rgbench.evaluation.generate import ImageBatch, noise_seed
from rgbench.evaluation.names import INDEX, file_stem
from rgbench.files import read_json, write_bytes_atomic, write_json_atomic


def png_bytes(image: Tensor) -> bytes:
    """(3, H, W) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(out, format="PNG")
    return out.getvalue()


class Index:
    """``index.json`` of a folder of images: one entry per file, old ones kept.

    Args:
        folder: created with the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / INDEX
        self._entries = self._read()

    def __contains__(self, name: str) -> bool:
        return name in self._entries and (self.folder / name).is_file()

    def add(self, images: Iterable[tuple[str, Tensor, dict[str, Any]]]) -> list[Path]:
        """Store images, then the index.

        Args:
            images: file name, (3, H, W) uint8, and what the entry says besides the name.

        Returns:
            Their files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        added, files = {}, []
        for name, image, about in images:
            files.append(self.folder / name)
            write_bytes_atomic(files[-1], png_bytes(image))
            added[name] = {"file": name, **about}
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # shards of one generation write into one folder
            self._entries = {**self._read(), **added}
            write_json_atomic(self._file, list(self._entries.values()))
        finally:
            os.close(lock)
        return files

    def _read(self) -> dict[str, dict[str, Any]]:
        rows = read_json(self._file) if self._file.is_file() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "file" in row for row in rows):
            raise UsageError(f"{self._file}: not an index of kept images; remove it, and they are kept anew")
        return {row["file"]: row for row in rows}


class KeptImages:
    """The first images of a prompt list, kept for the report's grid.

    Args:
        folder: of one generation.
        prompts: those whose images are kept.
        again: keep them anew, though they are there.

    Attributes:
        positions: of the prompts whose images are missing.
    """

    def __init__(self, folder: Path, prompts: tuple[Prompt, ...], again: bool) -> None:
        self.index = Index(folder)
        missing = [i for i, prompt in enumerate(prompts) if again or self._name(prompt) not in self.index]
        self.positions = np.array(missing, dtype=np.int64)
        self._missing = {(prompts[i].id, prompts[i].seed) for i in missing}

    def keep(self, batch: ImageBatch) -> None:
        """Store the images of a batch that are missing."""
        found = [
            (self._name(prompt), image, about(prompt))
            for prompt, image in zip(batch.prompts, batch.images, strict=True)
            if (prompt.id, prompt.seed) in self._missing
        ]
        if found:
            self.index.add(found)

    def _name(self, prompt: Prompt) -> str:
        return f"{file_stem(prompt.id)}-{prompt.seed}.png"


def about(prompt: Prompt) -> dict[str, Any]:
    """What an index says of an image; its ``noise_seed`` gives the same image in a diffusers pipeline."""
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "seed": prompt.seed,
        "noise_seed": noise_seed(prompt.id, prompt.seed),
    }
