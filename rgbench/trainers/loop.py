"""The one loop: data by the step counter, a trainer's step, and everything around it.

A trainer returns per-sample losses; this module alone reduces them, checks that they are finite, clips, steps, logs,
saves and stops. Nothing here depends on what was drawn before, so a run resumed at step k repeats what the
uninterrupted run did.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from rgbench import checkpoint
from rgbench.data.contract import Batch, DataSource
from rgbench.data.sampler import batch_indices
from rgbench.errors import Interrupted, RgbenchError, UsageError
from rgbench.run import RunDirectory
from rgbench.trainers.contract import StepResult, Trainer
from rgbench.trainers.cost import CostMeter
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.monitor import Monitor
from rgbench.trainers.preview import NUM_PROMPTS, sample_grid, write_png
from rgbench.trainers.recipe import LCDRecipe
from rgbench.trainers.stop import StopRequest

ADVICE = "no parameter was changed; look at these samples, or lower train.lr or reward.scale"


class Loop:
    """Trains until the recipe's last step.

    Args:
        trainer: the method.
        source: the data.
        recipe: validated.
        run: where checkpoints, logs and samples go.

    Attributes:
        step: optimiser steps done.
    """

    def __init__(self, trainer: Trainer, source: DataSource, recipe: LCDRecipe, run: RunDirectory) -> None:
        self.trainer, self.source, self.recipe, self.run = trainer, source, recipe, run
        train = recipe.train
        self.learners = trainer.learners()
        self.optimisers = {
            name: torch.optim.AdamW(
                learner.parameters, lr=learner.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
            )
            for name, learner in self.learners.items()
        }
        self.step = 0
        self.cost = CostMeter()

    def train(self, stop: StopRequest, resume_command: str) -> None:
        """Run the remaining steps.

        Args:
            stop: asked between two steps.
            resume_command: what an interrupted run tells its user.

        Raises:
            Interrupted: a signal came; the state is saved.
            RgbenchError: a loss or gradient is not finite; parameters are those before that step.
        """
        prompts = self.source.load(list(range(min(NUM_PROMPTS, self.source.length or NUM_PROMPTS)))).prompts
        train = self.recipe.train
        with Monitor(self.run, self.step, train.steps, train.batch_size) as monitor:
            while self.step < train.steps:
                self._stop_if_asked(stop, resume_command)
                start = time.monotonic()
                values = self.train_step()
                monitor.show(self.step, values, time.monotonic() - start)
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    monitor.log(self.step, values)
                if self.step % train.save_every == 0 or last:
                    self.save()
                if train.sample_every and (self.step % train.sample_every == 0 or last):
                    grid = sample_grid(self.trainer, self.recipe, prompts)
                    write_png(grid, self.run.samples / f"step-{self.step:08d}.png")
                    monitor.log_grid(self.step, grid)

    def _stop_if_asked(self, stop: StopRequest, resume_command: str) -> None:
        if stop.signal is None:
            return
        self.save()
        self.run.update(status="interrupted")
        message = f"{self.run.path}: stopped; {self.step} of {self.recipe.train.steps} steps are saved"
        raise Interrupted(message, resume_command=resume_command, exit_code=stop.exit_code)

    def train_step(self) -> dict[str, float]:
        """One optimiser step.

        Returns:
            Means of all loss terms and statistics, and the gradient norms before clipping.
        """
        recipe = self.recipe
        size = recipe.train.batch_size
        batch = self.load_batch(self.step)
        draws = StepDraws(recipe.seed, self.step, size, dtype=self.trainer.models.dtype)
        result = self.trainer.step(batch, draws)
        self._check_losses(result, batch)
        for terms in result.losses.values():
            torch.stack([term.mean() for term in terms.values()]).sum().backward()
        norms = self._clip(batch)
        for optimiser in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.trainer.after_update()
        self.step += 1
        self.cost.images += size
        self.cost.reward_calls += result.reward_calls
        return _means(result, norms)

    def load_batch(self, step: int) -> Batch:
        """The global batch of a step.

        Raises:
            UsageError: the data's resolution is not the model's.
        """
        size = self.recipe.train.batch_size
        batch = self.source.load(batch_indices(self.recipe.seed, step, size, self.source.length).tolist())
        side = self.trainer.models.resolution
        if batch.images_BCHW.shape[2:] != (side, side):
            found = "×".join(str(n) for n in batch.images_BCHW.shape[2:])
            raise UsageError(f"data gives images of {found} pixels, the model takes {side}×{side}: set data.resolution")
        return batch

    def _check_losses(self, result: StepResult, batch: Batch) -> None:
        """Stop before anything changes where a loss is not finite; one look at the device for all terms."""
        terms = {f"{term} of the {name}": v for name, losses in result.losses.items() for term, v in losses.items()}
        for term, value in terms.items():
            if value.shape != (len(batch.ids),):
                shape = tuple(value.shape)
                raise RgbenchError(f"loss term {term} has shape {shape}: a reward gives one score per image, (B,)")
        bad = ~torch.stack([v.detach().isfinite() for v in terms.values()])
        if not bad.any():
            return
        for (term, _), flags in zip(terms.items(), bad.tolist(), strict=True):
            ids = [batch.ids[i] for i, flag in enumerate(flags) if flag]
            if ids:
                raise RgbenchError(f"step {self.step}: loss term {term} is not finite for {_listed(ids)}; {ADVICE}")

    def _clip(self, batch: Batch) -> dict[str, Tensor]:
        """Clip each optimiser's gradient; its norm before.

        Raises:
            RgbenchError: a norm is not finite.
        """
        limit = self.recipe.train.max_grad_norm
        norms = {
            name: torch.nn.utils.clip_grad_norm_(learner.parameters, limit) for name, learner in self.learners.items()
        }
        if not torch.stack(list(norms.values())).isfinite().all():
            wrong = next(name for name, norm in norms.items() if not norm.isfinite())
            raise RgbenchError(
                f"step {self.step}: the gradient of the {wrong} is not finite, in the batch of {_listed(batch.ids)}; "
                f"{ADVICE}"
            )
        return norms

    def save(self) -> None:
        """Commit a checkpoint of the steps done, and note it in run.json."""
        tensors = {stem: dict(module.state_dict()) for stem, module in self.trainer.modules().items()}
        settings: dict[str, Any] = {}
        for name, optimiser in self.optimisers.items():
            tensors[f"optimiser-{name}"], settings[name] = checkpoint.flatten_optimiser(optimiser)
        cost = self.cost.read()
        meta = {"step": self.step, "optimisers": settings, "cost": cost}
        checkpoint.commit(self.run.checkpoints, self.step, tensors, meta, keep=self.recipe.train.keep_checkpoints)
        self.run.update(step=self.step, cost=cost)

    def restore(self) -> None:
        """Go on from the newest intact checkpoint, or from the start where there is none."""
        newest = checkpoint.latest(self.run.checkpoints)
        if newest is None:
            return
        tensors, meta = checkpoint.load(newest)
        for stem, module in self.trainer.modules().items():
            module.load_state_dict(tensors[stem])
        for name, optimiser in self.optimisers.items():
            checkpoint.restore_optimiser(optimiser, tensors[f"optimiser-{name}"], meta["optimisers"][name])
        self.step, self.cost = meta["step"], CostMeter(meta["cost"])


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return ", ".join(ids[:8]) + more


def _means(result: StepResult, norms: dict[str, Tensor]) -> dict[str, float]:
    """Everything a log row holds, fetched from the device at once."""
    terms = {term: v for losses in result.losses.values() for term, v in losses.items()}
    values = {f"loss/{name}": v.detach().mean() for name, v in terms.items()}
    values |= {name: v.mean() for name, v in result.stats.items()}
    values |= {f"grad_norm/{name}": v for name, v in norms.items()}
    fetched = torch.stack([v.to(torch.float64) for v in values.values()]).tolist()
    return dict(zip(values, fetched, strict=True))
