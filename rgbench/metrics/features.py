"""Features of real and generated images, shared by the set metrics of one pass.

Features of the reference are cached on disk by the content of the images, the network and the resize, and read through
a memory map: 40,504 images of 2,048 features take no more memory than ten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import read_json, seal, sha256_file, unseal, write_chunks_atomic, write_json_atomic
from rgbench.metrics.cache import cache_folder, read_whole

T = TypeVar("T")

NUM_NAMED = 3  # converted images in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputBatch:
    """A network's inputs of some images of a reference.

    Attributes:
        inputs: (B, …).
        num_small: images smaller than the network's crop.
        converted: file and reason of each image that is not 8-bit RGB.
    """

    inputs: Tensor
    num_small: int = 0
    converted: tuple[str, ...] = ()


class FeatureNetwork(Protocol):
    """A network and the way from an image to its input.

    Attributes:
        name: in file names.
        suffix: of metric value names.
        num_features: d.
        smallest: shortest side that its crop can be taken from; None for any.
    """

    name: str
    suffix: str
    num_features: int
    smallest: int | None

    def fields(self) -> dict[str, Any]:
        """Protocol fields: crop, resize, weights."""
        ...

    def prepare(self, images: Tensor) -> Tensor:
        """Inputs of one size from (B, 3, H, W) images in [0, 1] of any size."""
        ...

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, d) float32 features on the CPU."""
        ...


class Reference(Protocol):
    """Real images.

    Attributes:
        cache: folder for what can be computed again.
    """

    cache: Path

    def __len__(self) -> int: ...

    @property
    def content(self) -> str:
        """A hash of the images."""
        ...

    def fields(self) -> dict[str, Any]:
        """Protocol fields."""
        ...

    def require(self, metric: str, num: int) -> None:
        """Check that at least ``num`` images can be compared with it.

        Raises:
            UsageError: they cannot.
        """
        ...

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in order."""
        ...


@dataclass
class _Notes:
    """What was found when the features of a reference were computed; stored beside them."""

    num_small: int = 0
    num_converted: int = 0
    converted: tuple[str, ...] = ()


class FeatureSet:
    """A network's features of a reference, and of each batch.

    Args:
        reference: the real images.
        network: computes the features.
    """

    def __init__(self, reference: Reference, network: FeatureNetwork) -> None:
        self.reference, self.network = reference, network
        self._last: tuple[Tensor, Tensor] | None = None
        self._remembered: dict[str, Any] = {}

    def fields(self) -> dict[str, Any]:
        """Protocol fields: the reference, the resize of both sides, the network."""
        return {"reference": self.reference.fields(), **self.network.fields()}

    def __call__(self, images: Tensor) -> Tensor:
        """(B, d) features of a batch; computed once for one tensor."""
        if self._last is None or self._last[0] is not images:
            self._last = images, self.network(self.network.prepare(images))
        return self._last[1]

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, once per process and key: statistics that every evaluated model is compared with."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def reference_rows(self) -> np.ndarray:
        """(n, d) float32 features of the reference in its order, a read-only memory map."""
        return self._rows_and_notes[0]

    def num_small(self) -> int:
        """How many images of the reference are smaller than the network's crop, and left uncropped."""
        return self._rows_and_notes[1].num_small

    def num_converted(self) -> int:
        """How many images of the reference are not 8-bit RGB."""
        return self._rows_and_notes[1].num_converted

    @cached_property
    def _rows_and_notes(self) -> tuple[np.ndarray, _Notes]:
        key = json.dumps([self.reference.content, self.network.fields()], sort_keys=True)
        stem = f"{self.network.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        path = self.reference.cache / f"{stem}.f32"
        about = path.with_suffix(".json")
        notes = read_whole(about, partial(self._read_notes, path))
        if notes is None:
            cache_folder(path.parent)
            notes = _Notes()
            digest = write_chunks_atomic(path, self._chunks(notes))
            write_json_atomic(about, seal({"features_sha256": digest, **vars(notes)}))
        self._report(notes)
        return np.memmap(path, dtype=np.float32, mode="r").reshape(-1, self.network.num_features), notes

    def _chunks(self, notes: _Notes) -> Iterator[bytes]:
        done = 0
        for batch in self.reference.inputs(self.network):
            features = self.network(batch.inputs)
            check_finite(features.numpy(), np.arange(done, done + len(features)), "the reference")
            notes.num_small += batch.num_small
            notes.num_converted += len(batch.converted)
            notes.converted = (*notes.converted, *batch.converted)[:NUM_NAMED]
            done += len(features)
            yield features.contiguous().numpy().tobytes()

    def _read_notes(self, path: Path, about: Path) -> _Notes:
        """The notes of cached features; a UsageError where they or the features are not whole."""
        content = unseal(read_json(about), about, "remove it")
        digest = content.pop("features_sha256", None)
        size = len(self.reference) * self.network.num_features * 4
        is_whole = path.is_file() and path.stat().st_size == size and digest == sha256_file(path)
        if not is_whole or content.keys() != vars(_Notes()).keys():
            raise UsageError(f"{path}: not the features that {about.name} describes; remove it")
        return _Notes(**content)

    def _report(self, notes: _Notes) -> None:
        of = f"of {len(self.reference):,} reference images"
        if self.network.smallest is not None:
            side, small = self.network.smallest, f"{notes.num_small:,}"
            log.info("%s: %s %s have a side under %s px and stay uncropped", self.network.name, small, of, side)
        if notes.num_converted:
            named = "; ".join(notes.converted)
            log.warning("%s %s were converted to 8-bit RGB, such as %s", f"{notes.num_converted:,}", of, named)


class FeatureRows:
    """(n, d) float32 features by position, on disk, so that memory does not grow with n.

    Args:
        num: positions.
        dim: features per position.
    """

    def __init__(self, num: int, dim: int) -> None:
        self._shape = num, dim
        self._filled = np.zeros(num, dtype=bool)

    @cached_property
    def _array(self) -> np.ndarray:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the array keeps it open
        return np.memmap(file, dtype=np.float32, mode="w+", shape=self._shape)

    @property
    def used(self) -> bool:
        """Whether any features were stored."""
        return bool(self._filled.any())

    def put(self, positions: np.ndarray, features: Tensor) -> None:
        """Store features of some positions.

        Raises:
            RgbenchError: NaN or infinity among them.
        """
        values = features.numpy()
        check_finite(values, positions, "the evaluated set")
        self._array[positions] = values
        self._filled[positions] = True

    def everything(self) -> np.ndarray:
        """(n, d) float32 features of all positions, a memory map; zero where none were stored."""
        return self._array

    def take(self, positions: np.ndarray) -> np.ndarray:
        """(k, d) float64 features at positions."""
        assert self._filled[positions].all(), "features asked for before they were stored"
        return np.asarray(self._array[positions], dtype=np.float64)


def check_finite(values: np.ndarray, positions: np.ndarray, where: str) -> None:
    """Refuse features that hold NaN or infinity.

    Raises:
        RgbenchError: they do; names the first image.
    """
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise RgbenchError(f"features of image {positions[~finite][0]} of {where} are not finite; nothing was measured")
