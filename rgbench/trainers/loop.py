"""The one loop: data by the step counter, a trainer's step, and everything around it.

A trainer returns per-sample losses; this module alone reduces them, checks that they are finite on all ranks, clips,
steps, logs, saves and stops. Nothing here depends on what was drawn before, on the rank or on the micro-batch, so a
run resumed at step k repeats what the uninterrupted run did, and two ranks what one did, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rgbench import checkpoint
from rgbench.data.contract import Batch, DataSource
from rgbench.data.loader import BatchLoader
from rgbench.errors import Interrupted, RgbenchError, UsageError
from rgbench.launch.ranks import Ranks
from rgbench.process import lacks_memory
from rgbench.run import RunDirectory
from rgbench.trainers.captions import CaptionCount, total
from rgbench.trainers.contract import Trainer
from rgbench.trainers.cost import CostMeter, of_all_ranks
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.measured import Measured
from rgbench.trainers.monitor import Monitor
from rgbench.trainers.preview import NUM_PROMPTS, sample_grid, write_png
from rgbench.trainers.recipe import BaseRecipe, LCDRecipe, TrainSection
from rgbench.trainers.stop import StopRequest
from rgbench.trainers.update import Updater
from rgbench.trainers.wandb_board import check_wandb

ADVICE = "no parameter was changed; look at these samples, or lower train.lr or reward.scale"


class Loop:
    """Trains until the recipe's last step.

    Args:
        trainer: the method.
        source: the data.
        recipe: validated.
        run: where checkpoints, logs and samples go; the main rank alone writes there.
        ranks: those that train together; this process alone by default.

    Attributes:
        step: optimiser steps done.

    Raises:
        UsageError: the batch cannot be split evenly.
    """

    def __init__(
        self, trainer: Trainer, source: DataSource, recipe: BaseRecipe, run: RunDirectory, ranks: Ranks | None = None
    ) -> None:
        self.trainer, self.source, self.recipe, self.run = trainer, source, recipe, run
        self.ranks = ranks or Ranks()
        train = recipe.train
        check_split(train, self.ranks.size)
        if train.wandb is not None:
            check_wandb()
        self.learners = trainer.learners()
        self.updater = Updater(self.learners, train, self.ranks, trainer.models.device.type)
        self.optimisers = self.updater.optimisers
        _prepare_networks(trainer, train)
        positions, num_micro = self.ranks.part_of(train.batch_size), train.gradient_accumulation_steps
        self.loader = BatchLoader(
            source, recipe.seed, train.batch_size, positions, num_micro, train.num_workers, train.steps
        )
        self.step = 0
        self.cost = CostMeter(device_type=trainer.models.device.type)
        self.captions = CaptionCount(trainer.readers())

    def train(self, stop: StopRequest, resume_command: str) -> None:
        """Run the remaining steps.

        Args:
            stop: asked between two steps; one rank's signal stops all.
            resume_command: what an interrupted run tells its user.

        Raises:
            Interrupted: a signal came; the state is saved.
            RgbenchError: a loss or gradient is not finite; parameters are those before that step.
        """
        first = list(range(min(NUM_PROMPTS, self.source.length or NUM_PROMPTS)))
        prompts = self.ranks.together(lambda: self.source.load(first).prompts)
        train = self.recipe.train
        with contextlib.ExitStack() as stack:
            stack.callback(self.loader.close)
            monitor = None
            if self.ranks.is_main:
                monitor = Monitor(self.run, self.step, train.steps, train.batch_size, wandb=train.wandb)
                stack.enter_context(monitor)
            while self.step < train.steps:
                self._stop_if_asked(stop, resume_command)
                start = time.monotonic()
                with memory_explained(self.step):
                    values = self.train_step()
                if monitor is not None:
                    monitor.show(self.step, values, time.monotonic() - start)
                self._keep(monitor, values, prompts)

    def _keep(self, monitor: Monitor | None, values: dict[str, float], prompts: list[str]) -> None:
        """Log, save and sample where this step is due."""
        train, last = self.recipe.train, self.step == self.recipe.train.steps
        if monitor is not None and (self.step % train.log_every == 0 or last):
            monitor.log(self.step, values)
        if self.step % train.save_every == 0 or last:
            self.save()
        if train.sample_every and (self.step % train.sample_every == 0 or last):
            self.ranks.together(lambda: self._sample(monitor, prompts))

    def _sample(self, monitor: Monitor | None, prompts: list[str]) -> None:
        if monitor is None:
            return
        assert isinstance(self.recipe, LCDRecipe)
        with self.updater.autocast():
            grid = sample_grid(self.trainer, self.recipe, prompts)
        write_png(grid, self.run.samples / f"step-{self.step:08d}.png")
        monitor.log_grid(self.step, grid)

    def _stop_if_asked(self, stop: StopRequest, resume_command: str) -> None:
        (number,) = self.ranks.largest(stop.signal or 0)
        if not number:
            return
        stop.signal = number
        self.save()
        self.ranks.on_main(lambda: self.run.update(status="interrupted"))
        message = f"{self.run.path}: stopped; {self.step} of {self.recipe.train.steps} steps are saved"
        self.ranks.stop_all(Interrupted(message, resume_command=resume_command, exit_code=stop.exit_code))

    def train_step(self) -> dict[str, float]:
        """One optimiser step.

        Returns:
            Means of all loss terms and statistics over the global batch, and the gradient norms before clipping.
        """
        measured = Measured()
        batches = self.ranks.together(lambda: self._load(self.step))
        for positions, batch in zip(self.loader.micro, batches, strict=True):
            draws = StepDraws(
                self.recipe.seed, self.step, len(positions), first=positions[0], dtype=self.trainer.models.dtype
            )
            with self.updater.autocast():
                result = self.trainer.step(batch, draws)
            measured.add(result, batch.ids)
            self.captions.see(batch)
            self.updater.backward(result, 1 / len(batches))
        rows, norms = _fetch(measured.gather(self.ranks), self.updater.reduce())
        self._check(measured, rows, norms)
        if self.updater.step(self.step, finite=all(map(math.isfinite, norms.values()))):
            self.trainer.after_update()
        self.step += 1
        self.cost.images += self.recipe.train.batch_size
        self.cost.reward_calls += measured.reward_calls * self.ranks.size
        return measured.means(rows) | self.updater.describe(norms)

    def _load(self, step: int) -> list[Batch]:
        batches = self.loader.load(step)
        for batch in batches:
            self._check_size(batch)
        return batches

    def load_batch(self, step: int) -> Batch:
        """This rank's first micro-batch of a step; the global batch where there is one rank and no accumulation.

        Raises:
            UsageError: the data's resolution is not the model's.
        """
        return self._load(step)[0]

    def _check_size(self, batch: Batch) -> None:
        side = self.trainer.models.resolution
        if batch.images_BCHW is None:
            return  # encoded by this very model
        if batch.images_BCHW.shape[2:] != (side, side):
            found = "×".join(str(n) for n in batch.images_BCHW.shape[2:])
            raise UsageError(f"data gives images of {found} pixels, the model takes {side}×{side}: set data.resolution")

    def _check(self, measured: Measured, rows: Tensor, norms: dict[str, float]) -> None:
        """Stop all ranks before anything changes where a loss or gradient is not finite.

        Raises:
            RgbenchError: names the step, the term and the samples.
        """
        fault = measured.fault(rows)
        wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if fault is None and (not wrong or self.updater.scales):
            return
        self.updater.drop()
        ids = self.ranks.gather_lists(measured.ids)
        if fault is not None:
            what = f"{fault[0]} is not finite for {_listed([ids[position] for position in fault[1]])}"
        else:
            what = f"the gradient of the {wrong[0]} is not finite, in the batch of {_listed(ids)}"
        self.ranks.stop_all(RgbenchError(f"step {self.step}: {what}; {ADVICE}"))

    def save(self) -> None:
        """Commit a checkpoint of the steps done, and note it in run.json; the other ranks wait for the main one."""
        for name, learner in self.learners.items():
            self.ranks.check_equal(learner.parameters, f"the {name}")
        counts = self.read_counts()
        self.ranks.on_main(lambda: self._commit(counts))

    def read_counts(self) -> dict[str, Any]:
        """Cost and captions of the run, from all ranks."""
        costs, captions = self.ranks.gather_lists([self.cost.read()]), self.ranks.gather_lists([self.captions.read()])
        return {"cost": of_all_ranks(costs), "captions": total(captions)}

    def _commit(self, counts: dict[str, Any]) -> None:
        tensors = {stem: dict(module.state_dict()) for stem, module in self.trainer.modules().items()}
        own, meta = self.updater.state()
        meta |= {"step": self.step, **counts}
        checkpoint.commit(self.run.checkpoints, self.step, tensors | own, meta, keep=self.recipe.train.keep_checkpoints)
        self.run.update(step=self.step, **counts)

    def restore(self) -> None:
        """Go on from the newest intact checkpoint, or from the start where there is none."""
        newest = self.ranks.together(lambda: checkpoint.latest(self.run.checkpoints) if self.ranks.is_main else None)
        (step,) = self.ranks.largest(-1 if newest is None else checkpoint.step_of(newest))
        if step < 0:
            return
        path = checkpoint.path_of(self.run.checkpoints, step)
        tensors, meta = self.ranks.together(lambda: checkpoint.load(path))
        for stem, module in self.trainer.modules().items():
            module.load_state_dict(tensors[stem])
        self.updater.restore(tensors, meta)
        self.step = meta["step"]
        if self.ranks.is_main:  # the others count on from nothing: what is kept is the sum
            self.cost = CostMeter(meta["cost"], self.trainer.models.device.type)
            self.captions.restore(meta.get("captions", self.captions.read()))


def check_split(train: TrainSection, num_ranks: int) -> None:
    """Refuse a batch that ranks and micro-batches do not divide.

    Raises:
        UsageError: says which numbers do not go together.
    """
    parts = num_ranks * train.gradient_accumulation_steps
    if train.batch_size % parts:
        raise UsageError(
            f"train.batch_size {train.batch_size} cannot be split over {num_ranks} processes × "
            f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}; make it a multiple of {parts}"
        )


@contextlib.contextmanager
def memory_explained(step: int) -> Iterator[None]:
    """Say what to do where a GPU's memory does not suffice.

    Raises:
        RgbenchError: in place of torch's own.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise RgbenchError(
            f"step {step}: the GPU's memory does not suffice ({str(error).partition('.')[0]}); use a larger "
            "train.gradient_accumulation_steps, or train.gradient_checkpointing=true"
        ) from error


def _prepare_networks(trainer: Trainer, train: TrainSection) -> None:
    """What trades time for memory or start-up for speed, and changes no number beyond rounding."""
    if train.gradient_checkpointing:
        trainer.student.enable_gradient_checkpointing()
        trainer.models.vae.enable_gradient_checkpointing()  # in the reward's way through the decoder
    if train.compile:
        for network in (trainer.models.unet, trainer.student, trainer.target):
            network.compile()  # in place: names in checkpoints stay


def _fetch(rows: Tensor, norms: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Everything the host must know before the update, in one look at the device."""
    fetched = torch.cat([rows.flatten(), torch.stack(list(norms.values())).to(rows.dtype)]).cpu()
    return fetched[: rows.numel()].view_as(rows), dict(zip(norms, fetched[rows.numel() :].tolist(), strict=True))


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return ", ".join(ids[:8]) + more
