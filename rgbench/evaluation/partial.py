"""A pass over images that is not finished: what its metrics gathered so far, in one file.

    results/.partial/{world}/{model}/{generation}/{key}-{K}of{N}.safetensors

The key is a hash of what is being measured. A file serves every evaluation of the same generation whose metrics and
protocols are all in it, so that after a crash the figures that are missing are made without the images. The same file
is a pause (1of1) and a shard's result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rgbench.errors import UsageError
from rgbench.evaluation.record import protocol_of
from rgbench.evaluation.results import Generation
from rgbench.evaluation.shards import Shard
from rgbench.files import load_safetensors, read_safetensors_metadata, save_safetensors_atomic
from rgbench.metrics.caching import cache_folder, read_whole
from rgbench.metrics.carrying import absorb, gathered
from rgbench.metrics.contract import Accumulator
from rgbench.metrics.features import FeatureRows

FOLDER = ".partial"


class Pass:
    """One pass over a generation's images through some metrics.

    Args:
        folder: of unfinished passes of this generation.
        generation: how the images are made.
        metrics: name on the command line, metric.
        rows: features of the evaluated images, shared by the set metrics.
        num: positions of the prompt set.
    """

    def __init__(
        self,
        folder: Path,
        generation: Generation,
        metrics: Sequence[tuple[str, Accumulator]],
        rows: FeatureRows,
        num: int,
    ) -> None:
        self.folder, self.metrics, self.rows = folder, list(metrics), rows
        self.seen = np.zeros(num, dtype=bool)
        self.measured = [[name, *(protocol_of(q).id for q in metric.quantities)] for name, metric in metrics]
        self.key = hashlib.sha256(json.dumps([generation.id, self.measured]).encode()).hexdigest()[:12]
        self._files: set[Path] = set()

    def file(self, shard: Shard) -> Path:
        """Where a share is kept."""
        return self.folder / f"{self.key}-{shard.index}of{shard.count}.safetensors"

    def save(self, shard: Shard, about: Mapping[str, Any]) -> Path:
        """Store what was gathered.

        Args:
            shard: whose it is.
            about: JSON values that say how it was made.
        """
        positions = np.flatnonzero(self.seen)
        arrays = {"positions": positions}
        for name, metric in self.metrics:
            arrays |= {f"{name}/{key}": array for key, array in gathered(metric, positions).items()}
        if self.rows.used:
            arrays["features"] = self.rows.everything()[positions]
        tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
        path = self.file(shard)
        cache_folder(path.parent)
        told = {"about": json.dumps(about), "measured": json.dumps(self.measured)}
        save_safetensors_atomic({**tensors, "sha256": _digest(tensors)}, path, told)
        self._files.add(path)
        return path

    def load(self, shard: Shard) -> bool:
        """Take in a stored share; whether there was one that is whole."""
        path = self._find(shard)
        tensors = read_whole(path, partial(_tensors, path)) if path else None
        if path is None or tensors is None:
            return False
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        positions = arrays["positions"]
        assert not self.seen[positions].any(), "one image in two shards"
        for name, metric in self.metrics:
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            absorb(metric, positions, own)
        if "features" in arrays:
            self.rows.put(positions, tensors["features"])
        self.seen[positions] = True
        self._files.add(path)
        return True

    def _find(self, shard: Shard) -> Path | None:
        """The file of a share: this pass's own, else one of more metrics."""
        others = sorted(self.folder.glob(f"*-{shard.index}of{shard.count}.safetensors"))
        for path in sorted(others, key=lambda path: path != self.file(shard)):
            measured = read_whole(path, partial(_measured, path))
            if measured is not None and all(each in measured for each in self.measured):
                return path
        return None

    def forget(self) -> None:
        """Remove the files that this pass wrote or went on from; its figures are stored."""
        for path in self._files:
            path.unlink(missing_ok=True)


def stored_shards(results: Path) -> dict[Path, dict[str, Any]]:
    """Files of shards under a results folder, and what each says of how it was made.

    Raises:
        UsageError: a damaged file.
    """
    found = {}
    for path in sorted((results / FOLDER).rglob("*of*.safetensors")):
        if path.stem.endswith("-1of1"):
            continue
        told = read_safetensors_metadata(path).get("about")
        if told is None:
            raise UsageError(f"{path}: no shard of an evaluation, for it does not say how it was made; remove it")
        found[path] = json.loads(told)
    return found


def _measured(path: Path) -> list[list[str]]:
    """Metrics and protocols that a share holds; none of a foreign file."""
    measured: list[list[str]] = json.loads(read_safetensors_metadata(path).get("measured", "[]"))
    return measured


def _tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """A share's tensors; None where they do not match their checksum."""
    tensors = load_safetensors(path)
    told = tensors.pop("sha256", torch.empty(0))
    return tensors if torch.equal(told, _digest(tensors)) else None


def _digest(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
