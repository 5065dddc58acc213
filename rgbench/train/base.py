"""The contract between a trainer and the loop: draws in, per-sample losses out, and what each optimiser updates.

Every draw is a pure function of (seed, stream, step, position in the global batch). So batch splits, ranks and resumes
cannot change it, and a method that draws more leaves the other streams as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from rgbench.core.run import RunDirectory, stream_generator
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.train.recipe import LCDRecipe, OptimiserSection, ScheduleSection, TrainSection

Network = Literal["target", "student"]
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stateful(Protocol):
    """What can be saved and restored, such as any ``torch.nn.Module``."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Restore them."""
        ...


class Trainer(Protocol):
    """A method: its networks and its step.

    Attributes:
        models: the teacher's parts, frozen.
    """

    models: DiffusionModels

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """What each optimiser updates, by the name under which :class:`StepResult` groups its losses."""
        ...

    def modules(self) -> dict[str, Stateful]:
        """Contents of a checkpoint, by file stem."""
        ...

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """Fingerprints of the rewards trained on."""
        ...

    def tokenizers(self) -> dict[str, CaptionTokenizer]:
        """What reads the captions, by name, to count those that are cut."""
        ...

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Per-sample losses of one batch; changes no parameter and no global random state."""
        ...

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Values for the log from the statistics of a step's global batch, (B,) each; raises to stop the run."""
        ...

    def after_update(self, moved: Collection[str]) -> None:
        """What follows the steps of the optimisers named: the target's EMA, and bounds on parameters."""
        ...

    def export(self, run: RunDirectory) -> Path:
        """Write the product of the finished run into its folder; returns its path."""
        ...


class StudentTrainer(Trainer, Protocol):
    """A method whose product is a student.

    Attributes:
        recipe: with ``sampling``.
        student: f_θ.
        target: f_θ⁻, its EMA.
    """

    recipe: LCDRecipe
    student: Any
    target: Any

    def network(self, name: Network | None = None) -> Any:
        """One of the two; the recipe's ``sampling.network`` by default."""
        ...

    def scheduler(self) -> SchedulerMixin:
        """diffusers' sampler of the student, for its pipeline folder."""
        ...

    def sample(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of :meth:`network`, sampled as the recipe says, one CPU generator each."""
        ...


class StepDraws:
    """Draws for the positions [``first``, ``first`` + ``num``) of one step's global batch, on the CPU.

    Args:
        seed: the run's seed.
        step: optimiser step, from 0.
        num: rows to draw.
        first: position of the first row.
        dtype: floating type of the results.
    """

    def __init__(self, seed: int, step: int, num: int, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.seed, self.step, self.dtype = seed, step, dtype
        self.positions = range(first, first + num)

    def _generators(self, stream: str) -> list[torch.Generator]:
        return [stream_generator(self.seed, stream, self.step, position) for position in self.positions]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal rows, (B, *shape)."""
        rows = [torch.randn(tuple(shape), generator=g, dtype=self.dtype) for g in self._generators(stream)]
        return torch.stack(rows)

    def uniform(self, stream: str, low: float, high: float) -> Tensor:
        """Uniform on [low, high), (B,)."""
        rows = [torch.rand((), generator=g, dtype=self.dtype) for g in self._generators(stream)]
        return torch.stack(rows) * (high - low) + low

    def integers(self, stream: str, high: int) -> Tensor:
        """Uniform on 0 … high − 1, (B,) int64."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self._generators(stream)])


@dataclass(frozen=True)
class StepResult:
    """What one step hands to the loop.

    Attributes:
        losses: optimiser → term → per-sample losses (B,), weights already applied; an optimiser minimises the sum of
            its terms' means, and one that is not named does not move.
        stats: name → detached per-sample values (B,) for the log.
        reward_calls: images the expert scored.
    """

    losses: dict[str, dict[str, Tensor]]
    stats: dict[str, Tensor] = field(default_factory=dict)
    reward_calls: int = 0


@dataclass(frozen=True)
class OptimiserGroup:
    """What one AdamW updates, and how.

    Attributes:
        parameters: a list made once, so that nothing is unfrozen by accident.
        lr: learning rate.
        section: of the recipe, with ``betas``, ``weight_decay`` and ``max_grad_norm``.
        lr_factor: factor of the learning rate by optimiser step, from 0; None for a constant one.
    """

    parameters: list[nn.Parameter]
    lr: float
    section: TrainSection | OptimiserSection
    lr_factor: Callable[[int], float] | None = None

    def adamw(self) -> torch.optim.AdamW:
        """A fresh optimiser."""
        section = self.section
        return torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=section.betas, weight_decay=section.weight_decay, fused=True
        )


def lr_factor(section: ScheduleSection, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by optimiser step, from 0, in [0, 1].

    Args:
        section: ``schedule`` and ``warmup``.
        steps: of the whole run.
    """
    return partial(_lr_factor, section.schedule, section.warmup, steps)


def _lr_factor(kind: str, warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class CaptionTokenizer:
    """A tokenizer that captions go through.

    Attributes:
        tokenizer: of open_clip or transformers.
        limit: tokens that its network reads, with the begin and end marks.
    """

    tokenizer: Any
    limit: int


def autocast(dtype: str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks compute in ``dtype`` over float32 weights.

    Args:
        dtype: ``train.dtype`` of a recipe; ``float32`` for no context.
        device_type: ``cpu`` or ``cuda``.
    """
    kind = AUTOCAST[dtype]
    if kind is None:
        return contextlib.nullcontext()
    # No cache of cast weights: one filled where no gradient is taken would cut the gradient elsewhere.
    return torch.autocast(device_type, dtype=kind, cache_enabled=False)
