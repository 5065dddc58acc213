"""Unfinished passes over a model's images: what metrics accumulated, in one file for each share of the images.

    results/.partial/{world}/{model}/{generation}/{key}-{K}of{N}.safetensors

The key is a hash of what is measured. A file serves every evaluation of its generation whose metrics and protocols are
all in it, so that values missing after a crash need no new images. The same file is a pause (1of1) and the result of a
shard, which ``rgbench merge`` puts together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rgbench.core.errors import UsageError
from rgbench.core.io import load_checked, read_safetensors_metadata, save_checked
from rgbench.evaluate.config import Shard
from rgbench.evaluate.images import ImageBatch
from rgbench.metrics.base import Metric
from rgbench.metrics.cache import cache_folder, read_whole
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.reference import from_uint8

FOLDER = ".partial"  # under the results


class Pass:
    """One pass over a model's images through some metrics.

    Args:
        folder: of unfinished passes of its generation.
        metrics: they have seen nothing yet.
        rows: features of the images, shared by the set metrics.
        num: positions of the prompt set.
        num_kept: the first images that are kept.

    Attributes:
        seen: (num,) positions whose images the metrics have seen.
        kept: (H, W, 3) uint8 image by position, of the first ``num_kept``.
    """

    def __init__(self, folder: Path, metrics: Sequence[Metric], rows: FeatureRows, num: int, num_kept: int) -> None:
        self.folder, self.metrics, self.rows, self.num_kept = folder, list(metrics), rows, num_kept
        self.seen = np.zeros(num, dtype=bool)
        self.kept: dict[int, np.ndarray] = {}
        self.measured = [[metric.name, *(protocol.id for _, protocol in metric.planned)] for metric in metrics]
        self.key = hashlib.sha256(json.dumps([folder.name, self.measured]).encode()).hexdigest()[:12]
        self._files: set[Path] = set()

    def update(self, batch: ImageBatch, device: torch.device) -> None:
        """Show a batch to the metrics, and keep the first images."""
        images = from_uint8(batch.images).to(device)
        for metric in self.metrics:
            metric.update(images, batch.prompts, batch.positions)
        self.keep(batch)
        self.seen[batch.positions] = True

    def keep(self, batch: ImageBatch) -> None:
        """Keep those of a batch that are among the first."""
        for position, image in zip(batch.positions.tolist(), batch.images, strict=True):
            if position < self.num_kept:
                self.kept[position] = image.permute(1, 2, 0).cpu().numpy()

    def save(self, shard: Shard, about: Mapping[str, Any]) -> Path:
        """Store what was accumulated.

        Args:
            shard: the share of the images.
            about: JSON values that say how it was made.
        """
        positions = np.flatnonzero(self.seen)
        arrays = {"positions": positions}
        for metric in self.metrics:
            arrays |= {f"{metric.name}/{key}": array for key, array in metric.state_dict(positions).items()}
        if self.rows.used:
            arrays["features"] = self.rows.everything()[positions]
        if self.kept:
            arrays |= {
                "kept": np.array(sorted(self.kept)),
                "images": np.stack([self.kept[i] for i in sorted(self.kept)]),
            }
        tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
        path = self._file(shard)
        cache_folder(path.parent)
        metadata = {"about": json.dumps(about), "measured": json.dumps(self.measured)}
        save_checked(tensors, path, metadata)
        self._files.add(path)
        return path

    def load(self, shard: Shard) -> bool:
        """Take in a stored share; whether there was an intact one."""
        found = self._find(shard)
        if found is None:
            return False
        path, tensors = found
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        positions = arrays["positions"]
        assert not self.seen[positions].any(), "one image in two shards"
        for metric in self.metrics:
            prefix = f"{metric.name}/"
            own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            metric.merge_state(positions, own)
        if "features" in arrays:
            self.rows.put(positions, tensors["features"])
        if "kept" in arrays:
            kept = zip(arrays["kept"].tolist(), arrays["images"], strict=True)
            self.kept |= {i: image for i, image in kept if i < self.num_kept}
        self.seen[positions] = True
        self._files.add(path)
        return True

    def forget(self) -> None:
        """Remove the files that this pass wrote or read, once its values are stored."""
        for path in self._files:
            path.unlink(missing_ok=True)

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{self.key}-{shard.index}of{shard.count}.safetensors"

    def _find(self, shard: Shard) -> tuple[Path, dict[str, torch.Tensor]] | None:
        """The file and tensors of a share: of this pass's own file, else of one of more metrics.

        One that lacks what a metric accumulates, as of an older version, is passed over.
        """
        nothing = np.arange(0)
        needed = {f"{metric.name}/{key}" for metric in self.metrics for key in metric.state_dict(nothing)}
        others = sorted(self.folder.glob(f"*-{shard.index}of{shard.count}.safetensors"))
        for path in sorted(others, key=lambda path: path != self._file(shard)):
            if found := read_whole(path, _read):
                tensors, metadata = found
                measured = json.loads(metadata["measured"])
                if all(each in measured for each in self.measured) and needed <= tensors.keys():
                    return path, tensors
        return None


def stored_shards(results: Path) -> dict[Path, dict[str, Any]]:
    """Files of shards under a results folder, and what each says about how it was made.

    Raises:
        UsageError: a damaged file.
    """
    found = {}
    for path in sorted((results / FOLDER).rglob("*of*.safetensors")):
        if path.stem.endswith("-1of1"):
            continue
        found[path] = json.loads(_read(path)[1]["about"])
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a share, checked."""
    if not {"about", "measured"} <= read_safetensors_metadata(path).keys():
        raise UsageError(f"{path}: no shard of an evaluation; remove it")
    return load_checked(path)
