"""``rgbench cache``: encode a recipe's data once; and training from it where it is there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
    """VAE moments and text states of a batch, from the cache where it brings them, on the models' device."""
    if batch.encoded is not None:
        device = models.device
        return Encoded(
            *(part.to(device) for part in (batch.encoded.mean, batch.encoded.std, batch.encoded.prompt_embeds))
        )
    assert batch.images_BCHW is not None
    return Encoded(*models.encode_images(batch.images_BCHW), models.encode_prompts(batch.prompts))


def cache_of(settings: BaseRecipe, source: DataSource, folder: Path) -> LatentsCache:
    """The cache that a recipe's data and encoders name, there or not.

    Args:
        settings: the recipe; its ``train.dtype`` is the encoders' arithmetic.
        source: its data.
        folder: of the model.

    Raises:
        UsageError: data without end.
    """
    if source.length is None:
        raise UsageError("data without end cannot be cached; give data.num")
    identity: dict[str, Any] = {"data": source.fingerprint(), "dtype": settings.train.dtype}
    for part in ("vae", "text_encoder"):
        files = [*find_weights(folder / part, part).files, folder / part / "config.json"]
        identity[part] = [sha256_file(file) for file in files]
    identity["tokenizer"] = sha256_tree(folder / "tokenizer")
    return LatentsCache.at(cache_root(settings.train.latents_cache_root), identity, source.length)


def open_cached(settings: BaseRecipe, source: DataSource, folder: Path, wanted: str) -> DataSource:
    """The source itself, or the cache in its place.

    Args:
        settings: the recipe.
        source: its data.
        folder: of the model.
        wanted: ``auto`` for a cache where a complete one is, ``always``, or ``never``.

    Raises:
        UsageError: ``always``, and there is none.
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
    """Encode the data of a recipe; shards that are there already are kept. Under torchrun, one rank's shards.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: told about progress.

    Returns:
        The cache's folder.

    Raises:
        UsageError: a missing part, or data without end.
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
    """Encode and write one rank's share of the shards that are not there.

    Args:
        settings: the recipe.
        source: its data.
        found: where they go.
        ranks: those that share the work.
        say: told about each shard.
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
