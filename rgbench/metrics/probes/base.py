"""All probes in one: ``--metric probes``.

Real images that probes compare with, at the evaluated size or not at all.

the benchtop's scenes   one for each prompt: both sides are left out, or resampled, together
a user's own folder     of no prompt: each side is left out, or resampled, by itself

Probes that read one number, or several, from each image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.core.registry import names, resolve
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Accumulator, Direction, Interval, Measurement, Metric, Quantity
from rgbench.metrics.context import Context
from rgbench.metrics.reference import RealCrops, ReferenceFolder, from_uint8
from rgbench.metrics.statistics import bootstrap_interval, unpaired_bootstrap_interval

log = logging.getLogger(__name__)


class Probes:
    """Every probe that suits the prompts, plug-ins' included; one that does not is named and left out.

    Args:
        context: any prompts.

    Raises:
        UsageError: no probe suits them.
    """

    gathers_within = ("probes",)

    def __init__(self, context: Context) -> None:
        self.track, self.probes = context.track, list[Accumulator]()
        for name in names("probe"):
            try:
                self.probes.append(resolve("probe", name)(context))
            except UsageError as error:
                log.warning("probe %s: left out: %s", name, error)
        if not self.probes:
            raise UsageError("no probe suits these prompts; see: rgbench ls probes")
        self.quantities = tuple(quantity for probe in self.probes for quantity in probe.quantities)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        for probe in self.probes:
            probe.update(images, prompts, positions)

    def finish(self) -> list[Measurement]:
        finished = [probe.finish() for probe in self.track(self.probes, "probes", "probes")]
        return [measurement for measurements in finished for measurement in measurements]


CHUNK = 256
NO_CAPTIONS = "no gap to real: nothing says what the real images show"


class RealScenes:
    """One scene for each prompt.

    Args:
        context: whose prompts all have a scene, at the scenes' size.
    """

    paired = True
    flags: tuple[str, ...] = ()

    def __init__(self, context: Context) -> None:
        self.context, self.num = context, len(context.prompts)

    def fields(self) -> dict[str, Any]:
        """Protocol fields."""
        return self.context.reference.fields()

    def batches(self, num: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Scenes of the first ``num`` prompts with their positions.

        Yields:
            (B, 3, H, W) float32 in [0, 1] on the CPU, and (B,) int64.
        """
        num = self.num if num is None else num
        chunks = np.array_split(np.arange(num), -(-num // CHUNK))
        for at in self.context.track(chunks, "real scenes: probes"):
            yield from_uint8(self.context.reference.images[at]), at

    def keep(self, owner: object, fields: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, once per pixels, fields and code."""
        return self.context.reference.keep(owner, fields, make)


Real = RealScenes | RealCrops


def find_real(context: Context) -> tuple[Real | None, str]:
    """What probes compare with, and why there is nothing where it was asked for.

    A folder that the set metrics compare with serves the probes too. Without real images a probe
    gives absolute levels, to be set beside those of the teacher and of the LCD student.
    """
    folder = context.features.reference
    if isinstance(folder, ReferenceFolder):
        crops = context.features.remember(f"crops {context.resolution}", lambda: _told(folder, context.resolution))
        return (None, crops.lacking) if crops.lacking else (crops, "")
    return (RealScenes(context), "") if has_scenes(context) else (None, "")


def _told(folder: ReferenceFolder, side: int) -> RealCrops:
    crops = RealCrops(folder, side)
    crops.tell()
    return crops


def has_scenes(context: Context) -> bool:
    """Whether every prompt has a real scene of the evaluated size."""
    if context.resolution != IMAGE_SIZE:
        return False
    try:
        return len(context.reference.scenes) == len(context.prompts)
    except UsageError:  # a prompt without a scene
        return False


def without_real(context: Context) -> dict[str, Any]:
    """Protocol fields of a level: it compares only with levels of images of one size."""
    return {"reference": None, "image_px": context.resolution}


def of_real(
    real: Real, probe: object, protocol: Mapping[str, Any], context: Context, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """What a probe reads in the real images, float64: made once, and kept for every model evaluated after."""
    return real.keep(probe, {"protocol": protocol, "device": str(context.device)}, make)


@dataclass(frozen=True)
class Level:
    """A number that an image, or a set of them, has.

    Attributes:
        name: of the figure; against real images ``_gap`` is added.
        label: in tables; likewise.
        unit: "" for none.
        family: as in :class:`Metric`.
        decimals: digits shown.
        direction: as in :class:`Metric`.
        reads_prompt: it is about the image and its prompt, so that a real image of no prompt has none.
    """

    name: str
    label: str
    unit: str
    family: str
    decimals: int
    direction: Direction = "target"
    reads_prompt: bool = False

    def metric(self, against_real: bool) -> Metric:
        """The metric of this level, or of its gap to real images."""
        gap = ("_gap", " gap") if against_real else ("", "")
        return Metric(
            name=self.name + gap[0],
            label=self.label + gap[1],
            direction=self.direction,
            unit=self.unit,
            family=self.family,
            decimals=self.decimals,
        )


class PerImageProbe:
    """What a per-image probe does, but for its numbers.

    The image of a prompt is compared with the real image of that prompt, so that what the
    prompt asks for cancels. A user's own real images belong to no prompt: there the figure is the
    difference of two means, its interval that of two independent samples, and the rows are the images' own
    distances to the real mean, whose standard error (``extra["real_error"]``) two models share.

    Args:
        context: any prompts; where there are real images of this size, figures are gaps to those.
        levels: the numbers that :meth:`measure` gives, in that order.
        protocol: fields of its own.
    """

    gathers_per_image = ("rows",)

    def __init__(self, context: Context, levels: Sequence[Level], **protocol: Any) -> None:
        self.context, self.levels = context, levels
        self.real, self.lacking = find_real(context)
        self.shared = context.protocol(reference=self.real.fields() if self.real else None, **protocol)
        alone = {**self.shared, **without_real(context)}
        self.quantities = tuple(
            Quantity(level.metric(self._is_gap(level)), self.shared if self._is_gap(level) else alone)
            for level in levels
        )
        self.rows = np.full((len(levels), len(context.prompts)), np.nan)

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(L, B) numbers of (B, 3, H, W) images in [0, 1]; without prompts, NaN for levels that read them."""
        raise NotImplementedError

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows[:, positions] = self.measure(images, prompts).double().cpu().numpy()

    def finish(self) -> list[Measurement]:
        found = None
        if self.real and any(map(self._is_gap, self.levels)):
            found = of_real(self.real, self, self.shared, self.context, partial(self._of_real, self.real))
        return [
            self._measurement(level, quantity, self.rows[i], found[i] if found is not None else None)
            for i, (level, quantity) in enumerate(zip(self.levels, self.quantities, strict=True))
        ]

    def _is_gap(self, level: Level) -> bool:
        return self.real is not None and (self.real.paired or not level.reads_prompt)

    def _measurement(self, level: Level, quantity: Quantity, rows: np.ndarray, real: np.ndarray | None) -> Measurement:
        over_prompts = self.context.over_prompts
        if self.real is None or real is None or not self._is_gap(level):
            lacking = (self.lacking or NO_CAPTIONS,) if self.real or self.lacking else ()
            return self._measured(quantity, rows, rows, bootstrap_interval(over_prompts(rows)), lacking, {})
        more = {"real": float(real.mean())}
        if self.real.paired:
            return self._measured(quantity, rows, rows - real, bootstrap_interval(over_prompts(rows - real)), (), more)
        more["real_error"] = float(real.std(ddof=1) / np.sqrt(len(real)))
        interval = unpaired_bootstrap_interval(over_prompts(rows), real)
        return self._measured(quantity, rows, rows - real.mean(), interval, self.real.flags, more)

    def _measured(
        self,
        quantity: Quantity,
        rows: np.ndarray,
        shown: np.ndarray,
        interval: Interval | None,
        flags: tuple[str, ...],
        more: Mapping[str, float],
    ) -> Measurement:
        return Measurement(
            quantity=quantity,
            value=float(shown.mean()),
            interval=interval,
            num_samples=len(rows),
            flags=flags,
            extra={"level": float(rows.mean()), "groups": self.context.by_group(shown), **more},
            rows=shown,
        )

    def _of_real(self, real: Real) -> np.ndarray:
        prompts, rows = self.context.prompts.prompts, np.empty((len(self.levels), real.num))
        for images, at in real.batches():
            shown = [prompts[i] for i in at] if real.paired else []
            rows[:, at] = self.measure(images.to(self.context.device), shown).double().cpu().numpy()
        return rows
