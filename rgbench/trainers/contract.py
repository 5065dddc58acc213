"""What a trainer is to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rgbench.data.contract import Batch
from rgbench.models import DiffusionModels
from rgbench.run import RunDirectory
from rgbench.trainers.draws import StepDraws


@dataclass(frozen=True)
class StepResult:
    """What one step hands to the loop, which alone reduces, checks, clips and updates.

    Attributes:
        losses: optimiser → term → per-sample losses (B,), weights already applied; an optimiser minimises the sum of
            its terms' means.
        stats: name → detached per-sample values (B,) for the log.
        reward_calls: images the expert scored.
    """

    losses: dict[str, dict[str, Tensor]]
    stats: dict[str, Tensor] = field(default_factory=dict)
    reward_calls: int = 0


@dataclass(frozen=True)
class Learner:
    """What one optimiser updates.

    Attributes:
        parameters: a list made once, so that nothing is unfrozen by accident.
        lr: its learning rate.
        betas: AdamW's; None for those of the recipe's train section.
        weight_decay: AdamW's; None as above.
        max_grad_norm: its gradient is clipped to this L2 norm; None as above.
        factor: of the learning rate at a step, from 0; None for a constant one.
    """

    parameters: list[nn.Parameter]
    lr: float
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    factor: Callable[[int], float] | None = None

    def adamw(self, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
        """Its optimiser; the arguments are the recipe's, for what it has not of its own."""
        decay = weight_decay if self.weight_decay is None else self.weight_decay
        return torch.optim.AdamW(self.parameters, lr=self.lr, betas=self.betas or betas, weight_decay=decay, fused=True)

    def clip(self, max_grad_norm: float) -> Tensor:
        """Clip its gradient, to the recipe's norm where it has none of its own; the norm before."""
        return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or max_grad_norm)

    def set_lr(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Give the optimiser its learning rate of a step, from 0."""
        if self.factor is not None:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * self.factor(step)


@dataclass(frozen=True)
class Reader:
    """What reads captions.

    Attributes:
        tokenizer: of open_clip or transformers.
        limit: tokens that it reads, with the begin and end marks.
    """

    tokenizer: Any
    limit: int


class Stateful(Protocol):
    """What can be saved and restored, such as any ``torch.nn.Module``."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take them back."""
        ...


class Trainer(Protocol):
    """A method: its networks and its step.

    Attributes:
        models: the teacher's parts, frozen.
        student: f_θ.
        target: f_θ⁻, the EMA of the student.
    """

    models: DiffusionModels
    student: UNet2DConditionModel
    target: UNet2DConditionModel

    def learners(self) -> dict[str, Learner]:
        """What learns, by the name under which :class:`StepResult` groups its losses."""
        ...

    def modules(self) -> dict[str, Stateful]:
        """What a checkpoint holds, by file stem."""
        ...

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """Fingerprints of the rewards trained on."""
        ...

    def readers(self) -> dict[str, Reader]:
        """What reads the captions, by name, to count those that are cut."""
        ...

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Per-sample losses of one batch; no parameter and no global random state changes."""
        ...

    def after_update(self) -> None:
        """What follows the optimisers' steps: the EMA of the target, and bounds on parameters."""
        ...

    def export(self, run: RunDirectory) -> Path:
        """Write what the finished run was for, in its folder; returns where it lies."""
        ...
