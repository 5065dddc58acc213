"""Index of webdataset tars: where each sample's image and caption lie, for O(1) access.

A tar is listed once; what was found is kept in the user's cache folder
(``$XDG_CACHE_HOME/rgbench/tars``, else ``~/.cache/rgbench/tars``) under the tar's
path, size and time of change, so that a second start reads the index alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rgbench.data.reading import IMAGE_SUFFIXES
from rgbench.errors import UsageError
from rgbench.files import TarMember, load_safetensors, open_tar, save_safetensors_atomic

BLOCK_BYTES = 512
INDEX_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one tar.

    Attributes:
        keys: (N,) byte strings in tar order: member names up to the first dot of the last part. An array,
            because 12 M Python strings would take 0.8 GB.
        spans: (N, 4) int64: image offset, image bytes, caption offset, caption bytes.
        dropped: reasons of the samples that lack an image or a caption.
    """

    keys: np.ndarray
    spans: np.ndarray
    dropped: list[str]


def index_shard(path: Path) -> ShardIndex:
    """Index of one tar, from the cache where the tar has not changed since.

    Raises:
        UsageError: no such file, compressed, damaged or truncated, or with hostile members.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; data.path takes local tars, and neither URLs nor patterns")
    cached = _cache_path(path)
    if cached.is_file():
        try:
            return _load(cached)
        except (UsageError, KeyError, ValueError) as error:
            logger.warning("tar index made again: %s", error)
    index = _build(path)
    try:
        _save(index, cached)
    except OSError as error:
        logger.warning("%s: tar index not kept: %s", cached, error)
    return index


def _build(path: Path) -> ShardIndex:
    members = open_tar(path)
    _check_end(path, members)
    samples: dict[str, dict[str, TarMember]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):  # macOS resource forks and the like
            continue
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        samples.setdefault(key, {})[f".{extension.lower()}"] = member
    keys, spans, dropped = [], [], []
    for key, parts in samples.items():
        images = [parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts]
        text = parts.get(".txt")
        if len(images) != 1 or text is None:
            held = ", ".join(sorted(parts))
            dropped.append(f"{path.name}: sample {key!r} needs one image and one .txt, and holds {held}")
            continue
        keys.append(key)
        spans.append((images[0].offset, images[0].size, text.offset, text.size))
    return ShardIndex(_key_array(keys), np.array(spans, dtype=np.int64).reshape(-1, 4), dropped)


def _check_end(path: Path, members: list[TarMember]) -> None:
    """Python's tarfile takes a broken header after the first for the end, and so would lose samples in silence."""
    end = max((m.offset + m.size for m in members), default=0)
    end += -end % BLOCK_BYTES
    with open(path, "rb") as file:
        file.seek(end)
        after = file.read(BLOCK_BYTES)
    if len(after) < BLOCK_BYTES or any(after):
        raise UsageError(f"{path}: no end mark after byte {end}: truncated or damaged; fetch or write it again")


def _cache_path(path: Path) -> Path:
    stat = path.stat()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    identity = json.dumps([INDEX_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return root / "rgbench" / "tars" / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"


def _save(index: ShardIndex, cached: Path) -> None:
    keys = [key.decode() for key in index.keys.tolist()]
    names = json.dumps([keys, index.dropped]).encode()
    tensors = {
        "spans": torch.from_numpy(index.spans),
        "names": torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy()),
    }
    save_safetensors_atomic(tensors, cached)


def _load(cached: Path) -> ShardIndex:
    tensors = load_safetensors(cached)
    keys, dropped = json.loads(tensors["names"].numpy().tobytes())
    spans = tensors["spans"].numpy()
    if spans.shape != (len(keys), 4):
        raise ValueError(f"{cached}: {len(keys)} keys and spans of shape {spans.shape}")
    return ShardIndex(_key_array(keys), spans, dropped)


def _key_array(keys: list[str]) -> np.ndarray:
    return np.array([key.encode() for key in keys], dtype=np.bytes_)
