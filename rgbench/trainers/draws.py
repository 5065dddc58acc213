"""Random draws of one optimiser step: a row per position in the global batch, a stream per purpose.

Each row is a pure function of (seed, stream, step, position), so batch splits, ranks and resumes cannot change it, and
a method that draws more than another leaves the other's streams as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgbench.run import stream_generator


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
