"""The latents cache: VAE moments and text states of a data set, computed once, read a row at a time.

A cache's name is the hash of its contents: the data's fingerprint, the weights that encoded it, the arithmetic. Another
VAE or a changed data set is another cache; nothing has to be invalidated. Shards are written whole or not at all, and
every row and table has a checksum, since safetensors has none.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import (
    open_safetensors,
    read_json,
    read_safetensors_metadata,
    save_safetensors_atomic,
    seal,
    unseal,
    user_cache,
    write_json_atomic,
)
from rgbench.data.batches import Batch, DataSource, Encoded
from rgbench.data.config import TeacherData

SCHEMA_VERSION = 2
SHARD_SAMPLES = 256  # about 90 MB of SD1.5's float32 moments and text states
INDEX_NAME = "cache.json"  # written last: with it, the cache is complete
OPEN_SHARDS = 256
ROWS = ("mean", "std", "prompt_embeds")  # read a row at a time
SCORES = ("scores", "scores_checksum")  # of a teacher's samples, where they were scored
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
        made = cls(root, identity, num)
        return replace(made, folder=root / made.id)

    @property
    def id(self) -> str:
        """Hash of the contents, which every shard carries."""
        described = [SCHEMA_VERSION, SHARD_SAMPLES, self.identity, self.num]
        text = json.dumps(described, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def is_complete(self) -> bool:
        """Whether every shard was written."""
        return (self.folder / INDEX_NAME).is_file()

    def shards(self) -> list[tuple[Path, range]]:
        """Every shard's file and its samples."""
        return [self.shard(number) for number in range(-(-self.num // SHARD_SAMPLES))]

    def shard(self, number: int) -> tuple[Path, range]:
        """A shard's file and its samples."""
        first = number * SHARD_SAMPLES
        rows = range(first, min(first + SHARD_SAMPLES, self.num))
        return self.folder / f"{first:09d}.safetensors", rows

    def write_shard(self, path: Path, batches: list[Batch]) -> None:
        """Write one shard from encoded batches in order, with the text states of each distinct caption once.

        Raises:
            RgbenchError: latents or text states that are not finite.
        """
        encoded = [batch.encoded for batch in batches if batch.encoded is not None]
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        mean, std = torch.cat([e.mean for e in encoded]).cpu(), torch.cat([e.std for e in encoded]).cpu()
        states = torch.cat([e.prompt_embeds for e in encoded]).cpu()
        for name, values in (("latents", mean), ("latents", std), ("text states", states)):
            finite = values.isfinite().flatten(1).all(1)
            if not finite.all():
                whose = prompts[int(finite.int().argmin())]
                raise RgbenchError(f"{path}: the {name} of {whose!r:.80} are not finite; use another train.dtype")
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
        own = {"cache": self.id, "shard": path.name}
        save_safetensors_atomic({"mean": mean, "std": std, "prompt_embeds": texts, **tables}, path, own)

    def complete(self) -> None:
        """Mark it complete; raises ``RgbenchError`` where a shard is missing."""
        missing = [path.name for path, _ in self.shards() if not path.is_file()]
        if missing:
            raise RgbenchError(f"{self.folder}: {len(missing)} shards are missing, first {missing[0]}; run it again")
        index = {"schema_version": SCHEMA_VERSION, "num": self.num, "shard_samples": SHARD_SAMPLES}
        write_json_atomic(self.folder / INDEX_NAME, seal(index | {"identity": self.identity}))


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
        if _read_index(cache.folder).get("identity") != json.loads(json.dumps(cache.identity)):
            raise UsageError(f"{cache.folder / INDEX_NAME}: describes other contents; remove this folder")
        self.name, self.length = source.name, source.length
        self._source, self._cache = source, cache
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(partial(_Shard, cache))

    def fingerprint(self) -> dict[str, Any]:
        """The data's own: cached or not, it is the same."""
        return self._source.fingerprint()

    def load(self, indices: list[int]) -> Batch:
        """Encoded samples.

        Raises:
            UsageError: a shard is missing or damaged.
        """
        rows = [self._shard(index // SHARD_SAMPLES).row(index % SHARD_SAMPLES) for index in indices]
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
        index = _read_index(folder)
        identity = index.get("identity")
        if not isinstance(identity, dict) or identity.get("kind") != self.name:
            raise UsageError(f"data.path {folder}: holds no samples of a teacher; {make}")
        samples, num = identity.get("samples"), index["num"]
        if type(samples) is not int or samples < 1 or num % samples or not isinstance(identity.get("teacher"), dict):
            raise UsageError(f"{folder / INDEX_NAME}: does not say whose samples these are, or how many; {make}")
        self.folder, self._identity = folder, identity
        self.length: int | None = num
        self._cache = LatentsCache(folder, identity, num)
        self._rows = CachedSource(self, self._cache)
        parts = [_Shard(self._cache, number).scores() for number in range(len(self._cache.shards()))]
        scored = [part for part in parts if part is not None]
        if len(scored) not in (0, len(parts)):
            raise UsageError(f"data.path {folder}: a part of its shards is scored; {make}")
        self.scores = torch.cat(scored).view(-1, samples) if scored else None
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
            UsageError: its weights, or its noise schedule, tokenizer or networks' settings, have another sha256.
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


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a complete cache.

    Raises:
        UsageError: damaged, or of another version.
    """
    file, remedy = folder / INDEX_NAME, "remove this folder and run: rgbench cache RECIPE"
    index = unseal(read_json(file), file, remedy)
    if unknown := sorted(index.keys() - {"schema_version", "num", "shard_samples", "identity"}):
        raise UsageError(f"{file}: unknown key {unknown[0]!r}; {remedy}")
    if (index.get("schema_version"), index.get("shard_samples")) != (SCHEMA_VERSION, SHARD_SAMPLES):
        raise UsageError(f"{file}: of another version of rgbench; {remedy}")
    num = index.get("num")
    if type(num) is not int or num < 1:
        raise UsageError(f"{file}: num {num!r:.80} is no number of samples; {remedy}")
    return index


class _Shard:
    """An open shard.

    Args:
        cache: that it belongs to.
        number: of the shard.

    Raises:
        UsageError: its tables do not match their checksum, or it is another shard's or another cache's. Shards of older
            versions do not say whose they are.
    """

    def __init__(self, cache: LatentsCache, number: int) -> None:
        self.path, rows = cache.shard(number)
        self.tensors, own = open_safetensors(self.path), read_safetensors_metadata(self.path)
        if own.keys() & {"cache", "shard"} and own != {"cache": cache.id, "shard": self.path.name}:
            raise UsageError(f"{self.path}: a shard of another cache; remove this file and run: rgbench cache RECIPE")
        try:
            tables = {name: self.tensors[name][:] for name in TABLES}
            others = self.tensors.keys() - {*ROWS, *TABLES, "tables_checksum"}
            intact = _checksum(*tables.values()) == self.tensors["tables_checksum"][:].item() and others <= {*SCORES}
        except _DAMAGE as error:
            raise self._damaged("") from error
        if not intact:
            raise self._damaged("")
        self.text_row, self.sums = tables["row"].tolist(), tables["checksums"].tolist()
        self.text_sums = tables["text_checksums"].tolist()
        self.prompts, self.ids = json.loads(tables["names"].numpy().tobytes())
        if {len(each) for each in (self.prompts, self.ids, self.sums, self.text_row)} != {len(rows)}:
            raise self._damaged(f": holds {len(self.prompts)} samples, not {len(rows)}")

    def scores(self) -> Tensor | None:
        """Of all rows, float64; None where they were not scored."""
        if not self.tensors.keys() & SCORES:
            return None
        if not self.tensors.keys() >= set(SCORES):
            raise self._damaged(" in its scores")
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
