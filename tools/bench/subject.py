"""What is measured: a trainer with its loop, its data and its cached data, from a preset or with random weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rgbench.core.launch import Ranks
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch, BatchLoader, DataSource
from rgbench.data.latents import CachedSource, LatentsCache
from rgbench.data.sources import open_source
from rgbench.models.pipeline import load_models
from rgbench.train.base import autocast
from rgbench.train.cache import encode
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM
from rgbench.train.recipe import LCDRecipe, LRMRecipe, RGLCDRecipe, load_recipe
from rgbench.train.rg_lcd import RGLCD
from tools.bench.random_models import SD21_BASE, HeldImages, Shape, random_expert, random_models, random_proxy

METHODS = ("lcd", "rg_lcd", "lrm")
RANDOM: dict[str, Shape] = {"sd21-base": SD21_BASE}  # presets that are measured with random weights
RECIPES = {"benchtop": "{}", "sd21-base": "sd21/{}"}
# At full size: the recipes' low-memory setting is measured where it is asked for.
FULL_SIZE = ("train.gradient_checkpointing=false", "train.num_workers=0")


@dataclass(frozen=True)
class Subject:
    """A loop that is ready to take steps.

    Attributes:
        method: ``lcd``, ``rg_lcd`` or ``lrm``.
        trainer: in the loop.
        loop: one rank; its run directory does not exist.
        source: data as images.
        direct: the loop's loader of images.
        cached: a loader of the same data from a latents cache.
        weights: where the weights come from.
    """

    method: str
    trainer: LCD
    loop: Loop
    source: DataSource
    direct: BatchLoader
    cached: BatchLoader
    weights: str


def load_subject(preset: str, method: str, overrides: list[str], device: str, folder: Path) -> Subject:
    """A method on a preset.

    Args:
        preset: ``benchtop`` with its weights, ``sd21-base`` with random ones.
        method: ``lcd``, ``rg_lcd`` or ``lrm``.
        overrides: ``key.path=value`` settings of the recipe.
        device: ``cpu`` or ``cuda``.
        folder: an empty one, for the latents cache.

    Raises:
        ConfigError: an override that cannot be.
        UsageError: a preset without its files.
    """
    recipe = recipe_of(preset, method, overrides)
    if preset in RANDOM:
        trainer = random_trainer(RANDOM[preset], recipe, torch.device(device))
        return make_subject(method, trainer, HeldImages(RANDOM[preset].side), folder, "random")
    models = load_models(recipe.model.teacher_folder(), device, torch.float32)
    trainer = resolve("trainer", recipe.kind).build(recipe, models)
    return make_subject(method, trainer, open_source(recipe.data), folder, "shipped")


def recipe_of(preset: str, method: str, overrides: list[str]) -> LCDRecipe:
    """A method's recipe on a preset.

    Raises:
        ConfigError: an override that cannot be.
    """
    usual = FULL_SIZE if preset in RANDOM else ()
    return load_recipe(RECIPES[preset].format(method), [*usual, *overrides])


def random_trainer(shape: Shape, recipe: LCDRecipe, device: torch.device) -> LCD:
    """A recipe's trainer with random networks of one shape."""
    models = random_models(shape, device)
    if isinstance(recipe, LRMRecipe):
        expert: Any = random_expert(shape, device)
        return LRM(recipe, models, expert, random_proxy(shape, device))
    if isinstance(recipe, RGLCDRecipe):
        return RGLCD(recipe, models, random_expert(shape, device))
    return LCD(recipe, models)


def make_subject(method: str, trainer: LCD, source: DataSource, folder: Path, weights: str) -> Subject:
    """A subject from its parts; encodes two batches for the cached loader."""
    recipe = trainer.recipe
    loop = Loop(trainer, source, recipe, RunDirectory(folder / "run"), Ranks(device=trainer.models.device.type))
    size = recipe.train.batch_size
    feed = cached_source(trainer, Head(source, 2 * size), folder)
    cached = BatchLoader(feed, recipe.seed, size, range(size), recipe.train.gradient_accumulation_steps)
    return Subject(method, trainer, loop, source, loop.loader, cached, weights)


class Head:
    """The first samples of a source.

    Args:
        source: what is read.
        num: samples.
    """

    def __init__(self, source: DataSource, num: int) -> None:
        self.source, self.name = source, source.name
        self.length: int | None = num
        self.num = num

    def fingerprint(self) -> dict[str, Any]:
        """The source's and the number."""
        return {"first": self.num, "of": self.source.fingerprint()}

    def load(self, indices: list[int]) -> Batch:
        """As the source."""
        return self.source.load(indices)


def cached_source(trainer: LCD, source: Head, folder: Path) -> DataSource:
    """A source through a latents cache, made in ``folder`` as ``rgbench cache`` makes it."""
    models, train = trainer.models, trainer.recipe.train
    cache = LatentsCache.at(Path(tempfile.mkdtemp(dir=folder)), {"data": source.fingerprint()}, source.num)
    cache.folder.mkdir(parents=True)
    for path, indices in cache.shards():
        batches = []
        for first in range(0, len(indices), train.batch_size):
            batch = source.load(list(indices[first : first + train.batch_size]))
            with torch.no_grad(), autocast(train.dtype, models.device.type):
                batches.append(Batch(None, batch.prompts, batch.ids, encode(models, batch)))
        cache.write_shard(path, batches)
    cache.complete()
    return CachedSource(source, cache)
