"""Images as a pure function of (prompt id, seed), streamed in batches.

Each image has its own CPU generator, so neither the batch, nor the order, nor a resume
can change its noise. At one batch size the bytes are the same too: a short last batch is
filled up, because the kernels' rounding depends on the batch's size.

Images that exist already, in place of a model: read once to check them, then streamed into the metrics.

Images kept as PNG, with an index that says what each shows.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import (
    INDEX,
    ImageHeader,
    file_stem,
    inspect_image,
    open_image,
    read_json,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from rgbench.core.process import available_bytes, available_cores, lacks_memory
from rgbench.core.progress import Track, untracked
from rgbench.data.prompts import Prompt, PromptSet
from rgbench.evaluate.results import Generation, identify
from rgbench.evaluate.targets import NUM_NAMED, Target, match_images
from rgbench.metrics.reference import to_uint8
from rgbench.models.pipeline import DiffusionModels

BATCH_SIZE = 64
BYTES_PER_PIXEL = 6 * 1024
LCM_STEPS = 4  # of a student without a run (LCM, arXiv 2310.04378)
OTHER_STEPS, OTHER_GUIDANCE = 50, 7.5  # of a pipeline of unknown origin: StableDiffusionPipeline's own

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Sampler settings.

    Attributes:
        sampler: "ddim" or "lcm".
        steps: sampling steps.
        guidance_scale: in the pipelines' form; an LCM student is given w = guidance_scale − 1.
    """

    sampler: str
    steps: int
    guidance_scale: float

    def network_evaluations(self, models: DiffusionModels) -> int:
        """Network evaluations per image: two a step under classifier-free guidance.

        A student with a guidance embedding is told its scale and needs one.
        """
        embedded = self.sampler == "lcm" and models.unet.config.time_cond_proj_dim
        return self.steps * (2 if self.guidance_scale > 1 and not embedded else 1)

    def generation(self, models: DiffusionModels) -> Generation:
        """The generation id and its fields."""
        fields = {
            **asdict(self),
            "resolution": models.resolution,
            "dtype": str(models.dtype).removeprefix("torch."),
            "weights_sha256": models.weights_sha256,
        }
        return Generation(id=identify(f"{self.sampler}{self.steps}", fields), fields=fields)


def settle_sampling(target: Target, models: DiffusionModels, steps: int | None, guidance: float | None) -> Sampling:
    """Sampler settings of a target: what is asked for, else its run's, else its world's, else diffusers'.

    Args:
        target: the model.
        models: it, loaded.
        steps: asked for, or None.
        guidance: asked for, or None.

    Raises:
        UsageError: a student without a run and without ``guidance``, or steps that its sampler cannot take.
    """
    lcm, preset = models.sampler == "lcm", target.preset
    known = target.method != "external" or models.resolution == preset.resolution
    if lcm and guidance is None and not target.sampling:
        raise UsageError(f"{target.folder}: a student without run.json does not say its guidance; give --guidance")
    if steps is None:
        steps = target.sampling.get("steps", LCM_STEPS) if lcm else preset.teacher_steps if known else OTHER_STEPS
    if guidance is None:
        teachers = preset.teacher_guidance if known else OTHER_GUIDANCE
        guidance = target.sampling["guidance_scale"] if lcm else teachers
    chosen = Sampling(models.sampler, steps, float(guidance))
    most = models.original_inference_steps if lcm else len(models.alphas_cumprod)
    if most is not None and not 1 <= chosen.steps <= most:
        raise UsageError(f"{target.name}: cannot sample in {chosen.steps} steps; use 1 to {most}")
    if not np.isfinite(chosen.guidance_scale):
        raise UsageError(f"{target.name}: guidance {chosen.guidance_scale} is not a finite number")
    return chosen


def fitting_batch_size(resolution: int, device: torch.device, available: int | None = None) -> int:
    """How many images fit into memory, a power of two from 1 to 64.

    On a GPU 64, which :class:`ImageStream` halves until it fits. On a CPU by half of the memory that is free, at six
    tensors of the decoder's widest layer at full size (256 float32 channels: 1 KiB a pixel) for each image.

    Args:
        resolution: side in pixels.
        device: where they are made.
        available: bytes of free memory; the machine's by default.
    """
    if device.type != "cpu":
        return BATCH_SIZE
    free = available_bytes() if available is None else available
    fitting = free // 2 // (BYTES_PER_PIXEL * resolution**2)
    return min(BATCH_SIZE, 1 << max(0, fitting.bit_length() - 1))


