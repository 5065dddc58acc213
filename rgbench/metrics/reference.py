"""Real images that models are compared with.

    ReferenceScenes  the benchtop's: one scene for each prompt, with its attributes drawn anew
    ReferenceFolder  a user's folder, such as COCO's val2014, for set metrics
    RealCrops        central crops of that folder at native pixels, for probes

A crop is never resized, for interpolation changes the very spectrum that probes read: an image whose shorter side is
below the generated resolution is left out, as is one that 8-bit RGB cannot hold; both are counted.

JPEG divides each of an 8 × 8 block's 64 frequencies by an entry of its quantisation table and rounds: the highest ones
are lost first. libjpeg scales one table by a quality q in 1 … 100:

    T_q = clamp(⌊(T · s + 50) / 100⌋, 1, 255),   s = ⌊5000 / q⌋ below 50, else 200 − 2 q,   T: ITU-T T.81, table K.1

so q is read back exactly from files that libjpeg wrote, and by the nearest mean from others. No header says what an
image went through before its file was written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
from torch import Tensor

from rgbench.benchtop.scenes import Scenes, render, sample_scenes
from rgbench.core.errors import UsageError
from rgbench.core.io import (
    ImageHeader,
    file_stamp,
    inspect_image,
    open_image,
    read_json,
    seal,
    sha256_file,
    unseal,
    write_json_atomic,
)
from rgbench.core.process import available_cores
from rgbench.core.progress import Track, untracked
from rgbench.data.files import IMAGE_SUFFIXES, image_files
from rgbench.data.prompts import PromptSet
from rgbench.metrics.cache import cache_folder, keep_array, read_whole
from rgbench.metrics.features import FeatureNetwork, InputBatch
from rgbench.metrics.statistics import NUM_GROUPS

SPLIT = "test"  # its nuisance stream (jitter, rotation, texture) is never trained on
SCENE_CHUNK = 256
BATCH = 64
NUM_NAMED = 5  # faulty files in a message
MIN_IMAGES = 2 * NUM_GROUPS  # two in each jackknife group
MAX_IMAGES = 5000  # more than a probe's generated images; all of COCO's val2017
LOSSY = "real images were lossy"  # flag of every difference to them
LOSSLESS = ("PNG", "BMP")
LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)  # ITU-T T.81, table K.1

T = TypeVar("T")

log = logging.getLogger(__name__)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] → 0 … 255, rounded: what a lossless 8-bit file holds."""
    return (images * 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 … 255 → float32 in [0, 1]."""
    return images.float() / 255


class ReferenceScenes:
    """One real scene per prompt, with the prompt's attributes.

    Scene i takes its jitter, rotation and texture from position ``start`` + i of the test split's stream, which
    nothing was trained on. Held-out combinations are as frequent as among the prompts.

    Args:
        prompts: of the evaluation.
        cache: folder for what can be computed again.
        track: shows progress over batches.
        start: position of the stream that belongs to the first prompt.
    """

    paired = True  # with the prompts: probes resample both sides together
    flags: tuple[str, ...] = ()

    def __init__(self, prompts: PromptSet, cache: Path, track: Track = untracked, start: int = 0) -> None:
        self.prompts, self.cache, self.track, self.start = prompts, cache, track, start
        self._remembered: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def scenes(self) -> Scenes:
        """The attributes.

        Raises:
            UsageError: a prompt without a scene, or with an impossible one; names it.
        """
        for prompt in self.prompts.prompts:
            if not prompt.scene:
                raise UsageError(
                    f"{self.prompts.name}: prompt {prompt.id!r} has no scene to compare its image with; use the "
                    "benchtop's prompts (no --prompts), a .jsonl with 'scene' in every row, --metric hps, or, for set "
                    "metrics, real images of your own: --reference FOLDER"
                )
        try:
            scenes = Scenes.from_dicts([prompt.scene for prompt in self.prompts.prompts if prompt.scene])
        except ValueError as error:
            raise UsageError(f"{self.prompts.name}: {error}") from error
        two = scenes.count == 2
        for slots in (scenes.shape, scenes.colour, scenes.size):
            wrong = (slots[:, 0] < 0) | ((slots[:, 1] >= 0) != two)
            if wrong.any():
                prompt = self.prompts.prompts[int(wrong.nonzero()[0])]
                raise UsageError(
                    f"{self.prompts.name}: the scene of {prompt.id!r} needs shape, colour and size of one object, "
                    "or of two where its layout is a relation"
                )
        return scenes

    @cached_property
    def images(self) -> Tensor:
        """(n, 3, 64, 64) uint8, in prompt order."""
        spans = torch.arange(len(self.scenes)).split(SCENE_CHUNK)
        tracked = self.track(spans, "real scenes: rendering")
        return torch.cat([to_uint8(render(self.scenes[at], SPLIT, self.start + at.numpy())) for at in tracked])

    @cached_property
    def content(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """sha256 of the attributes in order."""
        rows = json.dumps([prompt.scene for prompt in self.prompts.prompts], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()

    def fields(self) -> dict[str, Any]:
        """Protocol fields: attributes, stream and renderer."""
        first = f"{self.start} + " if self.start else ""
        return {
            "kind": "real scenes with the prompts' attributes",
            "scenes_sha256": self.sha256,
            "num": len(self.prompts),
            "nuisance": f"{SPLIT} split, index = {first}position in the prompt list",
            "renderer": self.remember("renderer", renderer_digest),
        }

    def require(self, metric: str, num: int) -> None:
        """Check that each of at least ``num`` prompts has a scene.

        Raises:
            UsageError: a prompt without a possible scene, or fewer prompts.
        """
        try:
            num_scenes = len(self.scenes)
        except UsageError as error:
            raise UsageError(f"metric {metric}: {error}") from error
        if num_scenes < num:
            raise UsageError(f"metric {metric} needs at least {num} images, not {num_scenes}; raise --num")

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in prompt order."""
        small = network.smallest is not None and network.smallest > self.images.shape[-1]
        for batch in self.track(self.images.split(BATCH), f"real scenes: {network.name} features"):
            yield InputBatch(network.prepare(from_uint8(batch)), small * len(batch))

    def batches(self, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Scenes of the first ``num`` prompts, or of all, with their positions.

        Yields:
            (B, 3, H, W) float32 in [0, 1] on the CPU, and (B,) int64.
        """
        num = len(self) if num is None else num
        for at in self.track(np.array_split(np.arange(num), -(-num // SCENE_CHUNK)), "real scenes: probes"):
            yield from_uint8(self.images[at]), at

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, cached on disk by pixels, fields and code: what ``owner`` reads in these images."""
        return keep_array(self.cache, owner, {"images": self.content, **fields}, make)

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, once per process and key."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]


def renderer_digest() -> str:
    """8 hex digits that change with the renderer, and not with a processor's last bits.

    They hash mean, deviation and mean horizontal step of eight scenes, to three digits.
    """
    images = render(sample_scenes(SPLIT, range(8)), SPLIT, range(8))
    steps = images.diff(dim=-1).abs().mean((1, 2, 3))
    numbers = torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), steps]).flatten().tolist()
    return hashlib.sha256(" ".join(f"{x:.3f}" for x in numbers).encode()).hexdigest()[:8]


