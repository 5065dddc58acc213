"""Benchtop scenes as webdataset tars: the same bytes each time, whole shards or none."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rgbench.errors import UsageError
from rgbench.files import read_json, sha256_file, write_bytes_atomic, write_json_atomic
from rgbench.worlds.captions import captions
from rgbench.worlds.scenes import SPLITS, scene_batch

INDEX_NAME = "index.json"
RENDER_BATCH = 64  # scenes rendered at a time; bounds memory, changes no byte


def export_scenes(out: Path, num: int, split: str = "train", shard_size: int = 1000, quality: int = 95) -> list[Path]:
    """Write the first ``num`` scenes of a split as tars of .jpg, .txt and .json (attributes).

    Training from them (``kind: webdataset``) sees the scenes that ``kind: scenes`` with
    the same ``num`` shows, in the same order for the same seed; only the JPEG differs.
    Chroma is not subsampled: at 64 px it would smear the objects' colours. Shards that
    an earlier call finished are kept, so that an interrupted export goes on.

    Args:
        out: folder for the tars and index.json; made where missing.
        num: scenes to write.
        split: train, test, heldout or all.
        shard_size: scenes per tar.
        quality: JPEG quality, 1 to 100.

    Returns:
        The tars, in order.

    Raises:
        UsageError: an argument out of range, or ``out`` holds another export or foreign tars; nothing is changed.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if num < 1 or shard_size < 1 or not 1 <= quality <= 100:
        raise UsageError(
            f"cannot export {num} scenes in shards of {shard_size} at JPEG quality {quality}; "
            "the first two must be at least 1, quality 1 to 100"
        )
    settings = {"schema_version": 1, "split": split, "num": num, "shard_size": shard_size, "quality": quality}
    done = _finished_shards(out, settings)
    shards: list[dict[str, Any]] = []
    for first in range(0, num, shard_size):
        name = f"{split}-{first // shard_size:06d}.tar"
        count = min(shard_size, num - first)
        if name in done:
            shards.append({"file": name, "num": count, "sha256": done[name]})
            continue
        data = shard_bytes(split, first, count, quality)
        write_bytes_atomic(out / name, data)
        shards.append({"file": name, "num": count, "sha256": hashlib.sha256(data).hexdigest()})
        write_json_atomic(out / INDEX_NAME, {**settings, "shards": shards})
    return [out / shard["file"] for shard in shards]


def _finished_shards(out: Path, settings: dict[str, Any]) -> dict[str, str]:
    """File name → sha256 of the shards that an export with the same settings left whole."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder for the tars")
    index_path = out / INDEX_NAME
    if not index_path.is_file():
        if any(out.glob("*.tar")):
            raise UsageError(f"{out}: holds tars and no {INDEX_NAME}; name another folder")
        write_json_atomic(index_path, {**settings, "shards": []})
        return {}
    index = read_json(index_path)
    found = {key: index.get(key) for key in settings} if isinstance(index, dict) else {}
    if found != settings:
        differing = ", ".join(f"{k} {found.get(k)} (asked: {v})" for k, v in settings.items() if found.get(k) != v)
        raise UsageError(f"{index_path}: another export lies there: {differing}; name another folder")
    return {
        shard["file"]: shard["sha256"]
        for shard in index.get("shards", [])
        if (out / shard["file"]).is_file() and sha256_file(out / shard["file"]) == shard["sha256"]
    }


def shard_bytes(split: str, first: int, count: int, quality: int) -> bytes:
    """One tar of scenes ``first`` to ``first + count``; members carry no time, owner or other trace of the machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(first, first + count, RENDER_BATCH):
            indices = range(start, min(start + RENDER_BATCH, first + count))
            images, scenes = scene_batch(split, indices)
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            texts = captions(scenes, split, indices)
            for row, index in enumerate(indices):
                key = f"{index:09d}"
                attributes = {"split": split, "index": index, **scenes.to_dict(row)}
                _add(tar, f"{key}.jpg", _jpeg(pixels[row], quality))
                _add(tar, f"{key}.txt", texts[row].encode())
                _add(tar, f"{key}.json", json.dumps(attributes).encode())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _jpeg(pixels_HWC: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
