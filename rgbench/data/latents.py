"""The latents cache: VAE moments and text states of a data set, computed once, read a row at a time.

A cache's name is the hash of its contents: the data's fingerprint, the weights that encoded it, the arithmetic. Another
VAE or a changed data set is another cache; nothing has to be invalidated. Shards are written whole or not at all, and
every row and table has a checksum, since safetensors has none.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import open_safetensors, read_json, save_safetensors_atomic, user_cache, write_json_atomic
from rgbench.data.batches import Batch, DataSource, Encoded
from rgbench.data.config import TeacherData

SCHEMA_VERSION = 2
SHARD_SAMPLES = 256  # about 90 MB of SD1.5's float32 moments and text states
INDEX_NAME = "cache.json"  # written last: with it, the cache is complete
OPEN_SHARDS = 256
TABLES = ("row", "names", "checksums", "text_checksums")  # read whole when a shard is opened
_DAMAGE = (KeyError, IndexError, ValueError, TypeError, RuntimeError, SafetensorError)  # what reading raises on it


def cache_root(folder: str | None = None) -> Path:
    """Where caches lie: the recipe's folder, else the user's cache folder."""
    if folder is not None:
        return Path(folder).expanduser()
    return user_cache("latents")


@dataclass(frozen=True)
class LatentsCache:
    """One cache on disk, complete or in the making.

    Attributes:
        folder: its place.
        identity: what it holds: data fingerprint, hashes of the encoders, arithmetic; JSON-able.
        num: samples.
    """

    folder: Path
    identity: dict[str, Any]
    num: int

    @classmethod
    def at(cls, root: Path, identity: dict[str, Any], num: int) -> LatentsCache:
        """The cache of these contents under ``root``, whether it exists or not."""
        described = json.dumps([SCHEMA_VERSION, SHARD_SAMPLES, identity, num], sort_keys=True, allow_nan=False)
        return cls(root / hashlib.sha256(described.encode()).hexdigest()[:32], identity, num)

    @property
    def is_complete(self) -> bool:
        """Whether every shard was written."""
        return (self.folder / INDEX_NAME).is_file()

    def shards(self) -> Iterator[tuple[Path, range]]:
        """Every shard's file and its samples."""
        for first in range(0, self.num, SHARD_SAMPLES):
            yield self.shard_of(first), range(first, min(first + SHARD_SAMPLES, self.num))

    def shard_of(self, index: int) -> Path:
        """The file that holds a sample."""
        return self.folder / f"{index // SHARD_SAMPLES * SHARD_SAMPLES:09d}.safetensors"

    def write_shard(self, path: Path, batches: list[Batch]) -> None:
        """Write one shard from encoded batches in order, with the text states of each distinct caption once."""
        encoded = [batch.encoded for batch in batches if batch.encoded is not None]
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        mean, std = torch.cat([e.mean for e in encoded]).cpu(), torch.cat([e.std for e in encoded]).cpu()
        states = torch.cat([e.prompt_embeds for e in encoded]).cpu()
        first: dict[str, int] = {}
        for row, prompt in enumerate(prompts):
            first.setdefault(prompt, row)
        rows = {prompt: number for number, prompt in enumerate(first)}
        texts = states[list(first.values())]
        names = json.dumps([prompts, [identity for batch in batches for identity in batch.ids]]).encode()
        tables = {
            "row": torch.tensor([rows[prompt] for prompt in prompts]),
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
            "checksums": torch.tensor([_checksum(m, s) for m, s in zip(mean, std, strict=True)]),
            "text_checksums": torch.tensor([_checksum(text) for text in texts]),
        }
        if any(batch.scores is not None for batch in batches):
            tables["scores"] = torch.cat([batch.scores for batch in batches if batch.scores is not None])
            tables["scores_checksum"] = torch.tensor([_checksum(tables["scores"])])
        tables["tables_checksum"] = torch.tensor([_checksum(*(tables[name] for name in TABLES))])
        save_safetensors_atomic({"mean": mean, "std": std, "prompt_embeds": texts, **tables}, path)

    def complete(self) -> None:
        """Mark it complete; raises ``RgbenchError`` where a shard is missing."""
        missing = [path.name for path, _ in self.shards() if not path.is_file()]
        if missing:
            raise RgbenchError(f"{self.folder}: {len(missing)} shards are missing, first {missing[0]}; run it again")
        index = {"schema_version": SCHEMA_VERSION, "num": self.num, "shard_samples": SHARD_SAMPLES}
        write_json_atomic(self.folder / INDEX_NAME, index | {"identity": self.identity})


