"""Features of real and generated images, shared by the set metrics of one pass.

Features of the reference are cached on disk by the content of the images, the network and the
resize, and read through a memory map: 40,504 images of 2,048 features take no more memory than ten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from rgbench.core.errors import RgbenchError
from rgbench.core.io import read_json, sha256_file, write_chunks_atomic, write_json_atomic
from rgbench.metrics.cache import cache_folder, read_whole

T = TypeVar("T")

NUM_TOLD = 3  # converted images that are named

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputBatch:
    """A network's inputs of some images of a reference.

    Attributes:
        inputs: (B, …).
        num_small: images smaller than the network's crop.
        converted: what is not 8-bit RGB, by file, and why.
    """

    inputs: Tensor
    num_small: int = 0
    converted: tuple[str, ...] = ()


class FeatureNetwork(Protocol):
    """A network and the way from an image to its input.

    Attributes:
        name: in file names.
        suffix: of metric names.
        num_features: d.
        smallest: shortest side that its crop can be taken from; None for any.
    """

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def num_features(self) -> int: ...

    @property
    def smallest(self) -> int | None: ...

    def fields(self) -> dict[str, Any]:
        """Protocol fields: crop, resize, weights."""
        ...

    def prepare(self, images: Tensor) -> Tensor:
        """Inputs of one size, whatever the size of the images (B, 3, H, W) in [0, 1]."""
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
        """Protocol fields: what they are."""
        ...

    def require(self, metric: str, num: int) -> None:
        """Check that ``num`` images at least can be compared with it.

        Raises:
            UsageError: they cannot.
        """
        ...

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in order."""
        ...


class FeatureSet:
    """A network's features of a reference, and of each batch.

    Args:
        reference: the real images.
        network: what sees them.
    """

    def __init__(self, reference: Reference, network: FeatureNetwork) -> None:
        self.reference, self.network = reference, network
        self._last: tuple[Tensor, Tensor] | None = None
        self._remembered: dict[str, Any] = {}

    def fields(self) -> dict[str, Any]:
        """Protocol fields: the reference, the resize of both sides, the network."""
        return {"reference": self.reference.fields(), **self.network.fields()}

    def __call__(self, images: Tensor) -> Tensor:
        """(B, d) features of a batch; asked again for the same tensor, the same features."""
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
        return self.remember("rows", self._read_or_make)[0]

    def num_small(self) -> int:
        """How many images of the reference are smaller than the network's crop, and left uncropped."""
        return int(self.remember("rows", self._read_or_make)[1]["num_small"])

    def num_converted(self) -> int:
        """How many images of the reference are not 8-bit RGB."""
        return int(self.remember("rows", self._read_or_make)[1]["num_converted"])

    def _read_or_make(self) -> tuple[np.ndarray, dict[str, Any]]:
        key = json.dumps([self.reference.content, self.network.fields()], sort_keys=True)
        stem = f"{self.network.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        path = self.reference.cache / f"{stem}.f32"
        about = path.with_suffix(".json")
        there = path.is_file() and about.is_file()
        told = read_whole(path, partial(self._told, path, about)) if there else None
        if told is None:
            cache_folder(path.parent)
            told = {"num_small": 0, "num_converted": 0, "converted": []}
            digest = write_chunks_atomic(path, self._chunks(told))
            write_json_atomic(about, {"sha256": digest, **told})
        rows = np.memmap(path, dtype=np.float32, mode="r").reshape(-1, self.network.num_features)
        self._tell(told)
        return rows, told

    def _tell(self, told: Mapping[str, Any]) -> None:
        num = f"of {len(self.reference):,} reference images"
        if self.network.smallest is not None:
            small, side = told["num_small"], self.network.smallest
            log.info("%s: %s %s have a side under %s px and stay uncropped", self.network.name, f"{small:,}", num, side)
        if told["num_converted"]:
            listed = "; ".join(told["converted"])
            log.warning("%s %s were converted to 8-bit RGB, such as %s", f"{told['num_converted']:,}", num, listed)

    def _chunks(self, found: dict[str, Any]) -> Iterator[bytes]:
        done = 0
        for batch in self.reference.inputs(self.network):
            features = self.network(batch.inputs)
            check_finite(features.numpy(), np.arange(done, done + len(features)), "the reference")
            found["num_small"] += batch.num_small
            found["num_converted"] += len(batch.converted)
            found["converted"] = [*found["converted"], *batch.converted][:NUM_TOLD]
            done += len(features)
            yield features.contiguous().numpy().tobytes()

    def _told(self, path: Path, about: Path) -> dict[str, Any] | None:
        """What was told of kept features; None where they are not whole."""
        size = len(self.reference) * self.network.num_features * 4
        told = read_json(about)
        known = isinstance(told, dict) and "num_converted" in told  # older ones do not say
        return told if known and path.stat().st_size == size and told.get("sha256") == sha256_file(path) else None


def check_finite(values: np.ndarray, positions: np.ndarray, where: str) -> None:
    """Refuse features that hold NaN or infinity.

    Raises:
        RgbenchError: they do; names the first image.
    """
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise RgbenchError(f"features of image {positions[~finite][0]} of {where} are not finite; nothing was measured")


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
