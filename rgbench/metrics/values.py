"""Metric values: what a metric reports, from the evaluation to a table cell.

A value is read through the :class:`MetricInfo` of its name, never through a copy of it: results store the name alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict


class Family(StrEnum):
    """The question that a metric speaks to."""

    REWARD = "reward"
    HELD_OUT = "held-out reward"
    ORACLE = "oracle"
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


def canonical_sha256(content: Any) -> str:
    """sha256 of the canonical JSON of plain data.

    Raises:
        ValueError: NaN or infinity in it.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identify(name: str, fields: Mapping[str, Any]) -> str:
    """A readable name with the first 8 hex digits of the fields' hash."""
    return f"{name}-{canonical_sha256(dict(fields))[:8]}"


# Stands in for the infos on the metrics' classes until they are there.
_INFOS: dict[str, tuple[str, str, str, str, int]] = {
    "aliased_noise": ("Aliased noise σ", "levels", "reference", "spectrum", 2),
    "aliasing_gain": ("Aliasing gain", "", "reference", "fragility", 2),
    "band_db": ("Energy > .25", "dB", "reference", "spectrum", 2),
    "chroma_band_db": ("Chroma energy > .25", "dB", "reference", "spectrum", 2),
    "chroma_hfer_db": ("Chroma HFER", "dB", "reference", "spectrum", 2),
    "clipped": ("Clipped pixels", "%", "reference", "pixel and colour", 1),
    "colourfulness": ("Colourfulness", "", "reference", "pixel and colour", 1),
    "coverage_efflite0": ("Coverage", "", "higher", "diversity", 3),
    "density_efflite0": ("Density", "", "higher", "set distance", 3),
    "fd_efflite0": ("FD-EffLite0", "", "lower", "set distance", 2),
    "fragility": ("Fragility", "", "lower", "fragility", 2),
    "grid_patch_db": ("Grid peaks, reward patch", "dB", "reference", "spectrum", 2),
    "grid_vae_db": ("Grid peaks, VAE stride", "dB", "reference", "spectrum", 2),
    "hfer_db": ("HFER", "dB", "reference", "spectrum", 2),
    "hps_no_antialias": ("HPS, no antialias", "", "higher", "reward", 2),
    "hps": ("HPS", "", "higher", "reward", 2),
    "kd_efflite0": ("KD-EffLite0 ×1000", "", "lower", "set distance", 2),
    "laplacian_variance": ("Laplacian variance", "levels²", "reference", "pixel and colour", 0),
    "log_spectral_distance_db": ("Log-spectral distance", "dB", "lower", "spectrum", 2),
    "oracle_all": ("Oracle, all right", "%", "higher", "oracle", 1),
    "oracle_colour": ("Oracle, colour", "%", "higher", "oracle", 1),
    "oracle_layout": ("Oracle, layout", "%", "higher", "oracle", 1),
    "oracle_mean": ("Oracle, mean", "%", "higher", "oracle", 1),
    "oracle_shape": ("Oracle, shape", "%", "higher", "oracle", 1),
    "oracle_size": ("Oracle, size", "%", "higher", "oracle", 1),
    "precision_efflite0": ("Precision", "", "higher", "set distance", 3),
    "recall_efflite0": ("Recall", "", "higher", "diversity", 3),
    "rms_contrast": ("RMS contrast", "%", "reference", "pixel and colour", 1),
    "saturation": ("Saturation", "%", "reference", "pixel and colour", 1),
    "saturation_p95": ("Saturation, 95th percentile", "%", "reference", "pixel and colour", 1),
    "slope": ("Spectral slope", "", "reference", "spectrum", 2),
    "total_variation": ("Total variation", "levels", "reference", "pixel and colour", 2),
    "unseen_db": ("Energy above the reward's Nyquist", "dB", "reference", "spectrum", 2),
    "vendi_efflite0": ("Vendi", "", "reference", "diversity", 2),
    "wavelet_noise": ("Wavelet noise σ", "levels", "reference", "pixel and colour", 2),
}


def metric_info(name: str, own: Mapping[str, MetricInfo] | None = None) -> MetricInfo:
    """The info of a metric value's name.

    Args:
        name: of a value.
        own: infos that a result brings along, of metrics that are not rgbench's.

    Returns:
        A neutral one for a name that nothing here knows: a plug-in that is not installed.
    """
    if own and name in own:
        return own[name]
    label, unit, direction, family, decimals = _INFOS.get(name, (name, "", "higher", "held-out reward", 3))
    return MetricInfo(
        name=name,
        label=label,
        about=label,
        unit=unit,
        direction=Direction(direction),
        family=Family(family),
        decimals=decimals,
    )
