"""Images as a pure function of (prompt id, seed), streamed in batches.

Each image has its own CPU generator, so neither the batch, nor the order, nor a resume
can change its noise. At one batch size the bytes are the same too: a short last batch is
filled up, because the kernels' rounding depends on the batch's size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.errors import RgbenchError, UsageError
from rgbench.evaluation.results import Generation, identify
from rgbench.evaluation.targets import Target
from rgbench.metrics.reference import to_uint8
from rgbench.models import DiffusionModels
from rgbench.process import available_bytes, lacks_memory

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
