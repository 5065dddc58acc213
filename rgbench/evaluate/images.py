"""Images of a target: made by a model as a pure function of (prompt id, seed), or read from a folder.

Each image has its own CPU generator, so neither batch, order nor resume changes its noise. At one batch size its bytes
are the same too: a short last batch is filled up, because the kernels' rounding depends on the batch's size. The images
of a folder are matched to the prompts one to one; names at fault are listed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import (
    INDEX,
    file_stem,
    inspect_image,
    normal_form,
    open_image,
    read_json,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from rgbench.core.process import available_bytes, available_cores, lacks_memory
from rgbench.core.progress import Track, untracked
from rgbench.data.files import IMAGE_SUFFIXES, clean_text, image_files, read_captions
from rgbench.data.prompts import Prompt, PromptSet
from rgbench.evaluate.results import Generation, SheetImage
from rgbench.evaluate.targets import Target
from rgbench.metrics.reference import to_uint8
from rgbench.models.generic import GenericPipeline
from rgbench.models.pipeline import TEACHER_SAMPLERS, DiffusionModels

BATCH_SIZE = 64
BYTES_PER_PIXEL = 6 * 1024
LCM_STEPS = 4  # of a student without a run (LCM, arXiv 2310.04378)
OTHER_STEPS, OTHER_GUIDANCE = 50, 7.5  # of a pipeline of unknown origin: StableDiffusionPipeline's own
METADATA = "metadata.jsonl"  # the layout of Hugging Face's image folders
SUFFIX_OF = {"PNG": ".png", "BMP": ".bmp", "JPEG": ".jpg", "WEBP": ".webp"}  # by format, whatever a file is called
LOSSY = (".jpg", ".webp")
CHUNK = 256
NUM_NAMED = 10  # names in a message

TextToImage = DiffusionModels | GenericPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Sampler settings.

    Attributes:
        sampler: "ddim", "lcm" or "tcd"; or the scheduler of a pipeline that is called, like "FlowMatchEulerDiscrete".
        steps: sampling steps.
        guidance_scale: in the pipelines' form; a student with a guidance embedding is given w = guidance_scale − 1.
        gamma: γ of TCD's sampler; None for another.
    """

    sampler: str
    steps: int
    guidance_scale: float
    gamma: float | None = None

    def generation(self, models: TextToImage) -> Generation:
        """Everything that decides an image, but prompt and seed."""
        fields = {
            **{key: value for key, value in asdict(self).items() if value is not None},
            "resolution": models.resolution,
            "dtype": str(models.dtype).removeprefix("torch."),
            "weights_sha256": models.weights_sha256,
            "config_sha256": models.config_sha256,
            **models.own_fields(),
        }
        return Generation.of(f"{self.sampler}{self.steps}", fields)


def settle_sampling(target: Target, models: TextToImage, steps: int | None, guidance: float | None) -> Sampling:
    """Sampler settings of a target: those given, else its run's, else its world's, else diffusers' or the pipeline's.

    Args:
        target: the model.
        models: its networks.
        steps: given, or None.
        guidance: given, or None.

    Raises:
        UsageError: a student without a run and without ``guidance``, or steps that its sampler cannot take.
    """
    preset = target.preset
    if isinstance(models, GenericPipeline):
        teacher = {"steps": preset.teacher_steps, "guidance_scale": preset.teacher_guidance} if preset else {}
        own: Mapping[str, Any] = target.sampling or teacher
        steps = own.get("steps") if steps is None else steps
        guidance = own.get("guidance_scale") if guidance is None else guidance
        return Sampling(models.sampler, *models.settle(target.name, steps, guidance))
    is_student = models.sampler not in TEACHER_SAMPLERS
    if is_student and guidance is None and not target.sampling:
        raise UsageError(f"{target.folder}: a student without run.json does not say its guidance; give --guidance")
    if steps is None:
        teacher_steps = preset.teacher_steps if preset else OTHER_STEPS
        steps = target.sampling.get("steps", LCM_STEPS) if is_student else teacher_steps
    if guidance is None:
        teacher_guidance = preset.teacher_guidance if preset else OTHER_GUIDANCE
        guidance = target.sampling["guidance_scale"] if is_student else teacher_guidance
    gamma = target.sampling.get("gamma", models.gamma) if models.sampler == "tcd" else None
    chosen = Sampling(models.sampler, steps, float(guidance), gamma)
    most = models.original_inference_steps if is_student else len(models.schedule)
    if most is not None and not 1 <= chosen.steps <= most:
        raise UsageError(f"{target.name}: cannot sample in {chosen.steps} steps; use 1 to {most}")
    if gamma == 0 and models.segments not in (None, chosen.steps):
        raise UsageError(
            f"{target.name}: a student of {models.segments} segments cannot be sampled in {chosen.steps} steps without "
            f"noise; use {models.segments}, or train one with other mlcm.stages"
        )
    if not np.isfinite(chosen.guidance_scale):
        raise UsageError(f"{target.name}: guidance {chosen.guidance_scale} is not a finite number")
    if chosen.guidance_scale < 1:
        embedded = is_student and models.unet.config.time_cond_proj_dim
        effect = f"the student is given w = {chosen.guidance_scale - 1:g}" if embedded else "images are not guided"
        log.warning("%s: guidance %g is below 1, which is none: %s", target.name, chosen.guidance_scale, effect)
    return chosen