class CachedSource:
    """A data source whose samples come encoded from a cache; images are not read at all.

    Args:
        source: what was cached.
        cache: complete.

    Raises:
        UsageError: the cache is not complete, or of another version.
    """

    def __init__(self, source: DataSource, cache: LatentsCache) -> None:
        if not cache.is_complete:
            raise UsageError(f"{cache.folder}: no complete latents cache; make it with: rgbench cache RECIPE")
        index = read_json(cache.folder / INDEX_NAME)
        if not isinstance(index, dict) or index.get("identity") != json.loads(json.dumps(cache.identity)):
            raise UsageError(f"{cache.folder / INDEX_NAME}: describes other contents; remove this folder")
        self.name, self.length = source.name, source.length
        self._source, self._cache = source, cache
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(_Shard)

    def fingerprint(self) -> dict[str, Any]:
        """The data's own: cached or not, it is the same."""
        return self._source.fingerprint()

    def load(self, indices: list[int]) -> Batch:
        """Encoded samples.

        Raises:
            UsageError: a shard is missing or damaged.
        """
        rows = [self._shard(self._cache.shard_of(index)).row(index % SHARD_SAMPLES) for index in indices]
        mean, std, states = (torch.stack(column) for column in zip(*(tensors for tensors, _, _ in rows), strict=True))
        prompts, ids = [prompt for _, prompt, _ in rows], [identity for _, _, identity in rows]
        return Batch(None, prompts, ids, Encoded(mean, std, states))


class TeacherSource:
    """Samples of a teacher, n of each prompt, one after another.

    Args:
        section: ``data:`` of the recipe.

    Attributes:
        scores: float64 (prompts, n); None where they were not scored.

    Raises:
        UsageError: no such cache, not complete, or of something else.
    """

    name = "teacher"

    def __init__(self, section: TeacherData) -> None:
        folder, make = Path(section.path), "make one with: rgbench cache RECIPE --from teacher"
        if not (folder / INDEX_NAME).is_file():
            raise UsageError(f"data.path {folder}: no complete cache of a teacher's samples; {make}")
        index = read_json(folder / INDEX_NAME)
        identity = index.get("identity") if isinstance(index, dict) else None
        if not isinstance(identity, dict) or identity.get("kind") != self.name:
            raise UsageError(f"data.path {folder}: holds no samples of a teacher; {make}")
        self.folder, self._identity = folder, identity
        self.length: int | None = int(index["num"])
        self._cache = LatentsCache(folder, identity, index["num"])
        self._rows = CachedSource(self, self._cache)
        parts = [_Shard(path).scores() for path, _ in self._cache.shards()]
        scored = [part for part in parts if part is not None]
        self.scores = torch.cat(scored).view(-1, identity["samples"]) if scored else None
        if self.scores is not None and not self.scores.isfinite().all():
            raise UsageError(
                f"data.path {folder}: holds a score that is not finite; make it again with another --score"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What was sampled, by what, and how it was scored."""
        return self._identity | {"scores_checksum": None if self.scores is None else _checksum(self.scores)}

    def check_teacher(self, weights_sha256: str, config_sha256: str) -> None:
        """Refuse samples of another teacher.

        Raises:
            UsageError: its weights or its configurations have another sha256.
        """
        if self._identity["teacher"] != {"sha256": weights_sha256, "config_sha256": config_sha256}:
            raise UsageError(
                f"data.path {self.folder}: samples of another teacher than this recipe's model; make them again with: "
                "rgbench cache RECIPE --from teacher"
            )

    def load(self, indices: list[int]) -> Batch:
        """Latents with the scores of their prompts; raises as :class:`CachedSource`."""
        batch, num = self._rows.load(indices), self._identity["samples"]
        if self.scores is None:
            return batch
        at = torch.tensor(indices)
        return replace(batch, scores=self.scores[at // num], rank=at % num)


class _Shard:
    """An open shard.

    Raises:
        UsageError: its tables do not match their checksum.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tensors = path, open_safetensors(path)
        try:
            tables = {name: self.tensors[name][:] for name in TABLES}
            intact = _checksum(*tables.values()) == self.tensors["tables_checksum"][:].item()
        except _DAMAGE as error:
            raise self._damaged("") from error
        if not intact:
            raise self._damaged("")
        self.text_row, self.sums = tables["row"].tolist(), tables["checksums"].tolist()
        self.text_sums = tables["text_checksums"].tolist()
        self.prompts, self.ids = json.loads(tables["names"].numpy().tobytes())

    def scores(self) -> Tensor | None:
        """Of all rows, float64; None where they were not scored."""
        if "scores" not in self.tensors:
            return None
        scores = self.tensors["scores"][:]
        if _checksum(scores) != self.tensors["scores_checksum"][:].item():
            raise self._damaged(" in its scores")
        return scores

    def row(self, number: int) -> tuple[tuple[Tensor, Tensor, Tensor], str, str]:
        text = self.text_row[number]
        try:
            mean, std = self.tensors["mean"][number], self.tensors["std"][number]
            states = self.tensors["prompt_embeds"][text]
        except _DAMAGE as error:
            raise self._damaged(f" in row {number}") from error
        if _checksum(mean, std) != self.sums[number] or _checksum(states) != self.text_sums[text]:
            raise self._damaged(f" in row {number}")
        return (mean, std, states), self.prompts[number], self.ids[number]

    def _damaged(self, where: str) -> UsageError:
        return UsageError(f"{self.path}: damaged{where}; remove this file and run: rgbench cache RECIPE")


def _checksum(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
