"""All probes in one: ``--metric probes``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.errors import UsageError
from rgbench.metrics.contract import Accumulator, Context, Measurement
from rgbench.registry import names, resolve

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