def fitting_batch_size(resolution: int, device: torch.device, available: int | None = None) -> int:
    """How many images fit into memory, a power of two from 1 to 64.

    On a GPU 64, which :class:`ImageStream` halves until it fits. On a CPU by half of the free memory, at six tensors of
    the decoder's widest layer at full size (256 float32 channels: 1 KiB a pixel) for each image.

    Args:
        resolution: side in pixels.
        device: of the networks.
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
    """Images that a model makes of prompts, batch by batch.

    Args:
        models: the model.
        prompts: one image each, from the noise of its seed.
        sampling: sampler settings.
        batch_size: images at once; None for as many as memory allows, at most 64. Halved where a GPU's memory is full.

    Attributes:
        generation: how they are made.
        resolution: their side in pixels.
        jpeg: lossy compression that they went through, as a protocol says it: None.
    """

    def __init__(
        self, models: TextToImage, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int | None
    ) -> None:
        if isinstance(models, DiffusionModels) and sampling.gamma is not None:
            models = replace(models, gamma=sampling.gamma)
        self.models = models
        self.prompts, self.sampling = prompts, sampling
        self.batch_size = min(batch_size or fitting_batch_size(models.resolution, models.device), len(prompts))
        self.num_images, self.seconds = 0, 0.0
        self.generation = sampling.generation(models)
        self.resolution, self.jpeg = models.resolution, None

    @property
    def network_evaluations(self) -> int | None:
        """Per image; None where they are counted and no image was made yet."""
        return self.models.network_evaluations(self.sampling.steps, self.sampling.guidance_scale)

    @property
    def label(self) -> str:
        """Sampler settings, for a progress bar."""
        settings = self.sampling
        return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}"

    @property
    def images_per_sec(self) -> float | None:
        """Rate of generation alone; None before the first batch."""
        return self.num_images / self.seconds if self.seconds else None

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.stream(np.arange(len(self.prompts)))

    def stream(self, positions: np.ndarray, advance: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch.

        Args:
            positions: in the list.
            advance: called after each sampling step of a batch with the number of images' worth of work done.
        """
        start = 0
        while start < len(positions):
            at = positions[start : start + self.batch_size]
            batch = [self.prompts[i] for i in at]
            began = time.perf_counter()
            try:
                with self._counted(advance, len(batch)):
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
    def _counted(self, advance: Callable[[float], None] | None, num: int) -> Iterator[None]:
        """Show the progress within a batch, which may take minutes."""
        if advance is None:
            yield
            return
        with self.models.counted(lambda: advance(num / self.sampling.steps)):
            yield

    def _halve(self, error: RuntimeError) -> None:
        if self.batch_size == 1:
            raise RgbenchError(
                f"{self.models.path}: one image of {self.resolution} px does not fit into the memory of "
                f"{self.models.device}; free some, or use --device cpu"
            ) from error
        self.batch_size //= 2
        log.warning("batches do not fit into memory; halved to %s images", self.batch_size)
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
        )[: len(batch)].float()  # before it is rounded to 8 bits, as in diffusers
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [prompt.id for prompt, fine in zip(batch, finite.tolist(), strict=True) if not fine]
            raise RgbenchError(
                f"{self.models.path}: {len(bad)} of {len(batch)} images hold NaN (first: {bad[0]!r}); check the "
                "weights and the sampler settings"
            )
        return to_uint8(images)


