"""``rgbench train --dry-run``: what a run would do, and one step's losses to show that its parts fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from rgbench.errors import RgbenchError
from rgbench.hub import readable_size
from rgbench.launch.ranks import Ranks
from rgbench.process import pick_device
from rgbench.run import RunDirectory
from rgbench.students import is_lora
from rgbench.trainers.api import build_loop, run_path
from rgbench.trainers.contract import Trainer
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.loop import Loop
from rgbench.trainers.recipe import BaseRecipe, LCDRecipe, load_recipe

Row = tuple[str, str]
MOMENTS = 2  # of AdamW, as large as what learns


def dry_run(recipe: str, overrides: list[str], *, out: Path | None = None, device: str = "auto") -> list[Row]:
    """Resolve, load and check everything that a run needs, and compute its first step's losses.

    Nothing is trained and nothing is written.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        out: where the run would lie.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        Names and what there is to say of each.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a missing part, or data that does not fit the model.
        RgbenchError: a loss of the first step is not finite.
    """
    settings = load_recipe(recipe, overrides)
    run = RunDirectory(run_path(settings, out))
    loop, origin = build_loop(settings, run, Ranks(device=pick_device(device)))
    trainer, data = loop.trainer, {**origin["data"], "latents cache": origin["latents_cache"]}
    rewards = [("reward", f"{r['name']}, fingerprint {r['fingerprint_id']}, in-sample") for r in origin["rewards"]]
    return [
        ("run", f"{run.path}{' is there already' if run.run_file.is_file() else ', new'}"),
        ("recipe", f"{settings.kind}, seed {settings.seed}"),
        ("teacher", _teacher(trainer, settings)),
        *([("student", _student(trainer, settings))] if isinstance(settings, LCDRecipe) else []),
        *_learners(trainer, settings),
        *rewards,
        ("data", ", ".join(f"{key} {value}" for key, value in data.items())),
        ("steps", _steps(settings, loop.source.length)),
        ("checkpoints", _checkpoints(trainer, settings)),
        *([("samples", _samples(settings))] if isinstance(settings, LCDRecipe) else []),
        ("device", f"{trainer.models.device}, {settings.train.dtype}"),
        ("first step", _losses(loop)),
    ]


def _count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _teacher(trainer: Trainer, recipe: BaseRecipe) -> str:
    models, published = trainer.models, recipe.model.published()
    where = f"{published['repo']} at {published['revision'][:8]}" if published else str(models.path)
    size = f"{models.resolution} px, latents {'×'.join(map(str, models.latent_shape))}"
    weights = f"{_millions(_count(models.unet.parameters()))}, sha256 {models.weights_sha256[:12]}"
    return f"{where}: {weights}, {models.prediction_type}, {size}"


def _student(trainer: Trainer, recipe: LCDRecipe) -> str:
    dim = recipe.lcd.time_cond_proj_dim
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora and is_lora(trainer.student) else "all weights"
    return f"{how}; {f'told w by an embedding of {dim}' if dim else 'not told w'}"


def _learners(trainer: Trainer, recipe: BaseRecipe) -> Iterator[Row]:
    """Each optimiser: how much it trains, with what."""
    for name, learner in trainer.learners().items():
        module = trainer.modules()[name]
        held = _count(module.parameters()) if isinstance(module, nn.Module) else _count(trainer.student.parameters())
        number, train = _count(learner.parameters), recipe.train
        settings = f"AdamW, lr {learner.lr:g}, betas {train.betas}, weight decay {train.weight_decay:g}"
        yield f"{name} learns", f"{_millions(number)} of {_millions(held)} parameters; {settings}"


def _steps(recipe: BaseRecipe, length: int | None) -> str:
    train = recipe.train
    images = train.steps * train.batch_size
    epochs = f", {images / length:.3g} epochs" if length else ""
    return f"{train.steps:,} of {train.batch_size} images: {images:,} images{epochs}"


def _checkpoints(trainer: Trainer, recipe: BaseRecipe) -> str:
    """How often, how many, how large: networks, and the optimisers' moments."""
    tensors = [value for module in trainer.modules().values() for value in module.state_dict().values()]
    size = sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))
    learned = [parameter for learner in trainer.learners().values() for parameter in learner.parameters]
    size += MOMENTS * sum(parameter.numel() * parameter.element_size() for parameter in learned)
    train = recipe.train
    return f"every {train.save_every} steps, {readable_size(size)} each, {train.keep_checkpoints} kept"


def _samples(recipe: LCDRecipe) -> str:
    every, sampling = recipe.train.sample_every, recipe.sampling
    how = f"{sampling.steps} steps at guidance {sampling.guidance_scale:g} of the {sampling.network}"
    return f"every {every} steps; {how}" if every else f"none; {how} is exported"


def _losses(loop: Loop) -> str:
    """The means of the first step's loss terms, of its first micro-batch; nothing is learned from them.

    Raises:
        RgbenchError: one is not finite.
    """
    batch = loop.load_batch(0)
    with loop.updater.autocast():
        result = loop.trainer.step(batch, StepDraws(loop.recipe.seed, 0, len(batch.ids)))
    means = {name: float(v.detach().mean()) for terms in result.losses.values() for name, v in terms.items()}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    if wrong:
        raise RgbenchError(f"the first step's loss term {wrong[0]} is not finite; look at {', '.join(batch.ids[:8])}")
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
