"""Gold win rate: how often simulated annotators prefer a model's image to the teacher's of the same prompt and seed.

    p = f + (1 − 2f) · σ(s · (utility − utility of the teacher's image))

s is the annotators' sharpness and f the share of their choices that are flipped: the probability itself is averaged,
so no draw of choices is in the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.preferences import preference
from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Metric
from rgbench.metrics.cache import keep_array
from rgbench.metrics.context import Context
from rgbench.metrics.gold import GoldReader, GoldUtility
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

PERCENT = 100
BLOCK = 64  # the teacher's images that one file of the cache stands for


class GoldWinRate(Metric):
    """Share of images that simulated annotators prefer to the teacher's, flips included, in per cent.

    The teacher's utilities are those of its own evaluation where they are stored; else its images are made, once.

    Args:
        context: needs prompts with scenes and a world with a teacher.

    Raises:
        UsageError: as :class:`rgbench.metrics.gold.GoldReader`; no teacher; or the images are the teacher's own.
    """

    name = "gold_win_rate"
    infos = (
        MetricInfo.of(
            "gold_win_rate",
            "Gold win rate",
            "images that the simulated annotators prefer to the teacher's of the same prompt and seed",
            Direction.HIGHER,
            Family.ORACLE,
            "%",
            1,
        ),
    )
    per_image_state = ("wins",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reader = GoldReader(context, self.name)
        if context.opponent is None:
            raise UsageError(f"metric {self.name}: this world has no teacher to compare with; measure gold_utility")
        self.opponent = context.opponent()
        if self.opponent.generation == context.generation:
            raise UsageError(f"metric {self.name}: these are the teacher's own images; measure gold_utility")
        annotators = self.reader.annotators
        choice = {"sharpness": annotators.sharpness, "flip_rate": annotators.flip_rate}
        fields = context.protocol(**self.reader.fields, **choice, teacher=dict(self.opponent.fields))
        self.planned = ((self.name, Protocol.of(self.name, fields)),)
        self.wins = np.full(len(context.prompts), np.nan)
        self._teacher: np.ndarray | None = None

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        difference = self.reader.read(images, positions)[0] - self._teacher_utility(positions)
        self.wins[positions] = preference(torch.from_numpy(difference), self.reader.annotators).numpy()

    def compute(self) -> list[MetricValue]:
        return [self.mean_value(self.planned[0], PERCENT * self.wins)]

    def _teacher_utility(self, positions: np.ndarray) -> np.ndarray:
        """(B,) utilities of the teacher's images, from its own evaluation or from the cache."""
        if self._teacher is None:
            lossless = {**self.context.protocol(**self.reader.fields), "jpeg": None}
            stored = self.opponent.rows(GoldUtility.name, Protocol.of(GoldUtility.name, lossless).id)
            self._teacher = np.full(len(self.wins), np.nan) if stored is None else stored
        lacking = np.unique(positions[np.isnan(self._teacher[positions])] // BLOCK)
        blocks = [np.arange(i * BLOCK, min((i + 1) * BLOCK, len(self.wins))) for i in lacking]
        for at in self.context.track(blocks, "images of the teacher") if blocks else ():
            self._teacher[at] = self._kept(at)
        return self._teacher[positions]

    def _kept(self, at: np.ndarray) -> np.ndarray:
        """Utilities of one block, cached by all that decides them."""
        prompts = [self.context.prompts.prompts[i] for i in at]
        images = [[prompt.id, prompt.seed, prompt.text, prompt.scene] for prompt in prompts]
        fields = {**self.reader.fields, "teacher": dict(self.opponent.fields), "images": images}
        fields.pop("scenes_sha256")  # of all prompts; those of the block are in it

        def make() -> np.ndarray:
            return self.reader.read(from_uint8(self.opponent.images(at)), at)[0]

        return keep_array(self.context.reference.cache, self, fields, make)