class GivenImages:
    """The images of a folder, one per prompt.

    Args:
        folder: of images.
        prompts: those whose images are measured.
        known: all that the folder may hold images of.
        seed: of the noise they were made from, as their names say.
        batch_size: images at once, 64 by default.
        track: shows progress.

    Raises:
        UsageError: see :func:`match_images`; or images that are damaged, not exactly 8-bit RGB, not square, or of
            several sizes. All faults are found before anything is measured, and the files named.

    Attributes:
        files: the image of each prompt.
        file_sha256: of each file.
        generation, resolution, jpeg: as of :class:`ImageStream`.
    """

    label, images_per_sec, network_evaluations = "images", None, None

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
        self.resolution, self.file_sha256, suffixes = _check(folder, self.files, track)
        lossy = [suffix for suffix in suffixes if suffix in LOSSY]
        self.jpeg = f"as given ({', '.join(lossy)})" if lossy else None
        digest = hashlib.sha256("".join(f"{i} {each}\n" for i, each in enumerate(self.file_sha256)).encode())
        fields = {
            "sampler": "images",
            "resolution": self.resolution,
            "images_sha256": digest.hexdigest(),
            "num": len(self.files),
            "files": suffixes,
        }
        self.generation = Generation.of("images", fields)

    def stream(self, positions: np.ndarray, advance: Callable[[float], None] | None = None) -> Iterator[ImageBatch]:
        """Images at positions of the prompt list, batch by batch; too fast for ``advance``."""
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(positions), self.batch_size):
                at = positions[start : start + self.batch_size]
                images = torch.stack(list(pool.map(_decode, [self.files[i] for i in at])))
                yield ImageBatch(images, [self.prompts[i] for i in at], at)

    def num_in(self, files: Sequence[Path]) -> int:
        """How many of the images are also among other files, byte for byte."""
        sizes = {file.stat().st_size for file in self.files}
        others = {sha256_file(file) for file in files if file.stat().st_size in sizes}
        return sum(digest in others for digest in self.file_sha256)


Source = ImageStream | GivenImages


def _decode(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path, exact=True), dtype=np.uint8)).permute(2, 0, 1)


def _check(folder: Path, files: Sequence[Path], track: Track) -> tuple[int, list[str], list[str]]:
    """Side of the images, sha256 of each, and the usual suffixes of their formats; every file is decoded once."""
    faults: list[str] = []
    digests: list[str] = []
    sizes: dict[tuple[int, int], Path] = {}
    suffixes: set[str] = set()
    with ThreadPoolExecutor(available_cores()) as pool:
        for chunk in track(torch.arange(len(files)).split(CHUNK), f"{folder.name}: reading"):
            at = [files[i] for i in chunk]
            for file, found in zip(at, pool.map(_inspect, at), strict=True):
                if isinstance(found, str):
                    faults.append(found)
                    continue
                size, suffix, digest = found
                digests.append(digest)
                suffixes.add(suffix)
                sizes.setdefault(size, file)
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:NUM_NAMED])
        more = f"\n  … and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
        raise UsageError(f"{folder}: {len(faults)} of {len(files)} images cannot be measured:{listed}{more}")
    if len(sizes) > 1:
        listed = ", ".join(f"{width}×{height} ({path.name})" for (width, height), path in sizes.items())
        raise UsageError(f"{folder}: images of several sizes: {listed}; evaluate each size alone")
    ((width, height),) = sizes
    if width != height:
        raise UsageError(f"{folder}: images of {width}×{height} pixels; crop them to squares first")
    return width, digests, sorted(suffixes)


def _inspect(path: Path) -> tuple[tuple[int, int], str, str] | str:
    """Size, usual suffix of the format, and sha256 of a file; or what is wrong with it."""
    try:
        size = open_image(path, exact=True).size
        return size, SUFFIX_OF[inspect_image(path).format], sha256_file(path)
    except (UsageError, OSError) as error:
        return str(error)


