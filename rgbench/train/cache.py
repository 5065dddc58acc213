"""``rgbench cache``: encode a recipe's data once, or sample it from the teacher, and train from that."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file, sha256_tree
from rgbench.core.launch import Ranks
from rgbench.core.process import memory_explained, pick_device, whole_float32
from rgbench.data.batches import Batch, DataSource, Encoded
from rgbench.data.latents import CachedSource, LatentsCache, TeacherSource, cache_root
from rgbench.data.sources import open_source
from rgbench.models.folder import find_encoders
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.rewards.base import score
from rgbench.rewards.config import reward_section
from rgbench.rewards.load import load_reward
from rgbench.train.base import autocast
from rgbench.train.recipe import BaseRecipe, load_recipe

OTHER_STEPS, OTHER_GUIDANCE = 50, 7.5  # of a teacher without a preset: StableDiffusionPipeline's own
CHUNK = 64  # captions read at once

log = logging.getLogger("rgbench")


def encode(models: DiffusionModels, batch: Batch) -> Encoded:
    """VAE moments and text states of a batch, cached or computed, on the models' device."""
    cached = batch.encoded
    embeds = models.encode_prompts(batch.prompts) if cached is None else cached.prompt_embeds.to(models.device)
    return Encoded(*encode_latents(models, batch), embeds)


