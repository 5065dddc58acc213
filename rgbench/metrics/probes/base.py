"""Probes: metrics that look for one kind of fault, against real images where there are any of the evaluated size.

The real images are the benchtop's scenes, one for each prompt: both sides are then resampled together; or a user's own
folder, of no prompt: each side is then resampled by itself. A value is the difference to them, 0 its good end. Without
real images it is an absolute value, to be compared with those of the teacher and of the LCD student.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.core.registry import names, resolve
from rgbench.data.prompts import Prompt
from rgbench.metrics.base import Metric
from rgbench.metrics.context import Context
from rgbench.metrics.reference import RealCrops, ReferenceFolder, ReferenceScenes
from rgbench.metrics.statistics import bootstrap_interval, unpaired_bootstrap_interval
from rgbench.metrics.values import MetricInfo, MetricValue, Protocol

NO_CAPTIONS = "no gap to real: nothing says what the real images show"

Real = ReferenceScenes | RealCrops

log = logging.getLogger(__name__)


class Probes(Metric):
    """Every probe that fits, plug-ins' included; those that do not are logged and left out.

    Args:
        context: any prompts.

    Raises:
        UsageError: no probe fits.
    """

    name = "probes"
    infos: tuple[MetricInfo, ...] = ()
    parts = ("probes",)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.probes: list[Metric] = []
        for name in names("probe"):
            try:
                self.probes.append(resolve("probe", name)(context))
            except UsageError as error:
                log.warning("probe %s: left out: %s", name, error)
        if not self.probes:
            raise UsageError("no probe suits these prompts; see: rgbench ls probes")
        self.infos = tuple(info for probe in self.probes for info in probe.infos)
        self.planned = tuple(planned for probe in self.probes for planned in probe.planned)

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        for probe in self.probes:
            probe.update(images, prompts, positions)

    def compute(self) -> list[MetricValue]:
        return [value for probe in self.context.track(self.probes, "probes", "probes") for value in probe.compute()]


class Probe(Metric):
    """A metric whose values are differences to real images, or absolute values where there are none.

    Args:
        context: any prompts.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.real, self.lacking = find_real(context)

    def compared(self, reads_prompt: bool = False) -> tuple[Real | None, tuple[str, ...]]:
        """The real images that a value is a difference to, if any, and its flags.

        Args:
            reads_prompt: the value is of an image and its prompt; real images of no prompt have none.
        """
        if self.real is None:
            return None, (self.lacking,) if self.lacking else ()
        if reads_prompt and not self.real.paired:
            return None, (NO_CAPTIONS,)
        return self.real, self.real.flags

    def fields(self, real: Real | None, **own: Any) -> dict[str, Any]:
        """Protocol fields; absolute values compare only with those of images of one size."""
        reference = {"reference": real.fields()} if real else {"reference": None, "image_px": self.context.resolution}
        return self.context.protocol(**reference, **own)

    def of_real(self, real: Real, protocol: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What the probe reads in the real images, float64: made once for all evaluated models."""
        return real.keep(self, {"protocol": protocol, "device": str(self.context.device)}, make)


class PerImageProbe(Probe):
    """A probe that reads one or several statistics from each image.

    The image of a prompt is compared with the real image of that prompt, so that what the prompt asks for cancels.
    A user's own real images belong to no prompt: the value is then the difference of two means, its interval that of
    two independent samples, and its rows are the images' differences to the real mean, whose standard error
    (``extra["real_error"]``) two models share.

    Args:
        context: any prompts.
        protocol: fields of its own.

    Attributes:
        reads_prompt: names of the values that are about an image and its prompt.
    """

    reads_prompt: ClassVar[tuple[str, ...]] = ()
    per_image_state = ("rows",)

    def __init__(self, context: Context, **protocol: Any) -> None:
        super().__init__(context)
        self.shared = self.fields(self.real, **protocol)
        self.planned = tuple(
            (info.name, Protocol.of(info.name, self.fields(self._real_of(info.name), **protocol)))
            for info in self.infos
        )
        self.rows = np.full((len(self.infos), len(context.prompts)), np.nan)

    @abstractmethod
    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(V, B) statistics of (B, 3, H, W) images in [0, 1], in the order of ``infos``.

        Without prompts, NaN for statistics that read them.
        """

    def update(self, images: Tensor, prompts: Sequence[Prompt], positions: np.ndarray) -> None:
        self.rows[:, positions] = self.measure(images, prompts).double().cpu().numpy()

    def compute(self) -> list[MetricValue]:
        real = self.real if any(self._real_of(info.name) for info in self.infos) else None
        theirs = self.of_real(real, self.shared, lambda: self._measure_real(real)) if real else None
        return [
            self._value(planned, self.rows[i], theirs[i] if theirs is not None else None)
            for i, planned in enumerate(self.planned)
        ]

    def _real_of(self, name: str) -> Real | None:
        return self.compared(name in self.reads_prompt)[0]

    def _value(self, planned: tuple[str, Protocol], ours: np.ndarray, theirs: np.ndarray | None) -> MetricValue:
        real, flags = self.compared(planned[0] in self.reads_prompt)
        over_prompts, extra = self.context.over_prompts, {"level": float(ours.mean())}
        if real is None or theirs is None:
            rows, interval = ours, bootstrap_interval(over_prompts(ours))
        elif real.paired:
            rows = ours - theirs
            interval = bootstrap_interval(over_prompts(rows))
        else:
            rows = ours - theirs.mean()
            interval = unpaired_bootstrap_interval(over_prompts(ours), theirs)
            extra["real_error"] = float(theirs.std(ddof=1) / np.sqrt(len(theirs)))
        if real is not None and theirs is not None:
            extra["real"] = float(theirs.mean())
        return MetricValue(
            *planned,
            value=float(rows.mean()),
            interval=interval,
            num_images=len(rows),
            reference="real" if real else None,
            flags=flags,
            extra={**extra, "groups": self.context.by_group(rows)},
            rows=rows,
        )

    def _measure_real(self, real: Real) -> np.ndarray:
        prompts, rows = self.context.prompts.prompts, np.empty((len(self.infos), len(real)))
        for images, at in real.batches():
            shown = [prompts[i] for i in at] if real.paired else []
            rows[:, at] = self.measure(images.to(self.context.device), shown).double().cpu().numpy()
        return rows


def find_real(context: Context) -> tuple[Real | None, str]:
    """The real images that probes compare with, if any; and why the set metrics' folder cannot serve, or ""."""
    folder = context.features.reference
    if isinstance(folder, ReferenceFolder):
        crops = context.features.remember(f"crops {context.resolution}", lambda: _crops(folder, context.resolution))
        return (None, crops.lacking) if crops.lacking else (crops, "")
    return (context.reference, "") if _has_scenes(context) else (None, "")


def _has_scenes(context: Context) -> bool:
    """Whether every prompt has a real scene of the evaluated size."""
    if context.resolution != IMAGE_SIZE:
        return False
    try:
        return len(context.reference.scenes) == len(context.prompts)
    except UsageError:  # a prompt without a scene
        return False


def _crops(folder: ReferenceFolder, side: int) -> RealCrops:
    crops = RealCrops(folder, side)
    crops.report()
    return crops