def noise_seed(prompt_id: str, seed: int) -> int:
    """Seed of an image's generator, 63 bits: the same on every machine, whatever the batch or order."""
    digest = hashlib.sha256(json.dumps([prompt_id, seed]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class ImageBatch:
    """Images of some prompts.

    Attributes:
        images: (B, 3, H, W) uint8, on the model's device.
        prompts: B prompts.
        positions: (B,) int64, their positions in the list.
    """

    images: Tensor
    prompts: Sequence[Prompt]
    positions: np.ndarray


class ImageStream:
    """Images of prompts, batch by batch; counts them and the seconds spent on making them.

    Args:
        models: the model.
        prompts: one image each, from the noise of its seed.
        sampling: sampler settings.
        batch_size: images at once; None for as many as memory allows, at most 64. Halved where a GPU's memory does
            not suffice.
    """

    def __init__(
        self, models: DiffusionModels, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int | None
    ) -> None:
        self.models, self.prompts, self.sampling = models, prompts, sampling
        self.batch_size = min(batch_size or fitting_batch_size(models.resolution, models.device), len(prompts))
        self.num_images, self.seconds = 0, 0.0
        self.generation = sampling.generation(models)
        self.resolution, self.jpeg = models.resolution, None
        self.network_evaluations = sampling.network_evaluations(models)

    @property
    def label(self) -> str:
        """What a progress bar says."""
        settings = self.sampling
        return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}"

    @property
    def images_per_sec(self) -> float | None:
        """Of generation alone; None before the first batch."""
        return self.num_images / self.seconds if self.seconds else None

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.stream(np.arange(len(self.prompts)))

    def stream(self, positions: np.ndarray, step: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch.

        Args:
            positions: in the list.
            step: told after each sampling step of a batch how many images' worth of work was done.
        """
        start = 0
        while start < len(positions):
            at = positions[start : start + self.batch_size]
            batch = [self.prompts[i] for i in at]
            began = time.perf_counter()
            try:
                with self._told(step, len(batch)):
                    images = self._make(batch)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                self._halve(error)
                continue
            self.seconds += time.perf_counter() - began
            start += len(at)
            self.num_images += len(batch)
            yield ImageBatch(images, batch, at)

    @contextmanager
    def _told(self, step: Callable[[float], None] | None, num: int) -> Iterator[None]:
        """Both samplers call the network once a step: a batch of minutes can say how far it is."""
        if step is None:
            yield
            return
        handle = self.models.unet.register_forward_hook(lambda *_: step(num / self.sampling.steps))
        try:
            yield
        finally:
            handle.remove()

    def _halve(self, error: RuntimeError) -> None:
        if self.batch_size == 1:
            raise RgbenchError(
                f"{self.models.path}: one image of {self.resolution} px does not fit into the memory of "
                f"{self.models.device}; free some, or use --device cpu"
            ) from error
        log.warning("%s images at once do not fit into memory; half as many from now on", self.batch_size)
        self.batch_size //= 2
        if self.models.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _make(self, batch: Sequence[Prompt]) -> Tensor:
        filled = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
        generators = [torch.Generator().manual_seed(noise_seed(prompt.id, prompt.seed)) for prompt in filled]
        images = self.models.sample(
            [prompt.text for prompt in filled],
            generators,
            num_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
        )[: len(batch)].float()  # before it is rounded to levels, as in diffusers
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [prompt.id for prompt, fine in zip(batch, finite.tolist(), strict=True) if not fine]
            raise RgbenchError(
                f"{self.models.path}: {len(bad)} of {len(batch)} images hold NaN (first: {bad[0]!r}); "
                "the weights or the sampler settings are broken, nothing was measured"
            )
        return to_uint8(images)


LOSSY = ("JPEG", "WEBP")  # formats; what a file is called does not matter
CHUNK = 256


class GivenImages:
    """The images of a folder, one per prompt.

    Args:
        folder: of images.
        prompts: those whose images are measured.
        known: all that the folder may hold images of.
        seed: of the noise they were made from, as their names say.
        batch_size: images at once, 64 by default.
        track: shows the reading.

    Raises:
        UsageError: see :func:`rgbench.evaluate.targets.match_images`; or images that are damaged, not exactly
            8-bit RGB, not square, or of several sizes. All faults are found before anything is measured, and the
            files named.
    """

    def __init__(
        self,
        folder: Path,
        prompts: PromptSet,
        known: PromptSet,
        seed: int,
        batch_size: int | None,
        track: Track = untracked,
    ) -> None:
        self.prompts, self.batch_size = prompts.prompts, batch_size or BATCH_SIZE
        self.files = match_images(folder, prompts, known, seed)
        self.resolution, digest, formats = _check(folder, self.files, track)
        lossy = [name for name in formats if name in LOSSY]
        self.jpeg = f"as given ({', '.join(lossy)})" if lossy else None
        fields = {
            "sampler": "images",
            "resolution": self.resolution,
            "images_sha256": digest,
            "num": len(self.files),
            "files": formats,
        }
        self.generation = Generation(id=identify("images", fields), fields=fields)
        self.images_per_sec, self.network_evaluations = None, None
        self.label = "images"

    def stream(self, positions: np.ndarray, step: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch; one is read too fast for ``step``."""
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(positions), self.batch_size):
                at = positions[start : start + self.batch_size]
                images = torch.stack(list(pool.map(_decode, [self.files[i] for i in at])))
                yield ImageBatch(images, [self.prompts[i] for i in at], at)


def _decode(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path, exact=True), dtype=np.uint8)).permute(2, 0, 1)


