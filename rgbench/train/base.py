"""What a trainer is to the loop.

Random draws of one optimiser step: a row per position in the global batch, a stream per purpose.

Each row is a pure function of (seed, stream, step, position), so batch splits, ranks and resumes cannot change it, and
a method that draws more than another leaves the other's streams as they are.

Mixed precision: the arithmetic of the networks, over float32 weights.

Captions that are longer than what reads them: counted, since a reward cannot judge words that it never sees.

Learning rates over a run, as a pure function of the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rgbench.core.run import RunDirectory, stream_generator
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.clip import num_tokens
from rgbench.train.recipe import ScheduleSection


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


AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(dtype: str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks compute in ``dtype``; none for ``float32``.

    Args:
        dtype: ``train.dtype`` of a recipe.
        device_type: ``cpu`` or ``cuda``.
    """
    kind = AUTOCAST[dtype]
    if kind is None:
        return contextlib.nullcontext()
    # No cache of cast weights: one filled where no gradient is taken would cut the gradient elsewhere.
    return torch.autocast(device_type, dtype=kind, cache_enabled=False)


log = logging.getLogger("rgbench")


class CaptionCount:
    """Counts captions, and those that each reader cuts.

    Args:
        readers: what reads captions, by name.

    Attributes:
        seen: captions so far.
        cut: of them, too long for a reader, by its name.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = readers
        self.seen, self.cut = 0, dict.fromkeys(readers, 0)

    def see(self, batch: Batch) -> None:
        """Count a batch; the first caption that a reader cuts is said."""
        self.seen += len(batch.prompts)
        for name, reader in self.readers.items():
            for identity, num in zip(batch.ids, num_tokens(reader.tokenizer, batch.prompts), strict=True):
                if num <= reader.limit:
                    continue
                if not self.cut[name]:
                    log.warning(
                        "the caption of %s has %d tokens, and the %s reads %d: it does not see the rest. Such captions "
                        "are counted in run.json",
                        identity,
                        num,
                        name.replace("_", " "),
                        reader.limit,
                    )
                self.cut[name] += 1

    def read(self) -> dict[str, Any]:
        """``seen`` and ``cut``, JSON-able."""
        return {"seen": self.seen, "cut": dict(self.cut)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Undo :meth:`read`; a reader that is new begins at nothing."""
        self.seen = kept["seen"]
        self.cut |= {name: num for name, num in kept["cut"].items() if name in self.cut}


def total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several ranks' :meth:`CaptionCount.read`."""
    cut = {name: sum(count["cut"][name] for count in counts) for name in counts[0]["cut"]}
    return {"seen": sum(count["seen"] for count in counts), "cut": cut}


def schedule(section: ScheduleSection, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each optimiser step.

    Args:
        section: ``schedule`` and ``warmup``.
        steps: of the whole run.

    Returns:
        step, from 0 → factor in [0, 1].
    """
    return partial(_factor, section.schedule, section.warmup, steps)


def _factor(kind: str, warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
