"""A verdict as a file: what ``rgbench verdict`` writes and the report reads.

results/{world}/{model}/{generation id}/verdict.json        read with load_verdicts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rgbench.errors import UsageError
from rgbench.evaluation.results import Generation
from rgbench.files import read_json
from rgbench.metrics.contract import Metric

FILE = "verdict.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FigureChange(_Frozen):
    """One figure of the model beside its base's and the teacher's.

    Attributes:
        metric: how it is named and shown.
        protocol: id of the protocol.
        model: value of the model.
        base: of the LCD student.
        teacher: of the teacher; None where it was not measured under this protocol.
        deterioration: how much worse than the base, in the metric's unit; for a trained reward, the gain.
        low: of the 95 % interval of the deterioration; None where there is none.
        high: likewise.
        basis: "images", "jackknife", "quadrature" or "none".
        delta: what LCD seeds differ by; None with too few of them.
        detectable: the true deterioration that so many images find beyond delta with probability .8.
        clear: the interval lies above delta: the figure is worse, or the reward is up.
    """

    metric: Metric
    protocol: str
    model: float
    base: float
    teacher: float | None
    deterioration: float
    low: float | None
    high: float | None
    basis: str
    delta: float | None
    detectable: float | None = None
    clear: bool


class Family(_Frozen):
    """Figures that see the same kind of fault.

    Attributes:
        worse: one of them is worse beyond delta.
        better: one of them is better beyond delta, and none worse.
    """

    name: str
    worse: bool
    better: bool = False
    figures: tuple[FigureChange, ...]


class Verdict(_Frozen):
    """What can be said of one model.

    Attributes:
        world: the model's world.
        model: its name.
        generation: sampler settings and weights.
        base: name of the LCD student it is compared with; None where there is none.
        verdict: "over-optimised"; "not over-optimised": the trained reward is up and fewer than two families are
            worse; "no gain": the trained reward is not up; "none": cannot be said, ``words`` tell why.
        words: one sentence or two for people.
        rewards: the trained rewards against the base.
        families: what was measured of each family; a family that was not measured is absent.
        delta_seeds: names of the LCD students that delta is taken from.
        false_positives: ``pairs`` of LCD students judged by the same rule, how many were called ``over_optimised``
            and how many had ``two_worse`` families; None with fewer than 7 of them.
        false_positive_interval: 95 %, of the share called over-optimised; the pairs share students.
        provenance: of this process.
    """

    schema_version: Literal[1] = 1
    world: str
    model: str
    generation: Generation
    base: str | None
    verdict: Literal["over-optimised", "not over-optimised", "no gain", "none"]
    words: str
    rewards: tuple[FigureChange, ...] = ()
    families: tuple[Family, ...] = ()
    delta_seeds: tuple[str, ...] = ()
    false_positives: dict[str, int] | None = None
    false_positive_interval: tuple[float, float] | None = None
    provenance: dict[str, Any] = {}


def load_verdicts(results: Path) -> list[Verdict]:
    """All verdicts under a results folder, by path.

    Raises:
        UsageError: a file that is no verdict of this schema.
    """
    return [_load(path) for path in sorted(results.rglob(FILE))]


def _load(path: Path) -> Verdict:
    try:
        return Verdict.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UsageError(f"{path}: not a verdict: {key}: {fault['msg']}; make it again with rgbench verdict") from error
