"""Webdataset tars as training data: an index for random access, the source, and the export of benchtop scenes.

A tar is listed once. Its index lies in the user's cache folder under the tar's path, size and times of change, so that
a second start reads the index alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rgbench.benchtop.scenes import SPLITS
from rgbench.benchtop.web import training_batch
from rgbench.core.errors import UsageError
from rgbench.core.io import (
    TarMember,
    file_stamp,
    load_checked,
    open_tar,
    read_json,
    read_member,
    save_checked,
    sha256_file,
    user_cache,
    write_bytes_atomic,
    write_json_atomic,
)
from rgbench.data.batches import Batch
from rgbench.data.config import WebDatasetData
from rgbench.data.files import IMAGE_SUFFIXES, image_files, is_data_name
from rgbench.data.samples import HASHED, TolerantReader, UnreadableSample, decode_caption, decode_image, hash_contents

INDEX_VERSION = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar.

    Attributes:
        keys: (N,) byte strings in tar order, member names up to the first dot of the last part. An array, since 12 M
            Python strings would take 0.8 GB.
        spans: (N, 4) int64: image offset, image bytes, caption offset, caption bytes.
        dropped: reasons of the samples that lack an image or a caption.
    """

    keys: np.ndarray
    spans: np.ndarray
    dropped: list[str]


