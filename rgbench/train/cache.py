"""``rgbench cache``: encode a recipe's data once, and train from that where it exists."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file, sha256_tree
from rgbench.core.launch import Ranks
from rgbench.core.process import pick_device
from rgbench.data.batches import Batch, DataSource, Encoded
from rgbench.data.latents import CachedSource, LatentsCache, cache_root
from rgbench.data.sources import open_source
from rgbench.models.folder import find_weights
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.train.base import autocast
from rgbench.train.recipe import BaseRecipe, load_recipe

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
    for part in ("vae", "text_encoder"):
        files = [*find_weights(folder / part, part).files, folder / part / "config.json"]
        identity[part] = [sha256_file(file) for file in files]
    identity["tokenizer"] = sha256_tree(folder / "tokenizer")
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
        ranks.together(lambda: fill(settings, source, found, ranks, say or (lambda _: None)))
        ranks.on_main(found.complete)
    ranks.leave()
    return found.folder


def fill(
    settings: BaseRecipe, source: DataSource, found: LatentsCache, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Encode and write one rank's share of the missing shards.

    Args:
        settings: the recipe.
        source: its data.
        found: the cache.
        ranks: those that share the work.
        say: shows each shard.
    """
    models = load_models(settings.model.teacher_folder(), ranks.device, torch.float32)
    shards = list(found.shards())
    for number, (path, indices) in enumerate(shards):
        if number % ranks.size != ranks.rank or path.is_file():
            continue
        size = settings.train.batch_size
        batches = [
            _encoded(settings, models, source.load(list(indices[first : first + size])))
            for first in range(0, len(indices), size)
        ]
        found.write_shard(path, batches)
        say(f"shard {number + 1} of {len(shards)}: samples to {indices[-1] + 1} of {found.num}")


@torch.no_grad()
def _encoded(settings: BaseRecipe, models: DiffusionModels, batch: Batch) -> Batch:
    with autocast(settings.train.dtype, models.device.type):
        return Batch(None, batch.prompts, batch.ids, encode(models, batch))
