"""From losses to changed parameters: backward, the mean over ranks, the loss scale, clipping, AdamW."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from rgbench import checkpoint
from rgbench.errors import RgbenchError
from rgbench.launch.ranks import Ranks
from rgbench.trainers.contract import Learner, StepResult
from rgbench.trainers.precision import autocast
from rgbench.trainers.recipe import TrainSection

SMALLEST_LOSS_SCALE = 1.0  # below it, float16's gradients are not too large but wrong


class Updater:
    """The optimisers of a run and what stands before each of their steps.

    Args:
        learners: what learns, by the name under which a step groups its losses.
        train: the recipe's section.
        ranks: those whose gradients are averaged.
        device_type: ``cpu`` or ``cuda``.

    Attributes:
        optimisers: AdamW by learner.
        num_skipped: optimiser steps left out because float16 overflowed, since the start of the run.
    """

    def __init__(self, learners: dict[str, Learner], train: TrainSection, ranks: Ranks, device_type: str) -> None:
        self.learners, self.train, self.ranks, self.device_type = learners, train, ranks, device_type
        self.optimisers = {name: learner.adamw(train.betas, train.weight_decay) for name, learner in learners.items()}
        self.scaler = torch.amp.GradScaler(device_type, enabled=train.dtype == "float16")
        self.num_skipped = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision of a step, and of all else that calls the networks while they train."""
        return autocast(self.train.dtype, self.device_type)

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
            Each optimiser's gradient norm before clipping, the same on all ranks.
        """
        norms = {}
        for name, learner in self.learners.items():
            gradients = [p.grad for p in learner.parameters if p.grad is not None]
            self.ranks.average(gradients)
            if gradients:
                self.scaler.unscale_(self.optimisers[name])
            norms[name] = learner.clip(self.train.max_grad_norm)
        return norms

    def step(self, step: int, finite: bool) -> bool:
        """Change the parameters.

        Args:
            step: optimiser step, from 0, for learning rates that change.
            finite: whether all gradient norms are; with float16 an overflow lowers the loss scale instead.

        Returns:
            Whether they were changed.

        Raises:
            RgbenchError: float16's loss scale has no room left.
        """
        for name, optimiser in self.optimisers.items():
            self.learners[name].set_lr(optimiser, step)
            if finite:
                self.scaler.step(optimiser)
            optimiser.zero_grad(set_to_none=True)
        if self.scales:
            self.scaler.update()
            if self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
                raise RgbenchError("the gradient overflows float16 at any loss scale; train with train.dtype=bfloat16")
        self.num_skipped += not finite
        return finite

    @property
    def scales(self) -> bool:
        """Whether a gradient that is not finite lowers a loss scale instead of ending the run."""
        return self.scaler.is_enabled()

    def describe(self, norms: dict[str, float]) -> dict[str, float]:
        """What of the update the log shows; a norm that overflowed is no number and is left out."""
        values = {f"grad_norm/{name}": norm for name, norm in norms.items() if math.isfinite(norm)}
        return values | ({"loss_scale": self.scaler.get_scale()} if self.scales else {})

    def drop(self) -> None:
        """Forget the gradients of a step that is given up."""
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
        """Undo :meth:`state`."""
        for name, optimiser in self.optimisers.items():
            checkpoint.restore_optimiser(optimiser, tensors[f"optimiser-{name}"], meta["optimisers"][name])
        if self.scales:
            self.scaler.load_state_dict(meta["loss_scale"])
        self.num_skipped = meta.get("skipped", 0)  # not in checkpoints of the first version