def index_shard(path: Path) -> ShardIndex:
    """Index one tar, or take its index from the cache where the tar has not changed since.

    Raises:
        UsageError: no such file, compressed, damaged or truncated, or with hostile members.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; data.path takes local tars, and neither URLs nor patterns")
    cached = _cache_path(path)
    if cached.is_file():
        try:
            return _load(cached)
        except UsageError as error:
            log.warning("%s; the index is made again", error)
    index = _build(path)
    try:
        _save(index, cached)
    except OSError as error:
        log.warning("%s: tar index not written: %s", cached, error)
    return index


def _build(path: Path) -> ShardIndex:
    samples: dict[str, list[tuple[str, TarMember]]] = {}
    for member in open_tar(path):
        folder, _, name = member.name.rpartition("/")
        if not all(map(is_data_name, member.name.split("/"))):
            continue
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        samples.setdefault(key, []).append((f".{extension.lower()}", member))
    keys, spans, dropped = [], [], []
    for key, parts in samples.items():
        images = [member for suffix, member in parts if suffix in IMAGE_SUFFIXES]
        texts = [member for suffix, member in parts if suffix == ".txt"]
        if len(images) != 1 or len(texts) != 1:
            held = ", ".join(sorted(suffix for suffix, _ in parts))
            dropped.append(f"{path.name}: sample {key!r} needs one image and one .txt, and holds {held}")
            continue
        keys.append(key)
        spans.append((images[0].offset, images[0].size, texts[0].offset, texts[0].size))
    return ShardIndex(_key_array(keys), np.array(spans, dtype=np.int64).reshape(-1, 4), dropped)


def _cache_path(path: Path) -> Path:
    identity = json.dumps([INDEX_VERSION, str(path.resolve()), *file_stamp(path)])
    return user_cache("tars") / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"


def _save(index: ShardIndex, cached: Path) -> None:
    keys = [key.decode() for key in index.keys.tolist()]
    names = json.dumps([keys, index.dropped]).encode()
    tensors = {
        "spans": torch.from_numpy(index.spans),
        "names": torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy()),
    }
    save_checked(tensors, cached)


def _load(cached: Path) -> ShardIndex:
    tensors, _ = load_checked(cached)
    keys, dropped = json.loads(tensors["names"].numpy().tobytes())
    return ShardIndex(_key_array(keys), tensors["spans"].numpy(), dropped)


def _key_array(keys: list[str]) -> np.ndarray:
    return np.array([key.encode() for key in keys], dtype=np.bytes_)


class WebDatasetSource:
    """Samples of all tars, numbered in the order of tars and members.

    Args:
        section: ``data:`` of the recipe.

    Raises:
        UsageError: no tar found, a folder of something else, a damaged or hostile tar,
            or more than 0.1 % of samples without image, caption or readable content.
    """

    name = "webdataset"

    def __init__(self, section: WebDatasetData):
        self._resolution = section.resolution
        self._shards = _find_shards(section.path)
        where = section.path if isinstance(section.path, str) else f"{len(self._shards)} tars"
        indices = [index_shard(path) for path in self._shards]
        dropped = [reason for index in indices for reason in index.dropped]
        self._keys = [index.keys for index in indices]
        self._spans = [index.spans for index in indices]
        self._ends = np.cumsum([len(keys) for keys in self._keys])
        num = int(self._ends[-1])
        if not num and not dropped:
            raise UsageError(f"{where}: the tars hold no sample (looked for an image and a .txt of one key)")
        self.length: int | None = num
        self._reader = TolerantReader(where, num, self._read, dropped)

    def fingerprint(self) -> dict[str, Any]:
        """Count, and a hash over the tars' names, keys, positions and contents; where they lie does not matter."""
        digest = hashlib.sha256()
        for path, keys, spans in zip(self._shards, self._keys, self._spans, strict=True):
            digest.update(b"\n".join([path.name.encode(), *keys.tolist(), b""]))
            digest.update(spans.tobytes())
        digest.update(hash_contents(self.length or 0, self._contents).encode())
        about = {"kind": self.name, "resolution": self._resolution, "num": self.length}
        return about | {"sha256": digest.hexdigest(), **HASHED}

    def load(self, indices: list[int]) -> Batch:
        """Read, resize and crop the images at ``indices``.

        Raises:
            UsageError: more than 0.1 % are unreadable, or a tar has changed since it was opened.
        """
        return self._reader.load(indices)

    def _read(self, index: int) -> tuple[np.ndarray, str, str]:
        path, key, _ = self._find(index)
        where = f"{path.name}: {key}"
        try:
            image, text = self._contents(index)
        except OSError as error:
            raise UnreadableSample(f"{where}: {error}") from error
        return decode_image(image, self._resolution, where), decode_caption(text, where), f"{path.stem}/{key}"

    def _contents(self, index: int) -> list[bytes]:
        """The bytes of an image and of its caption."""
        path, key, (image_offset, image_size, text_offset, text_size) = self._find(index)
        members = TarMember(key, image_offset, image_size), TarMember(key, text_offset, text_size)
        with open(path, "rb") as file:
            return [read_member(file, member) for member in members]

    def _find(self, index: int) -> tuple[Path, str, list[int]]:
        """A sample's tar, key and span."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        return self._shards[shard], self._keys[shard][within].decode(), self._spans[shard][within].tolist()


def index_part(section: WebDatasetData, part: int, num_parts: int) -> None:
    """Index every ``num_parts``-th tar, from number ``part`` on, into the user's cache folder.

    Raises:
        UsageError: no tar found, or a damaged or hostile one.
    """
    for path in _find_shards(section.path)[part::num_parts]:
        index_shard(path)


def _find_shards(path: str | list[str]) -> list[Path]:
    if isinstance(path, list):
        if not path:
            raise UsageError("data.path: an empty list; name at least one tar")
        return sorted(Path(entry).expanduser() for entry in path)
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    shards = sorted(path for path in place.glob("*.tar") if is_data_name(path.name))
    if shards:
        return shards
    if image_files(place):
        raise UsageError(f"{place}: holds images and no tars; use kind: image_folder")
    compressed = next((file.name for file in sorted(place.iterdir()) if ".tar." in file.name), None)
    hint = f"; {compressed} is compressed, and only plain .tar can be read at random" if compressed else ""
    raise UsageError(f"{place}: no tar found (looked for *.tar in this folder){hint}")


INDEX_NAME = "index.json"
RENDER_BATCH = 64  # scenes rendered at a time; bounds memory, changes no byte


def export_scenes(out: Path, num: int, split: str = "train", shard_size: int = 1000, quality: int = 95) -> list[Path]:
    """Write the first ``num`` scenes of a split as tars of .jpg, .txt and .json (attributes).

    Training from them (``kind: webdataset``) sees the scenes of ``kind: scenes`` with the same ``num``, in the same
    order for the same seed; only the JPEG differs. Chroma is not subsampled: at 64 px it would smear the objects'
    colours. Finished shards of an interrupted export stay.

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
    """File name → sha256 of the whole shards of an earlier export with the same settings."""
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
        differing = ", ".join(f"{k} {found.get(k)}, not {v}" for k, v in settings.items() if found.get(k) != v)
        raise UsageError(f"{index_path}: another export lies there: {differing}; name another folder")
    try:
        listed = {str(shard["file"]): shard["sha256"] for shard in index["shards"]}
    except (KeyError, TypeError) as error:
        raise UsageError(f"{index_path}: damaged; name another folder") from error
    return {
        name: sha256
        for name, sha256 in listed.items()
        if Path(name).name == name and (out / name).is_file() and sha256_file(out / name) == sha256
    }


def shard_bytes(split: str, first: int, count: int, quality: int) -> bytes:
    """One tar of scenes ``first`` to ``first + count``, without time, owner or another trace of the machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(first, first + count, RENDER_BATCH):
            indices = range(start, min(start + RENDER_BATCH, first + count))
            images, scenes, texts = training_batch(split, indices)
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
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
