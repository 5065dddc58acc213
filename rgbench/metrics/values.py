"""Metric values: what a metric reports, from the evaluation to a table cell.

A value is read through the :class:`MetricInfo` of its name, never through a copy of it: results store the name alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from rgbench.core.errors import RgbenchError
from rgbench.core.io import canonical_sha256
from rgbench.core.registry import TABLES, names, resolve

log = logging.getLogger(__name__)


class Family(StrEnum):
    """The question that a metric speaks to, in the order of tables: evidence first, then what was trained on."""

    ORACLE = "oracle"
    PEOPLE = "people"
    HELD_OUT = "held-out reward"
    REWARD = "reward"
    SET_DISTANCE = "set distance"
    DIVERSITY = "diversity"
    SPECTRUM = "spectrum"
    PIXELS = "pixel and colour"
    FRAGILITY = "fragility"


class Direction(StrEnum):
    """The good end of a metric."""

    LOWER = "lower"
    HIGHER = "higher"
    REFERENCE = "reference"  # nearness to the reference images' own value


class MetricInfo(BaseModel):
    """How one number is named, explained and shown.

    Attributes:
        name: in results and on the command line.
        label: in tables; FD-EffLite0 is never called FID.
        about: one line for ``rgbench ls metrics`` and the page's glossary.
        unit: "" for none.
        direction: its good end.
        family: the question that it speaks to.
        decimals: digits shown after the point.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str
    about: str
    unit: str
    direction: Direction
    family: Family
    decimals: int

    @classmethod
    def of(
        cls,
        name: str,
        label: str,
        about: str,
        direction: Direction,
        family: Family,
        unit: str = "",
        decimals: int = 2,
    ) -> MetricInfo:
        """An info by position, for the classes of metrics."""
        return cls(
            name=name, label=label, about=about, unit=unit, direction=direction, family=family, decimals=decimals
        )


# What ``rgbench arena`` asks people; no metric computes it.
PEOPLE = tuple(
    MetricInfo.of(f"people_{name}", label, about, Direction.HIGHER, Family.PEOPLE, "%", 1)
    for name, label, about in (
        ("overall", "People, overall", "comparisons with the arena's other models that this model's image wins"),
        ("quality", "People, quality", "comparisons in which its image is more appealing"),
        ("alignment", "People, alignment", "comparisons in which its image better fits the text"),
    )
)


class Interval(BaseModel):
    """A confidence interval.

    Attributes:
        low: in the metric's unit.
        high: likewise.
        level: coverage, such as 0.95.
        method: in words, such as "Wilson".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: float
    high: float
    level: float
    method: str


class Protocol(BaseModel):
    """How a number is measured: prompts, reference, preprocessing, networks, seed rule.

    Attributes:
        id: a readable name and 8 hex digits over ``fields``; values compare only where it is the same.
        fields: plain data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, metric: str, fields: Mapping[str, Any]) -> Protocol:
        """The protocol of a metric; a named protocol such as ``coco14-30k`` gives the readable name."""
        name = fields.get("protocol") or f"{metric}-{fields['prompts']['num']}"
        return cls(id=identify(name, fields), fields=dict(fields))


@dataclass(frozen=True)
class MetricValue:
    """One number of one model under one protocol.

    Attributes:
        metric: name; see :class:`MetricInfo`.
        protocol: how it was measured.
        value: the number, as a difference to the reference images where ``reference`` says so; None where it is
            undefined, and ``flags`` then say why.
        interval: over images; None where there is none.
        reference: "real" where ``value`` and ``rows`` are differences to real images, whose good end is 0; else None.
        num_images: images that it was made from.
        flags: what a reader must know, such as "n<=d".
        in_sample: the model was trained on this very reward.
        extra: vectors, replicates and further numbers; finite JSON values.
        rows: (n,) value of each image in the order of the prompts; None where there is none, or not loaded.
        rows_sha256: of the stored rows; None where none are stored.
    """

    metric: str
    protocol: Protocol
    value: float | None
    interval: Interval | None
    num_images: int
    reference: str | None = None
    flags: tuple[str, ...] = ()
    in_sample: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)
    rows_sha256: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Metric and protocol id: a column."""
        return self.metric, self.protocol.id


def identify(name: str, fields: Mapping[str, Any]) -> str:
    """A readable name with the first 8 hex digits of the fields' hash."""
    return f"{name}-{canonical_sha256(dict(fields))[:8]}"


def metric_info(name: str, own: Mapping[str, MetricInfo] | None = None) -> MetricInfo:
    """The info of a metric value's name.

    Args:
        name: of a value.
        own: infos that a result brings along, of metrics that are not rgbench's.

    Returns:
        That of rgbench's own metric, else the result's, else that of an installed plug-in, else a neutral one.
    """
    for infos in (shipped_infos(), own or {}):
        if name in infos:
            return infos[name]
    neutral = MetricInfo.of(
        name, name, "of a metric that is not installed", Direction.HIGHER, Family.HELD_OUT, decimals=3
    )
    return _plugin_infos().get(name, neutral)


@cache
def shipped_infos() -> dict[str, MetricInfo]:
    """Infos of rgbench's own metrics and probes, and of people's votes, by metric value name."""
    kinds = [resolve(table, name) for table in ("metric", "probe") for name in TABLES[table]]
    return {info.name: info for infos in (*(kind.infos for kind in kinds), PEOPLE) for info in infos}


@cache
def _plugin_infos() -> dict[str, MetricInfo]:
    found: dict[str, MetricInfo] = {}
    for table in ("metric", "probe"):
        for name in set(names(table)) - set(TABLES[table]):
            try:
                found |= {info.name: info for info in resolve(table, name).infos}
            except (RgbenchError, AttributeError) as error:
                log.warning("%s %s: its infos cannot be read: %s", table, name, error)
    return found