def _check(folder: Path, files: Sequence[Path], track: Track) -> tuple[int, str, list[str]]:
    """Side, content hash and formats of the images; every file is decoded once."""
    digest = hashlib.sha256()
    faults: list[str] = []
    sizes: dict[tuple[int, int], Path] = {}
    formats: set[str] = set()
    with ThreadPoolExecutor(available_cores()) as pool:
        for chunk in track(torch.arange(len(files)).split(CHUNK), f"{folder.name}: reading"):
            for i, (header, found) in zip(chunk.tolist(), pool.map(_inspect, [files[i] for i in chunk]), strict=True):
                if header is None:
                    faults.append(found)
                else:
                    digest.update(f"{i} {found}\n".encode())
                    sizes.setdefault(header.size, files[i])
                    formats.add(header.format)
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:NUM_NAMED])
        more = f"\n  … and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
        raise UsageError(f"{folder}: {len(faults)} of {len(files)} images cannot be measured:{listed}{more}")
    if len(sizes) > 1:
        listed = ", ".join(f"{width}×{height} ({path.name})" for (width, height), path in sizes.items())
        raise UsageError(f"{folder}: images of several sizes: {listed}; figures of a mixture would mean nothing")
    ((width, height),) = sizes
    if width != height:
        raise UsageError(f"{folder}: images of {width}×{height} pixels; square ones are measured: crop them first")
    return width, digest.hexdigest(), sorted(formats)


def _inspect(path: Path) -> tuple[ImageHeader | None, str]:
    """Header and sha256 of a file that can be decoded, or None and what is wrong with it."""
    try:
        open_image(path, exact=True)
        return inspect_image(path), sha256_file(path)
    except (UsageError, OSError) as error:
        return None, str(error)


def png_bytes(image: Tensor) -> bytes:
    """(3, H, W) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(out, format="PNG")
    return out.getvalue()


class Index:
    """``index.json`` of a folder of images: one entry per file, old ones kept.

    Args:
        folder: created with the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / INDEX
        self._entries = self._read()

    def __contains__(self, name: str) -> bool:
        return name in self._entries and (self.folder / name).is_file()

    def add(self, images: Iterable[tuple[str, Tensor, dict[str, Any]]]) -> list[Path]:
        """Store images, then the index.

        Args:
            images: file name, (3, H, W) uint8, and what the entry says besides the name.

        Returns:
            Their files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        added, files = {}, []
        for name, image, about in images:
            files.append(self.folder / name)
            write_bytes_atomic(files[-1], png_bytes(image))
            added[name] = {"file": name, **about}
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # shards of one generation write into one folder
            self._entries = {**self._read(), **added}
            write_json_atomic(self._file, list(self._entries.values()))
        finally:
            os.close(lock)
        return files

    def _read(self) -> dict[str, dict[str, Any]]:
        rows = read_json(self._file) if self._file.is_file() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "file" in row for row in rows):
            raise UsageError(f"{self._file}: not an index of kept images; remove it, and they are kept anew")
        return {row["file"]: row for row in rows}


class KeptImages:
    """The first images of a prompt list, kept for the report's grid.

    Args:
        folder: of one generation.
        prompts: those whose images are kept.
        again: keep them anew, though they are there.

    Attributes:
        positions: of the prompts whose images are missing.
    """

    def __init__(self, folder: Path, prompts: tuple[Prompt, ...], again: bool) -> None:
        self.index = Index(folder)
        missing = [i for i, prompt in enumerate(prompts) if again or self._name(prompt) not in self.index]
        self.positions = np.array(missing, dtype=np.int64)
        self._missing = {(prompts[i].id, prompts[i].seed) for i in missing}

    def keep(self, batch: ImageBatch) -> None:
        """Store the images of a batch that are missing."""
        found = [
            (self._name(prompt), image, about(prompt))
            for prompt, image in zip(batch.prompts, batch.images, strict=True)
            if (prompt.id, prompt.seed) in self._missing
        ]
        if found:
            self.index.add(found)

    def _name(self, prompt: Prompt) -> str:
        return f"{file_stem(prompt.id)}-{prompt.seed}.png"


def about(prompt: Prompt) -> dict[str, Any]:
    """What an index says of an image; its ``noise_seed`` gives the same image in a diffusers pipeline."""
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "seed": prompt.seed,
        "noise_seed": noise_seed(prompt.id, prompt.seed),
    }
