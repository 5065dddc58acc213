"""The training loop: it alone loads data, reduces losses, checks, clips, steps, logs, saves and stops.

A trainer returns per-sample losses. Nothing here depends on earlier draws, on the rank or on the micro-batch: a run
resumed at step k repeats the uninterrupted run, and two ranks repeat one, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rgbench.core import checkpoint
from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.launch import Ranks
from rgbench.core.process import StopRequest, memory_explained
from rgbench.core.run import RunDirectory, stream_generator
from rgbench.core.shard import gather, gather_all, is_shard, mesh_of, part_of
from rgbench.data.batches import Batch, BatchLoader, DataSource
from rgbench.models.student import unsharded
from rgbench.train.base import OptimiserGroup, StepDraws, StepResult, Trainer, autocast
from rgbench.train.identity import check_checkpoint, free_keys
from rgbench.train.log import CaptionCount, CostMeter, Monitor, check_trackers, merge_costs, merge_counts, tile
from rgbench.train.recipe import BaseRecipe, LCDRecipe, TrainSection

if TYPE_CHECKING:
    from rgbench.train.gold import GoldMonitor

SAMPLED_PROMPTS = 8  # of a sample grid, the first of the data
SMALLEST_LOSS_SCALE = 1.0  # below it, float16's gradients are not too large but wrong
ADVICE = "no parameter was changed; look at these samples, or lower train.lr or guidance.scale"
MEMORY_ADVICE = (
    "use a larger train.gradient_accumulation_steps, train.gradient_checkpointing=true, or several GPUs with "
    "train.shard=true"
)
NEWER_PARTS = ("correlations",)  # that older checkpoints lack; they stay as they begin
T = TypeVar("T")


class Loop:
    """Trains until the recipe's last step.

    Args:
        trainer: the method.
        source: the data.
        recipe: validated.
        run: where checkpoints, logs and samples go; the main rank alone writes there.
        ranks: those that train together; this process alone by default.
        contents: of :func:`~rgbench.train.identity.read_contents`, by which a checkpoint is known as this run's.

    Attributes:
        step: optimiser steps done.

    Raises:
        UsageError: the batch cannot be split evenly.
    """

    def __init__(
        self,
        trainer: Trainer,
        source: DataSource,
        recipe: BaseRecipe,
        run: RunDirectory,
        ranks: Ranks | None = None,
        contents: Mapping[str, Any] | None = None,
    ) -> None:
        self.trainer, self.source, self.recipe, self.run = trainer, source, recipe, run
        self.ranks, self.contents = ranks or Ranks(), contents or {}
        train = recipe.train
        check_split(train, self.ranks.size)
        self.is_sharded = mesh_of(trainer.models.unet) is not None
        check_trackers(train)
        self.updater = Updater(trainer.optimiser_groups(), train.dtype, self.ranks, trainer.models.device.type)
        _prepare_networks(trainer, train)
        positions, num_micro = self.ranks.part_of(train.batch_size), train.gradient_accumulation_steps
        self.loader = BatchLoader(
            source, recipe.seed, train.batch_size, positions, num_micro, train.num_workers, train.steps
        )
        self.gold_every = recipe.monitor.oracle_every if isinstance(recipe, LCDRecipe) else 0
        self.gold = _gold_monitor(trainer) if self.gold_every else None
        self.step = 0
        self.cost = CostMeter(device_type=trainer.models.device.type)
        self.captions = CaptionCount(trainer.tokenizers())

    def train(self, stop: StopRequest, resume_command: str) -> None:
        """Run the remaining steps.

        Args:
            stop: asked between two steps; one rank's signal stops all.
            resume_command: shown to the user of an interrupted run.

        Raises:
            Interrupted: a signal came; the state is saved.
            RgbenchError: a loss or gradient is not finite; parameters are those before that step.
        """
        first = list(range(min(SAMPLED_PROMPTS, self.source.length or SAMPLED_PROMPTS)))
        prompts = self.ranks.together(lambda: self.source.load(first).prompts)
        train = self.recipe.train
        with contextlib.ExitStack() as stack:
            stack.callback(self.loader.close)
            monitor = None
            if self.ranks.is_main:
                monitor = Monitor(self.run, self.step, train)
                stack.enter_context(monitor)
            if self.step and self._is_due(train.sample_every):  # a kill may have come between checkpoint and grid
                self._sample(monitor, prompts, again=False)
            while self.step < train.steps:
                self._stop_if_asked(stop, resume_command)
                start = time.monotonic()
                values = self.train_step()
                if monitor is not None:
                    monitor.show(self.step, values, time.monotonic() - start)
                self._record(monitor, values, prompts)

    def _record(self, monitor: Monitor | None, values: dict[str, float], prompts: list[str]) -> None:
        """Log, save and sample where this step is due."""
        train = self.recipe.train
        if any(map(self._is_due, (self.gold_every, train.log_every, train.save_every, train.sample_every))):
            self._stop_if_moved()
        if self._is_due(self.gold_every):
            values = values | self._together(lambda: self._look(monitor), exchanging=True)
        if self._is_due(train.log_every):
            self.ranks.together(lambda: None if monitor is None else monitor.log(self.step, values))
        if monitor is not None and self._is_due(self.gold_every):
            monitor.show_gold(self.step, values)
        if self._is_due(train.save_every):
            self.save()
        if self._is_due(train.sample_every):
            self._sample(monitor, prompts)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.recipe.train.steps)

    def _together(self, work: Callable[[], T], exchanging: bool = False) -> T:
        """Run work on every rank; one that lacks memory stops all.

        Args:
            work: to be done.
            exchanging: it calls the networks, so that ranks with shards wait for one another inside. One that fails
                there leaves at once, and the others lose it.
        """

        def explained() -> T:
            with memory_explained(f"step {self.step}", MEMORY_ADVICE):
                return work()

        if not (exchanging and self.is_sharded):
            return self.ranks.together(explained)
        try:
            return explained()
        except (RgbenchError, OSError) as error:
            if self.ranks.is_main:
                raise
            raise RgbenchError(f"rank {self.ranks.rank}: {error}") from error

    def _calls(self, monitor: Monitor | None) -> bool:
        """Whether this rank takes part when the main one alone needs what the networks give."""
        return monitor is not None or self.is_sharded

    def _look(self, monitor: Monitor | None) -> dict[str, float]:
        """Gold and the trained reward of the student as it is, for the main rank."""
        return self.gold.measure() if self._calls(monitor) and self.gold is not None else {}

    def _sample(self, monitor: Monitor | None, prompts: list[str], again: bool = True) -> None:
        """Log a grid of the same prompts and seeds at every look, so that one sees the student learn.

        Args:
            monitor: None on all ranks but the main one.
            prompts: of the grid.
            again: also where the grid of this step is there.
        """
        (due,) = self.ranks.largest(monitor is not None and (again or not monitor.grid_file(self.step).exists()))
        if not due:
            return

        def sample() -> Tensor | None:
            if not self._calls(monitor):
                return None
            generators = [stream_generator(self.recipe.seed, "preview", 0, i) for i in range(len(prompts))]
            with self.updater.autocast():
                return self.trainer.sample(prompts, generators)  # type: ignore[attr-defined]  # a student's alone

        def show() -> None:
            if monitor is not None and images is not None:
                monitor.log_grid(self.step, tile(images.cpu()))

        images = self._together(sample, exchanging=True)
        self._together(show)

    def _stop_if_asked(self, stop: StopRequest, resume_command: str) -> None:
        (number,) = self.ranks.largest(stop.signal or 0)
        if not number:
            return
        stop.signal = number
        self._stop_if_moved()
        self.save()
        self.ranks.on_main(lambda: self.run.update(status="interrupted"))
        message = f"{self.run.path}: stopped; {self.step} of {self.recipe.train.steps} steps are saved"
        self.ranks.stop_all(Interrupted(message, resume_command=resume_command, exit_code=stop.exit_code))

    def _stop_if_moved(self) -> None:
        """Stop where the run's folder was removed, or was renamed: then it is saved where it lies now."""
        path = self.run.path
        place = self.run.place() if self.ranks.is_main else path
        gone, moved = self.ranks.largest(place is None, place not in (None, path))
        if gone:
            self.ranks.stop_all(RgbenchError(f"{path}: was removed while it trained; the same command begins again"))
        if moved:
            if place is not None:
                self.run = RunDirectory(place)
            self.save()
            self.ranks.on_main(lambda: self.run.update(status="interrupted"))
            what = f"was moved while it trained; {self.step} steps are saved in {place}"
            self.ranks.stop_all(RgbenchError(f"{path}: {what}; resume them with --out"))

    def train_step(self) -> dict[str, float]:
        """One optimiser step.

        Returns:
            Means of all loss terms and statistics over the global batch, and the gradient norms before clipping.
        """
        samples = self._together(self._accumulate, exchanging=True)
        rows, norms = _fetch(samples.of_all_ranks(self.ranks), self.updater.reduce())
        self._check(samples, rows, norms)
        watched = self._watch(samples.columns(rows))
        self._together(lambda: self._update(norms))
        self.step += 1
        self.cost.images += self.recipe.train.batch_size
        self.cost.reward_calls += samples.reward_calls * self.ranks.size
        return samples.means(rows) | watched | self.updater.describe(norms)

    def _accumulate(self) -> StepSamples:
        """Losses and gradients of this rank's part of the batch."""
        load = partial(self._load, self.step)
        samples, batches = StepSamples(), self.ranks.together(load) if self.is_sharded else load()
        for positions, batch in zip(self.loader.micro, batches, strict=True):
            draws = StepDraws(
                self.recipe.seed, self.step, len(positions), first=positions[0], dtype=self.trainer.models.dtype
            )
            with self.updater.autocast():
                result = self.trainer.step(batch, draws)
            samples.add(result, batch.ids)
            self.captions.add(batch)
            self.updater.backward(result, 1 / len(batches))
        return samples

    def _update(self, norms: dict[str, float]) -> None:
        if moved := self.updater.step(self.step, finite=all(map(math.isfinite, norms.values()))):
            self.trainer.after_update(moved)

    def _load(self, step: int) -> list[Batch]:
        batches, side = self.loader.load(step), self.trainer.models.resolution
        for images in (batch.images_BCHW for batch in batches if batch.images_BCHW is not None):
            if images.shape[2:] != (side, side):
                size = "×".join(str(n) for n in images.shape[2:])
                raise UsageError(f"data.resolution: images of {size} pixels, the model takes {side}×{side}")
        return batches

    def load_batch(self, step: int) -> Batch:
        """This rank's first micro-batch of a step; the global batch where there is one rank and no accumulation.

        Raises:
            UsageError: the data's resolution is not the model's.
        """
        return self._load(step)[0]

    def _check(self, samples: StepSamples, rows: Tensor, norms: dict[str, float]) -> None:
        """Stop all ranks before anything changes where a loss or gradient is not finite.

        Raises:
            RgbenchError: names the step, the term and the samples.
        """
        fault = samples.fault(rows)
        wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if fault is None and (not wrong or self.updater.scales):
            return
        self.updater.drop()
        ids = self.ranks.gather_lists(samples.ids)
        if fault is not None:
            what = f"{fault[0]} is not finite for {_listed([ids[position] for position in fault[1]])}"
        else:
            what = f"the gradient of the {wrong[0]} is not finite, in the batch of {_listed(ids)}"
        self.ranks.stop_all(RgbenchError(f"step {self.step}: {what}; {ADVICE}"))

    def _watch(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """What the trainer says of the batch, which all ranks hold alike: it stops all of them or none."""
        try:
            return self.trainer.watch(self.step, columns)
        except RgbenchError as error:
            self.updater.drop()
            self.ranks.stop_all(error)

    def save(self) -> None:
        """Commit a checkpoint and update run.json; the other ranks wait for the main one."""
        for name, group in self.updater.groups.items():
            self.ranks.check_equal([own for own in group.parameters if not is_shard(own)], f"the {name}")
        counts, keep = self.read_counts(), self.ranks.is_main
        own, meta = self.updater.state()
        modules = {stem: module.state_dict() for stem, module in self.trainer.modules().items()}
        tensors = {stem: gather_all(state, keep) for stem, state in (modules | own).items()}
        self.ranks.on_main(lambda: self._commit(tensors, meta, counts))

    def read_counts(self) -> dict[str, Any]:
        """Cost and captions of the run, from all ranks."""
        costs = self.ranks.gather_lists([self.cost.read()])
        captions = self.ranks.gather_lists([self.captions.state_dict()])
        return {"cost": merge_costs(costs), "captions": merge_counts(captions)}

    def _commit(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], counts: dict[str, Any]) -> None:
        meta |= {"step": self.step, **counts, "run": {"recipe": self.recipe.model_dump(mode="json"), **self.contents}}
        checkpoint.commit(self.run.checkpoints, self.step, tensors, meta, keep=self.recipe.train.keep_checkpoints)
        self.run.update(step=self.step, **counts)

    def restore(self) -> None:
        """Continue from the newest intact checkpoint, or from the start where there is none.

        Raises:
            UsageError: it is another run's.
        """
        newest = self.ranks.together(self._find_newest)
        (step,) = self.ranks.largest(-1 if newest is None else checkpoint.step_of(newest))
        if step < 0:
            return
        path = checkpoint.path_of(self.run.checkpoints, step)
        tensors, meta = self.ranks.together(lambda: self._read(path))
        for stem, module in self.trainer.modules().items():
            if stem in tensors or stem not in NEWER_PARTS:
                own = module.state_dict()
                module.load_state_dict({name: part_of(value, own.get(name)) for name, value in tensors[stem].items()})
        self.updater.restore(tensors, meta)
        self.step = meta["step"]
        if self.ranks.is_main:  # it holds the sum; the others start from zero
            self.cost = CostMeter(meta["cost"], self.trainer.models.device.type)
            self.captions.load_state_dict(meta.get("captions", self.captions.state_dict()))

    def unshard(self) -> None:
        """Gather the network that is exported, on the main rank's CPU, once nothing is left to train."""
        if self.is_sharded and isinstance(self.recipe, LCDRecipe):
            name = self.recipe.sampling.network
            setattr(self.trainer, name, unsharded(getattr(self.trainer, name), self.ranks.is_main))

    def _find_newest(self) -> Path | None:
        if not self.ranks.is_main:
            return None
        checkpoint.remove_leftovers(self.run.checkpoints)
        return checkpoint.latest(self.run.checkpoints)

    def _read(self, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors, meta = checkpoint.load(path)
        check_checkpoint(path, meta, self.recipe.model_dump(mode="json"), self.contents, free_keys(self.recipe))
        return tensors, meta


class Updater:
    """From losses to changed parameters: backward, mean over ranks, loss scale, clipping, AdamW.

    Args:
        groups: by the name under which a step groups its losses.
        dtype: ``train.dtype`` of the recipe.
        ranks: those whose gradients are averaged.
        device_type: ``cpu`` or ``cuda``.

    Attributes:
        optimisers: AdamW by group.
        num_skipped: optimiser steps skipped because float16 overflowed, since the start of the run.
    """

    def __init__(self, groups: dict[str, OptimiserGroup], dtype: str, ranks: Ranks, device_type: str) -> None:
        self.groups, self.dtype, self.ranks, self.device_type = groups, dtype, ranks, device_type
        self.optimisers = {name: group.adamw() for name, group in groups.items()}
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
        self.num_skipped = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision of a step, and of everything else that calls the networks while they train."""
        return autocast(self.dtype, self.device_type)

    def backward(self, result: StepResult, share: float) -> None:
        """Add one micro-batch's gradients.

        Args:
            result: per-sample losses; an optimiser minimises the sum of its terms' means.
            share: of the micro-batch in this rank's part of the batch, in (0, 1].
        """
        for terms in result.losses.values():
            loss = torch.stack([term.mean() for term in terms.values()]).sum()
            self.scaler.scale(loss if share == 1 else loss * share).backward()

    def reduce(self) -> dict[str, Tensor]:
        """Average the gradients over the ranks and clip them.

        Returns:
            The gradient norm before clipping of each group that has a loss in this step, the same on all ranks.
        """
        norms = {}
        for name, group in self.groups.items():
            gradients = [p.grad for p in group.parameters if p.grad is not None]
            if not gradients:
                continue
            self.ranks.average([gradient for gradient in gradients if not is_shard(gradient)])
            self.scaler.unscale_(self.optimisers[name])
            norms[name] = gather(nn.utils.get_total_norm(gradients))
            nn.utils.clip_grads_with_norm_(group.parameters, group.section.max_grad_norm, norms[name])
        return norms

    def step(self, step: int, finite: bool) -> list[str]:
        """Change the parameters of the groups that have gradients.

        Args:
            step: optimiser step, from 0, for learning rates that change.
            finite: whether all gradient norms are; with float16 an overflow lowers the loss scale instead.

        Returns:
            Names of the groups that moved.

        Raises:
            RgbenchError: float16's loss scale has no room left.
        """
        moved = []
        for name, optimiser in self.optimisers.items():
            group = self.groups[name]
            if group.lr_factor is not None:
                for own in optimiser.param_groups:
                    own["lr"] = group.lr * group.lr_factor(step)
            if finite and any(p.grad is not None for p in group.parameters):
                self.scaler.step(optimiser)
                moved.append(name)
            optimiser.zero_grad(set_to_none=True)
        if self.scales:
            self.scaler.update()
            if self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
                raise RgbenchError("the gradient overflows float16 at any loss scale; train with train.dtype=bfloat16")
        self.num_skipped += not finite
        return moved

    @property
    def scales(self) -> bool:
        """Whether a gradient that is not finite lowers a loss scale instead of ending the run."""
        return self.scaler.is_enabled()

    def describe(self, norms: dict[str, float]) -> dict[str, float]:
        """Values for the log; a norm that overflowed is left out."""
        values = {f"grad_norm/{name}": norm for name, norm in norms.items() if math.isfinite(norm)}
        return values | ({"loss_scale": self.scaler.get_scale()} if self.scales else {})

    def drop(self) -> None:
        """Drop the gradients of a step that is given up."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file stem and plain data for a checkpoint."""
        tensors: dict[str, dict[str, Tensor]] = {}
        settings: dict[str, Any] = {}
        for name, optimiser in self.optimisers.items():
            tensors[f"optimiser-{name}"], settings[name] = checkpoint.flatten_optimiser(optimiser)
        return tensors, {"optimisers": settings, "loss_scale": self.scaler.state_dict(), "skipped": self.num_skipped}

    def restore(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        for name, optimiser in self.optimisers.items():
            checkpoint.restore_optimiser(optimiser, tensors[f"optimiser-{name}"], meta["optimisers"][name])
        if self.scales:
            self.scaler.load_state_dict(meta["loss_scale"])
        self.num_skipped = meta.get("skipped", 0)  # not in checkpoints of the first version


class StepSamples:
    """Per-sample losses and statistics of one optimiser step, from all its micro-batches.

    Attributes:
        ids: of this rank's samples so far.
        reward_calls: images the expert scored on this rank.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.reward_calls = 0
        self._columns: dict[str, list[Tensor]] = {}
        self._titles: dict[str, str] = {}

    def add(self, result: StepResult, ids: list[str]) -> None:
        """Take one micro-batch's values.

        Raises:
            RgbenchError: a loss term or statistic that is not one value per sample.
        """
        columns = {
            f"loss/{term}": (f"loss term {term} of the {name}", value)
            for name, losses in result.losses.items()
            for term, value in losses.items()
        }
        columns |= {name: (f"statistic {name}", value) for name, value in result.stats.items()}
        device = next(value for _, value in columns.values()).device  # a loss's; a statistic may be on the CPU
        for key, (title, value) in columns.items():
            if value.shape != (len(ids),):
                shape = tuple(value.shape)
                raise RgbenchError(f"{title} has shape {shape}: a reward gives one score per image, (B,)")
            self._titles[key] = title
            self._columns.setdefault(key, []).append(value.detach().to(device, torch.float64))
        self.ids += ids
        self.reward_calls += result.reward_calls

    def of_all_ranks(self, ranks: Ranks) -> Tensor:
        """All samples' values in the order of the global batch, (B, columns)."""
        return ranks.gather_rows(torch.stack([torch.cat(parts) for parts in self._columns.values()], dim=1))

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Columns (B,) by name, of the rows of :meth:`of_all_ranks`."""
        return dict(zip(self._columns, rows.unbind(1), strict=True))

    def means(self, rows: Tensor) -> dict[str, float]:
        """Means by name, of the rows of :meth:`of_all_ranks`.

        One that is not finite is left out, since neither JSON nor a curve can hold it: a gradient's where float16
        overflowed, and the step is skipped.
        """
        means = zip(self._columns, rows.mean(0).tolist(), strict=True)
        return {name: value for name, value in means if math.isfinite(value)}

    def fault(self, rows: Tensor) -> tuple[str, list[int]] | None:
        """The first loss term that is not finite, and its samples' positions in the global batch."""
        if rows.isfinite().all():
            return None
        for column, (key, title) in enumerate(self._titles.items()):
            wrong = (~rows[:, column].isfinite()).nonzero().flatten().tolist()
            if key.startswith("loss/") and wrong:
                return title, wrong
        return None


def check_split(train: TrainSection, num_ranks: int) -> None:
    """Refuse a batch that ranks and micro-batches do not divide.

    Raises:
        UsageError: names the numbers.
    """
    parts = num_ranks * train.gradient_accumulation_steps
    if train.batch_size % parts:
        raise UsageError(
            f"train.batch_size {train.batch_size} cannot be split over {num_ranks} processes × "
            f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}; make it a multiple of {parts}"
        )


def _gold_monitor(trainer: Any) -> GoldMonitor:
    from rgbench.train.gold import GoldMonitor  # with timm, which takes seconds

    return GoldMonitor(trainer)


def _prepare_networks(trainer: Any, train: TrainSection) -> None:
    """Trade time for memory or start-up for speed; changes no number beyond rounding."""
    fake = [trainer.fake] if hasattr(trainer, "fake") else []
    if train.gradient_checkpointing:
        for network in (trainer.student, *fake):
            network.enable_gradient_checkpointing()
        trainer.models.vae.enable_gradient_checkpointing()  # for the reward's gradient through the decoder
    if train.compile:
        for network in (trainer.models.unet, trainer.student, trainer.target, *fake):
            network.compile()  # in place: names in checkpoints stay


def _fetch(rows: Tensor, norms: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Everything the host must know before the update, in one synchronisation with the device."""
    fetched = torch.cat([rows.flatten(), torch.stack(list(norms.values())).to(rows.dtype)]).cpu()
    return fetched[: rows.numel()].view_as(rows), dict(zip(norms, fetched[rows.numel() :].tolist(), strict=True))


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return ", ".join(ids[:8]) + more