def png_bytes(image: Tensor) -> bytes:
    """(3, H, W) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(out, format="PNG")
    return out.getvalue()


class Index:
    """``index.json`` of a folder of PNGs: one entry per file; old ones stay.

    Args:
        folder: created with the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / INDEX
        self._read()

    def names(self) -> set[str]:
        """Names of the files that are there."""
        return {name for name in self._read() if (self.folder / name).is_file()}

    def add(self, images: Iterable[tuple[str, Tensor, Mapping[str, Any]]]) -> list[Path]:
        """Store images, then the index.

        Args:
            images: file name, (3, H, W) uint8, and what the entry says besides the name.

        Returns:
            Their files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        added, files = {}, []
        for name, image, entry in images:
            files.append(self.folder / name)
            write_bytes_atomic(files[-1], png_bytes(image))
            added[name] = {"file": name, **entry}
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # shards of one generation write into one folder
            write_json_atomic(self._file, list({**self._read(), **added}.values()))
        finally:
            os.close(lock)
        return files

    def _read(self) -> dict[str, dict[str, Any]]:
        rows = read_json(self._file) if self._file.is_file() else []
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows
        ):
            raise UsageError(f"{self._file}: not an index of images; remove it and run the command again")
        return {row["file"]: row for row in rows}


def about(prompt: Prompt) -> SheetImage:
    """Say what an image shows; its ``noise_seed`` makes the same image in a diffusers pipeline."""
    seed = noise_seed(prompt.id, prompt.seed)
    return SheetImage(prompt_id=prompt.id, prompt=prompt.text, seed=prompt.seed, noise_seed=seed)


def list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder and its subfolders, by relative path without suffix, in order of their names.

    Raises:
        UsageError: no such folder, no image in it, or two files that differ in their suffix alone.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of images")
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = _stem(path.relative_to(folder))
        if stem in found:
            raise UsageError(f"{folder}: {found[stem].name} and {path.name} would both be image {stem!r}; keep one")
        found[stem] = path
    if not found:
        raise UsageError(
            f"{folder}: no image found (looked for {', '.join(IMAGE_SUFFIXES)} in it and in its subfolders)"
        )
    return found


def own_rows(folder: Path, seed: int) -> list[dict[str, Any]] | None:
    """Rows ``stem``, ``id`` and ``text`` of a folder's own table of its images; None where it has none.

    Read from ``index.json`` as rgbench writes it (its rows of one noise seed), or from
    ``metadata.jsonl`` with ``file_name`` and ``text``; the id is then the file's stem.

    Raises:
        UsageError: a table that is damaged, lacks a column, or names a prompt twice.
    """
    index, metadata = folder / INDEX, folder / METADATA
    if index.is_file():
        listed = read_json(index)
        if not isinstance(listed, list):
            raise UsageError(f"{index}: expected a list with file, prompt_id and prompt of each image")
        rows = [_row(entry, f"{index}: entry {i}") for i, entry in enumerate(listed)]
        rows = [row for row, entry in zip(rows, listed, strict=True) if entry.get("seed") == seed]
        table = index
    elif metadata.is_file():
        table = metadata
        listed = [{"file": row.file_name, "prompt": row.text, "where": row.where} for row in read_captions(metadata)]
        rows = [_row(entry | {"prompt_id": _stem(Path(entry["file"]))}, entry["where"]) for entry in listed]
    else:
        return None
    twice = [name for name, num in Counter(row["id"] for row in rows).items() if num > 1]
    if twice or not rows:
        fault = f"names {named(twice)} twice; one image per prompt" if twice else f"names no image of seed {seed}"
        raise UsageError(f"{table}: {fault}")
    return rows


def _row(entry: Any, where: str) -> dict[str, Any]:
    wanted = ("file", "prompt_id", "prompt")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) and entry[k].strip() for k in wanted):
        raise UsageError(f"{where}: expected an object with {', '.join(wanted)}, or file_name and text")
    text, known = clean_text(entry["prompt"], where), clean_text(entry["prompt_id"], where)
    return {"stem": _stem(Path(entry["file"])), "id": known, "text": text}


def _stem(path: Path) -> str:
    """A relative path without suffix, in the form under which names are compared."""
    return normal_form(path.with_suffix("").as_posix())


def own_prompts(folder: Path, seed: int) -> PromptSet:
    """The prompts of a folder's own table, in its order.

    Raises:
        UsageError: it has no table, or a damaged one.
    """
    rows = own_rows(folder, seed)
    if rows is None:
        raise UsageError(
            f"{folder}: nothing says what its images should show (no {INDEX}, no {METADATA}); "
            "give the prompts with --prompts FILE, or --prompts benchtop for the benchtop's"
        )
    return PromptSet(folder.resolve().name, tuple(Prompt(row["id"], row["text"]) for row in rows))


def match_images(folder: Path, prompts: PromptSet, known: PromptSet, seed: int) -> list[Path]:
    """The image of each prompt, in the order of the prompts.

    By the folder's own table; else by name, ``{id}`` or ``{id}-{seed}`` with slashes as they are or as
    underscores; else by number, where all names are the numbers from 0, or from 1, in the order of the prompts.

    Args:
        folder: of images.
        prompts: those whose images are wanted.
        known: all that the folder may hold images of; ``prompts`` are the first of them.
        seed: of the noise, part of the names that rgbench gives.

    Raises:
        UsageError: prompts without an image, images without a prompt, an image made from another text than the
            prompt's, or names that fit neither way; lists the files.
    """
    images, rows = list_images(folder), own_rows(folder, seed)
    if rows is not None:
        found = _by_table(folder, rows, known.prompts)
    else:
        found = _by_name(images, known.prompts, seed) or _by_number(images, known.prompts, len(prompts))
        if not found:
            strange = [stem for stem in images if not (stem.isascii() and stem.isdigit())]  # the few that are none
            raise UsageError(
                f"{folder}: {named(strange)} do not say which prompt they belong to; name the images by the "
                f"prompts' ids (such as {file_stem(prompts.prompts[0].id)}.png), or by their numbers from 0"
            )
    missing = [prompt.id for prompt in prompts.prompts if found.get(prompt.id) not in images]
    if missing:
        raise UsageError(
            f"{folder}: {len(missing)} of {len(prompts)} prompts have no image: {named(missing)}; make them, or take "
            "the first prompts alone with --num"
        )
    users: dict[str, str] = {}
    for prompt in prompts.prompts:
        other = users.setdefault(found[prompt.id], prompt.id)
        if other != prompt.id:
            raise UsageError(
                f"{folder}: the image {found[prompt.id]!r} would be that of two prompts, {other!r} and {prompt.id!r}; "
                "give each its own"
            )
    listed = {row["stem"] for row in rows} if rows is not None else set(found.values())
    extra = [stem for stem in images if stem not in listed]
    if extra:
        whose = f"no prompt of {known.name}" if rows is None else "no row of the folder's table"
        raise UsageError(f"{folder}: {len(extra)} images belong to {whose}: {named(extra)}; move them away")
    return [images[found[prompt.id]] for prompt in prompts.prompts]


def named(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(repr(name) for name in names[:NUM_NAMED]) + more


def _by_table(folder: Path, rows: Iterable[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, str]:
    by_id = {row["id"]: row for row in rows}
    if any(prompt.id in by_id for prompt in prompts):
        other = [p for p in prompts if p.id in by_id and by_id[p.id]["text"] != clean_text(p.text, p.id)]
        if other:
            row = by_id[other[0].id]
            raise UsageError(
                f"{folder}: {len(other)} images were made from another text than their prompt's: {row['stem']!r} from "
                f"{row['text'][:80]!r}, where the prompt list says {other[0].text[:80]!r}; give the list they were "
                "made from with --prompts"
            )
        return {prompt.id: by_id[prompt.id]["stem"] for prompt in prompts if prompt.id in by_id}
    by_text: dict[str, list[str]] = {}
    for row in by_id.values():
        by_text.setdefault(row["text"], []).append(row["stem"])
    found = {}
    for prompt in prompts:  # a text that occurs twice takes its images in the order of the table
        stems = by_text.get(clean_text(prompt.text, prompt.id))
        if stems:
            found[prompt.id] = stems.pop(0)
    return found


def _by_name(images: Mapping[str, Path], prompts: Sequence[Prompt], seed: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for prompt in prompts:
        names = (f"{file_stem(prompt.id)}-{seed}", file_stem(prompt.id), normal_form(prompt.id))
        fitting = [name for name in dict.fromkeys(names) if name in images]
        if len(fitting) > 1:
            raise UsageError(
                f"{images[fitting[0]].parent}: both {named(fitting)} fit the prompt {prompt.id!r}; keep one"
            )
        if fitting:
            found[prompt.id] = fitting[0]
    return found


def _by_number(images: Mapping[str, Path], prompts: Sequence[Prompt], num_wanted: int) -> dict[str, str]:
    if not all(stem.isascii() and stem.isdigit() for stem in images):
        return {}
    numbers = {int(stem): stem for stem in images}
    if len(numbers) < len(images):
        raise UsageError(
            f"{next(iter(images.values())).parent}: two images have one number, such as 1 and 01; keep one"
        )
    first = 0 if 0 in numbers else 1
    positions = {number - first: stem for number, stem in numbers.items()}
    extra = [stem for position, stem in positions.items() if position >= len(prompts)]
    folder = next(iter(images.values())).parent
    if extra:
        raise UsageError(
            f"{folder}: {len(images)} numbered images for {len(prompts)} prompts: {named(extra)} belong to none; "
            "give the prompt list that they were made from"
        )
    if first == 1 and len(positions) not in (num_wanted, len(prompts)):  # else each may get its neighbour's prompt
        raise UsageError(
            f"{folder}: no image has the number 0, and {len(positions)} images are not all of {len(prompts)} counted "
            "from 1: number them from 0, or add the missing ones"
        )
    return {prompts[position].id: stem for position, stem in sorted(positions.items())}