class ReferenceFolder:
    """All images of a folder and its subfolders, in order of their paths.

    Each is read as RGB; its EXIF orientation is not applied, as in clean-fid. What 8-bit RGB cannot hold (CMYK,
    transparency, 16 bits) is counted and reported, and refused by :meth:`require_plain`.

    Args:
        folder: of images.
        cache: folder for what can be computed again.
        track: shows progress over batches.

    Raises:
        UsageError: no such folder, or no image in it.
    """

    def __init__(self, folder: Path, cache: Path, track: Track = untracked) -> None:
        self.folder, self.cache, self.track = folder, cache, track
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of reference images")
        self.files = image_files(folder)
        if not self.files:
            raise UsageError(f"{folder}: no reference image found (looked for {', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def content(self) -> str:
        """sha256 of the files' bytes in order, cached by their names, sizes and times of change.

        Raises:
            UsageError: a file cannot be read; names it.
        """
        names = [path.relative_to(self.folder).as_posix() for path in self.files]
        try:
            stamps = [file_stamp(path) for path in self.files]
        except OSError as error:  # such as a link to a file that is gone
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; mend or remove it") from error
        listed = [[name, *stamp] for name, stamp in zip(names, stamps, strict=True)]
        key = hashlib.sha256(json.dumps([str(self.folder.resolve()), listed]).encode()).hexdigest()[:32]
        cached = self.cache / f"folder-{key}.json"
        if found := read_whole(cached, _read_content):
            return found
        digest = hashlib.sha256()
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.track(torch.arange(len(self.files)).split(BATCH), f"{self.folder.name}: hashing"):
                for sha256 in pool.map(sha256_file, [self.files[i] for i in at]):
                    digest.update(f"{sha256}\n".encode())
        cache_folder(self.cache)
        write_json_atomic(cached, seal({"content": digest.hexdigest()}))
        return digest.hexdigest()

    def fields(self) -> dict[str, Any]:
        """Protocol fields: a hash of the images, and how many."""
        return {"kind": "folder of images", "images_sha256": self.content, "num": len(self)}

    @cached_property
    def headers(self) -> list[ImageHeader]:
        """Header of each file, in order.

        Raises:
            UsageError: a file is no image; names it.
        """
        with ThreadPoolExecutor(available_cores()) as pool:
            chunks = self.track(torch.arange(len(self.files)).split(BATCH), f"{self.folder.name}: headers")
            return [header for at in chunks for header in pool.map(inspect_image, [self.files[i] for i in at])]

    def require(self, metric: str, num: int) -> None:
        """Check that there are at least ``num`` images.

        Raises:
            UsageError: there are fewer.
        """
        if len(self) < num:
            raise UsageError(f"{self.folder}: metric {metric} needs at least {num} reference images, not {len(self)}")

    def require_plain(self, side: int) -> None:
        """Check that all images are 8-bit RGB or grey and of the generated images' size.

        A resize of one side alone moves all its frequencies, and a conversion may shift its mean.

        Args:
            side: of the generated images, in pixels.

        Raises:
            UsageError: some are not; names the first.
        """
        headers = list(zip(self.files, self.headers, strict=True))
        faults = [f"{path.name} {header.inexact}" for path, header in headers if header.inexact]
        if faults:
            raise UsageError(
                f"{self.folder}: {len(faults):,} of {len(self):,} reference images are not plain 8-bit RGB or grey "
                f"({_first(faults)}); convert them first"
            )
        sizes = [(path.name, *header.size) for path, header in headers]
        others = [f"{name} {w}×{h}" for name, w, h in sizes if (w, h) != (side, side)]
        if others:
            raise UsageError(
                f"{self.folder}: {len(others):,} of {len(self):,} reference images are not {side}×{side} as the "
                f"generated ones are ({_first(others)}); resize them first, name a --protocol, which resizes both "
                "sides, or measure probes alone (--metric probes), which take native crops"
            )

    def inputs(self, network: FeatureNetwork) -> Iterator[InputBatch]:
        """Batches of a network's inputs, in order.

        Raises:
            UsageError: a file cannot be read; names it.
        """
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.track(torch.arange(len(self)).split(BATCH), f"{self.folder.name}: {network.name} features"):
                batches = list(pool.map(partial(_prepared, network), [self.files[i] for i in at]))
                yield InputBatch(
                    torch.cat([batch.inputs for batch in batches]),
                    sum(batch.num_small for batch in batches),
                    tuple(why for batch in batches for why in batch.converted),
                )


def _read_content(cached: Path) -> str:
    """The hash of a folder's images that was kept; a UsageError where it is damaged."""
    content = unseal(read_json(cached), cached, "remove it")
    if content.keys() != {"content"}:
        raise UsageError(f"{cached}: not the hash of a folder; remove it")
    return str(content["content"])


class RealCrops:
    """Central crops of one size from a folder of real images, which belong to no prompt.

    Args:
        folder: of images.
        side: of the crops, and of the generated images, in pixels.

    Raises:
        UsageError: a file is no image; names it.

    Attributes:
        lacking: why they cannot be compared with; "" where they can.
    """

    paired = False  # probes resample each side by itself

    def __init__(self, folder: ReferenceFolder, side: int) -> None:
        self.folder, self.side = folder, side
        plain = [header for header in folder.headers if header.inexact is None]
        self.num_other = len(folder) - len(plain)
        self.num_small = sum(min(header.size) < side for header in plain)
        fitting = [i for i, header in enumerate(folder.headers) if header.inexact is None and min(header.size) >= side]
        spread = np.linspace(0, len(fitting) - 1, min(len(fitting), MAX_IMAGES)).round().astype(int)
        self.chosen = [fitting[i] for i in spread]
        self.lacking = ""
        if len(self) < MIN_IMAGES:
            self.lacking = (
                f"no gap to real: {len(self):,} of {len(folder):,} images serve, {MIN_IMAGES} needed{self._left_out}"
            )

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def history(self) -> History:
        """Compression of the images that serve."""
        return history_of([self.folder.headers[i] for i in self.chosen])

    @property
    def flags(self) -> tuple[str, ...]:
        """Of every difference to them."""
        return (LOSSY,) if self.history.lossy else ()

    def fields(self) -> dict[str, Any]:
        """Protocol fields: which images, how many were left out and why, their compression."""
        return {
            "kind": "real images of a folder, central crops at native size",
            "images_sha256": self.folder.content,
            "crop_px": self.side,
            "num": len(self),
            "num_in_folder": len(self.folder),
            "num_too_small": self.num_small,
            "num_not_8_bit_rgb": self.num_other,
            "history": self.history.text,
            "lossy": self.history.lossy,
            "pairing": "none: the two sides are independent samples",
        }

    def report(self) -> None:
        """Log which images serve, and warn of lossy compression."""
        name, of = self.folder.folder, f"of {len(self.folder):,} real images"
        if self.lacking:
            log.warning("%s: probes give absolute values, %s", name, self.lacking)
            return
        log.info(
            "%s: probes compare with the central %s px at native size of %s %s%s; %s",
            *(name, self.side, f"{len(self):,}", of, self._left_out, self.history.text),
        )
        if self.history.lossy:
            log.warning(
                "%s: lossy compression removed high frequencies of the real images and added 8 px block edges, so a "
                "clean model reads as too sharp and with weaker grid peaks. Compare models with each other and with "
                "the teacher, not with 0",
                name,
            )

    def batches(self, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The first ``num`` crops, or all, with their positions.

        Yields:
            (B, 3, side, side) float32 in [0, 1] on the CPU, and (B,) int64.

        Raises:
            UsageError: a file cannot be decoded; names it.
        """
        positions = torch.arange(len(self) if num is None else num)
        with ThreadPoolExecutor(available_cores()) as pool:
            for at in self.folder.track(positions.split(BATCH), f"{self.folder.folder.name}: probes"):
                files = [self.folder.files[self.chosen[i]] for i in at]
                yield from_uint8(torch.stack(list(pool.map(partial(_crop, self.side), files)))), at.numpy()

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, cached on disk by images, crop, fields and code: what ``owner`` reads in these images."""
        key = {"crops": self.fields(), "pillow": PIL.__version__, **fields}
        return keep_array(self.folder.cache, owner, key, make)

    @property
    def _left_out(self) -> str:
        reasons = {f"shorter than {self.side} px": self.num_small, "not plain 8-bit RGB or grey": self.num_other}
        counted = [f"{num:,} {why}" for why, num in reasons.items() if num]
        return f" ({', '.join(counted)})" if counted else ""


@dataclass(frozen=True)
class History:
    """Compression of some image files, by their headers.

    Attributes:
        text: formats, how many files of each, JPEG qualities and chroma subsampling.
        lossy: whether any of them is, or may be, lossy.
    """

    text: str
    lossy: bool


def history_of(headers: Sequence[ImageHeader]) -> History:
    """The compression that the headers of some files tell."""
    jpegs = [header for header in headers if header.format == "JPEG"]
    parts = [_jpeg_history(jpegs)] if jpegs else []
    parts += [
        f"{name}: {num:,} files, {'lossless, earlier history unknown' if name in LOSSLESS else 'loss unknown'}"
        for name in sorted({header.format for header in headers} - {"JPEG"})
        if (num := sum(header.format == name for header in headers))
    ]
    return History("; ".join(parts), any(header.format not in LOSSLESS for header in headers))


def libjpeg_table(quality: int) -> tuple[int, ...]:
    """libjpeg's luma table of a quality in 1 … 100, in natural order."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (entry * scale + 50) // 100)) for entry in LUMA)


@lru_cache(maxsize=4096)
def quality_of(table: tuple[int, ...]) -> tuple[int, bool]:
    """The libjpeg quality whose luma table is nearest in mean, and whether it is that very table."""
    nearest = min(range(1, 101), key=lambda quality: abs(fmean(libjpeg_table(quality)) - fmean(table)))
    exact = [quality for quality in range(1, 101) if libjpeg_table(quality) == table]
    return (exact[0], True) if exact else (nearest, False)


def _jpeg_history(headers: Sequence[ImageHeader]) -> str:
    found = [quality_of(header.table) for header in headers if header.table]
    parts = [f"JPEG: {len(headers):,} files"]
    if found:
        qualities = sorted(quality for quality, _ in found)
        span = f"{qualities[0]}" if qualities[0] == qualities[-1] else f"{qualities[0]} to {qualities[-1]}"
        parts.append(f"libjpeg quality {span}" + (f" (median {median(qualities):g})" if " to " in span else ""))
    if others := sum(not exact for _, exact in found):
        parts.append(f"{others:,} of them by other tables, quality from their mean")
    if samplings := sorted({header.sampling for header in headers if header.sampling}):
        parts.append(f"chroma {' or '.join(samplings)}")
    return ", ".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + (", …" if len(names) > NUM_NAMED else "")


def _prepared(network: FeatureNetwork, path: Path) -> InputBatch:
    """A network's input of one file."""
    why = inspect_image(path).inexact
    pixels = np.array(open_image(path), dtype=np.uint8)
    image = from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    small = network.smallest is not None and min(image.shape[-2:]) < network.smallest
    return InputBatch(network.prepare(image), int(small), (f"{path.name}: {why}",) if why else ())


def _crop(side: int, path: Path) -> Tensor:
    """(3, side, side) uint8."""
    image = open_image(path)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image, dtype=np.uint8)[top : top + side, left : left + side]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