def encode_latents(models: DiffusionModels, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, cached or computed, on the models' device."""
    if batch.encoded is not None:
        return batch.encoded.mean.to(models.device), batch.encoded.std.to(models.device)
    assert batch.images_BCHW is not None
    return models.encode_images(batch.images_BCHW)


def _load(settings: BaseRecipe, device: str | torch.device) -> DiffusionModels:
    return load_models(settings.model.teacher_folder(), device, torch.float32, settings.model.resolution)


def cache_of(settings: BaseRecipe, source: DataSource, folder: Path) -> LatentsCache:
    """The cache of a recipe's data and encoders, complete or not.

    Args:
        settings: the recipe; its ``train.dtype`` is the encoders' arithmetic.
        source: its data.
        folder: of the model.

    Raises:
        UsageError: endless data.
    """
    if source.length is None:
        raise UsageError("data.num: endless data cannot be cached; give the number of samples")
    identity: dict[str, Any] = {"data": source.fingerprint(), "dtype": settings.train.dtype}
    if settings.model.resolution is not None:
        identity["resolution"] = settings.model.resolution
    weights, tokenizers = find_encoders(folder)
    for part, found in weights.items():
        identity[part] = [sha256_file(file) for file in (*found.files, folder / part / "config.json")]
    identity |= {part: sha256_tree(folder / part) for part in tokenizers}
    return LatentsCache.at(cache_root(settings.train.latents_cache_root), identity, source.length)


def open_cached(settings: BaseRecipe, source: DataSource, folder: Path, wanted: str) -> DataSource:
    """The source itself, or its cache.

    Args:
        settings: the recipe.
        source: its data.
        folder: of the model.
        wanted: ``auto`` for a cache where a complete one exists, ``always``, or ``never``.

    Raises:
        UsageError: ``always``, and none exists.
    """
    root = cache_root(settings.train.latents_cache_root)
    if wanted == "never" or (wanted == "auto" and (source.length is None or not root.is_dir())):
        return source
    cache = cache_of(settings, source, folder)
    if wanted == "auto" and not cache.is_complete:
        return source
    log.info("latents and text states from %s", cache.folder)
    return CachedSource(source, cache)


@whole_float32()
def cache(recipe: str, overrides: list[str], *, device: str = "auto", say: Callable[[str], None] | None = None) -> Path:
    """Encode the data of a recipe; existing shards are kept. Under torchrun, this rank's shards.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: shows progress.

    Returns:
        The cache's folder.

    Raises:
        UsageError: a missing part, or endless data.
    """
    settings = load_recipe(recipe, overrides)
    ranks = Ranks.join(pick_device(device))

    def prepare() -> tuple[DataSource, LatentsCache]:
        folder, source = settings.model.teacher_folder(), open_source(settings.data)
        return source, cache_of(settings, source, folder)

    source, found = ranks.together(prepare)
    if not found.is_complete:
        fill(settings, source, found, ranks, say or (lambda _: None))
        ranks.on_main(found.complete)
    ranks.leave()
    return found.folder


def fill(
    settings: BaseRecipe, source: DataSource, found: LatentsCache, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Encode and write the missing shards, this rank its share.

    Args:
        settings: the recipe.
        source: its data.
        found: the cache.
        ranks: those that share the work.
        say: shows each shard.
    """
    models = ranks.together(lambda: _load(settings, ranks.device))
    _write(
        found, lambda rows: _encoded(settings, models, source.load(list(rows))), settings.train.batch_size, ranks, say
    )


def _write(
    found: LatentsCache, make: Callable[[range], Batch], size: int, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Make and write the missing shards, ``size`` rows at once.

    Each rank makes one, then all meet: none waits longer than a shard for a slower one, or goes on long after a
    failure.
    """
    shards = found.shards()
    missing = [number for number, (path, _) in enumerate(shards) if not path.is_file()]
    missing = ranks.gather_lists(missing if ranks.is_main else [])  # as the main rank sees the folder

    def write(numbers: list[int]) -> None:
        for number in numbers:
            path, indices = shards[number]
            with memory_explained(path.name, "use a smaller train.batch_size"):
                found.write_shard(path, [make(indices[first : first + size]) for first in range(0, len(indices), size)])
            say(f"shard {number + 1} of {len(shards)}: samples to {indices[-1] + 1} of {found.num}")

    for first in range(0, len(missing), ranks.size):
        own = first + ranks.rank
        ranks.together(partial(write, missing[own : own + 1]))  # none for the last ranks of the last round


@torch.no_grad()
def _encoded(settings: BaseRecipe, models: DiffusionModels, batch: Batch) -> Batch:
    with autocast(settings.train.dtype, models.device.type):
        return Batch(None, batch.prompts, batch.ids, encode(models, batch))


@dataclass(frozen=True)
class TeacherSamples:
    """What ``rgbench cache --from teacher`` writes: n latents of each distinct caption of a recipe's data.

    Attributes:
        models: the teacher.
        prompts: caption → id of the first sample that has it.
        num: n.
        steps, guidance_scale: of DDIM; the preset's, or StableDiffusionPipeline's own.
        reward: scores the decoded samples; None for none.
        dtype: of the networks' arithmetic.
    """

    models: DiffusionModels
    prompts: dict[str, str]
    num: int
    steps: int
    guidance_scale: float
    reward: Any
    dtype: str

    def identity(self, data: dict[str, Any]) -> dict[str, Any]:
        """Of the cache: everything that decides a latent or a score, and the captions' ``data``."""
        models, reward = self.models, self.reward
        sampling = {"sampler": models.sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}
        return {
            "kind": "teacher",
            "data": data,
            "teacher": {"sha256": models.weights_sha256, "config_sha256": models.config_sha256},
            "sampling": {**sampling, **models.ddim},
            "samples": self.num,
            "score": reward.fingerprint() if reward is not None else None,
            "dtype": self.dtype,
        }

    @torch.no_grad()
    def rows(self, indices: range) -> Batch:
        """Samples at rows of the cache, a pure function of caption and number."""
        models, texts = self.models, list(self.prompts)
        numbers = [divmod(index, self.num) for index in indices]
        prompts, ids = [texts[p] for p, _ in numbers], [f"{self.prompts[texts[p]]}#{i}" for p, i in numbers]
        generators = [_generator(texts[p], i) for p, i in numbers]
        with autocast(self.dtype, models.device.type):
            options: dict[str, Any] = {"num_steps": self.steps, "guidance_scale": self.guidance_scale}
            latents = models.sample_latents(prompts, generators, **options)
            embeds = models.encode_prompts(prompts)
            scores = score(self.reward, models.decode(latents), prompts).double().cpu() if self.reward else None
        mean = latents / models.scaling_factor
        return Batch(None, prompts, ids, Encoded(mean, torch.zeros_like(mean), embeds), scores)


def _generator(prompt: str, number: int) -> torch.Generator:
    """Of one sample of a caption: the same on every machine, whatever the batch or order."""
    digest = hashlib.sha256(json.dumps([prompt, number]).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@whole_float32()
def cache_samples(
    recipe: str,
    overrides: list[str],
    *,
    samples: int = 1,
    kind: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Sample a recipe's captions from its teacher; existing shards are kept. Under torchrun, this rank's shards.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        samples: latents a caption.
        kind: of the reward that scores them; None for none. Its settings are the recipe's, where it has this kind.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: shows progress.

    Returns:
        The cache's folder, for ``data: {kind: teacher, path: FOLDER}``.

    Raises:
        UsageError: a missing part, endless data, or data that is a teacher's already.
    """
    settings = load_recipe(recipe, overrides)
    ranks = Ranks.join(pick_device(device))

    def prepare() -> tuple[TeacherSamples, LatentsCache]:
        made, data = _teacher_samples(settings, samples, kind, ranks)
        identity = made.identity(data)
        return made, LatentsCache.at(
            cache_root(settings.train.latents_cache_root), identity, len(made.prompts) * samples
        )

    made, found = ranks.together(prepare)
    if not found.is_complete:
        _write(found, made.rows, settings.train.batch_size, ranks, say or (lambda _: None))
        ranks.on_main(found.complete)
    ranks.leave()
    return found.folder


def _teacher_samples(
    settings: BaseRecipe, samples: int, kind: str | None, ranks: Ranks
) -> tuple[TeacherSamples, dict[str, Any]]:
    """What is to be sampled, and the fingerprint of the captions' data."""
    source = open_source(settings.data)
    if source.length is None:
        raise UsageError("data.num: endless data cannot be sampled; give the number of captions")
    if isinstance(source, TeacherSource):
        raise UsageError("data.kind: these are a teacher's samples; name the data that their captions are from")
    prompts: dict[str, str] = {}
    for first in range(0, source.length, CHUNK):
        batch = source.load(list(range(first, min(first + CHUNK, source.length))))
        for prompt, identity in zip(batch.prompts, batch.ids, strict=True):
            prompts.setdefault(prompt, identity)
    models = _load(settings, ranks.device)
    preset = settings.model.find("model.preset") if settings.model.preset else None
    steps, guidance = (preset.teacher_steps, preset.teacher_guidance) if preset else (OTHER_STEPS, OTHER_GUIDANCE)
    reward = None
    if kind is not None:
        section: Any = getattr(settings, "reward", None)
        if getattr(section, "kind", None) != kind:
            section = reward_section(kind)
        path = preset.reward_folder() if preset and preset.root else None
        reward = load_reward(section, device=models.device, dtype=models.dtype, preset_path=path, key="--score")
    made = TeacherSamples(models, prompts, samples, steps, guidance, reward, settings.train.dtype)
    return made, source.fingerprint()
