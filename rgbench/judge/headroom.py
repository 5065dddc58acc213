"""Headroom: what a reward could bring, by choosing among images that a model makes anyway.

Of n images of each prompt, pick one: at random, the one that a reward likes best, the one that gold likes best. To
first order, tilting a model by a reward moves gold by their covariance within a prompt; a reward without it can only be
hacked. The honest headroom of a reward is the larger of what its own pick gains over a random one, and of what real
images of the same prompts score above the model's.

    (P, n)  scores of n images of each of P prompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from rgbench.core.config import read_as
from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, seal, unseal, write_json_atomic
from rgbench.metrics.statistics import bootstrap_interval
from rgbench.metrics.values import metric_info

FILE = "headroom.json"
RANDOM = "random"
MIN_SPREAD = 1e-9  # of scores within a prompt, relative to their size: less is rounding


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Mean(_Frozen):
    """A mean over prompts with its 95 % bootstrap interval, of one prompt without."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, rows: np.ndarray) -> Mean:
        """Of (P,) values."""
        found = bootstrap_interval(rows)
        ends = {"low": found.low, "high": found.high} if found else {}
        return cls(value=float(rows.mean()), **ends)


class Pick(_Frozen):
    """The images that one picker takes.

    Attributes:
        by: "random", or the metric whose highest value is taken; equal ones are taken in equal shares.
        reaches: mean of each metric over the picked images.
        gains: the same above a random pick.
        set_distance: Fréchet distance of one picked image for each prompt to real images; None where there are none.
    """

    by: str
    reaches: dict[str, Mean]
    gains: dict[str, Mean]
    set_distance: float | None = None


class Link(_Frozen):
    """How a picker and gold agree on the images of one prompt.

    Attributes:
        by: metric of the picker.
        correlation: Pearson's within a prompt, mean over prompts; None where neither or only one has spread.
        auc: probability that the picker scores the image that gold likes better above the other, ties half.
        num_prompts: on which both have spread.
    """

    by: str
    correlation: Mean | None
    auc: Mean | None
    num_prompts: int


class Group(_Frozen):
    """Some of the prompts; "" are all."""

    name: str
    num_prompts: int
    picks: tuple[Pick, ...]
    links: tuple[Link, ...]


class Range(_Frozen):
    """Single-step predictions from latents noised to a timestep.

    Attributes:
        low: first timestep of the range.
        high: first timestep beyond it.
        timestep: the one that was used, its middle.
        links: between the pickers and gold, of the predictions.
    """

    low: int
    high: int
    timestep: int
    links: tuple[Link, ...]


class Headroom(_Frozen):
    """``headroom.json``, beside a model's results.

    Attributes:
        world: the model's.
        model: its name.
        generation: id of how its images are made.
        prompts: hash of the prompt set.
        num_prompts: prompts.
        samples: images of each.
        reward: metric of the trained reward.
        reward_fields: what tells this reward from others, as in the metric's protocol; None where there is nothing.
        gold: metric that is gold.
        groups: all prompts, then each group.
        ranges: of timesteps; empty where none were asked for.
        real_gain: what real images of the prompts score above the model's in the reward; None without real images.
        words: what may be expected, in one paragraph.
        provenance: of the command.
    """

    schema_version: Literal[1] = 1
    world: str
    model: str
    generation: str
    prompts: str
    num_prompts: int
    samples: int
    reward: str
    reward_fields: dict[str, Any] | None
    gold: str
    groups: tuple[Group, ...]
    ranges: tuple[Range, ...] = ()
    real_gain: float | None = None
    words: str = ""
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> Headroom:
        picks = {pick.by: pick for pick in self.groups[0].picks} if self.groups else {}
        if any(by not in picks for by in (RANDOM, self.reward, self.gold)):
            raise ValueError("groups: a picker is missing")
        if any({self.reward, self.gold} - (pick.gains.keys() & pick.reaches.keys()) for pick in picks.values()):
            raise ValueError("groups: the reward or gold of a pick is missing")
        return self

    def pick(self, by: str) -> Pick:
        """A picker's images of all prompts."""
        return next(pick for pick in self.groups[0].picks if pick.by == by)

    @property
    def honest(self) -> float:
        """Largest gain of the reward that better images alone could give, in its unit."""
        return max(self.pick(self.reward).gains[self.reward].value, self.real_gain or 0.0)


def read_headroom(folder: Path, whose: tuple[str, str, str]) -> Headroom | None:
    """The headroom that lies beside a result; None where there is none.

    Args:
        folder: of the result.
        whose: world, model and generation id of the result.

    Raises:
        UsageError: a file that holds none of this schema, or another model's.
    """
    path = folder / FILE
    if not path.exists():
        return None
    remedy = "remove it and run rgbench headroom"
    found = read_as(Headroom, unseal(read_json(path), path, remedy), f"{path}: no headroom", remedy)
    if (own := (found.world, found.model, found.generation)) != whose:
        raise UsageError(f"{path}: of {'/'.join(own)}, not of {'/'.join(whose)}; {remedy}")
    return found


def write_headroom(folder: Path, found: Headroom) -> None:
    """Store the headroom of a model beside its result."""
    write_json_atomic(folder / FILE, seal(found.model_dump(mode="json")))


# Picks


def pick_weights(scores: np.ndarray) -> np.ndarray:
    """(P, n) shares of each image in the pick of the highest score of (P, n): equal ones share it."""
    best = scores == scores.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def picks(
    scores: Mapping[str, np.ndarray], pickers: Sequence[str], distances: Mapping[str, float | None] = {}
) -> tuple[Pick, ...]:
    """A random pick and those of some metrics.

    Args:
        scores: (P, n) of each metric.
        pickers: names of some.
        distances: set distance of each pick, by picker.
    """
    whole = {RANDOM: np.full(scores[pickers[0]].shape, 1 / scores[pickers[0]].shape[1])}
    whole |= {name: pick_weights(scores[name]) for name in pickers}
    found = []
    for by, weights in whole.items():
        reached = {name: (weights * rows).sum(1) for name, rows in scores.items()}
        gains = {name: Mean.of(reached[name] - rows.mean(1)) for name, rows in scores.items()}
        reaches = {name: Mean.of(rows) for name, rows in reached.items()}
        found.append(Pick(by=by, reaches=reaches, gains=gains, set_distance=distances.get(by)))
    return tuple(found)


# Agreement within a prompt


def within_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of (P, n) with its partner's; only of rows in which both have spread."""
    both = has_spread(a) & has_spread(b)
    x, y = (each[both] - each[both].mean(1, keepdims=True) for each in (a, b))
    return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def within_auc(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Share of the pairs of a row that scores order as gold does, ties half; only of rows in which gold has spread."""
    at = has_spread(gold)
    ours, true = (np.sign(each[at][:, :, None] - each[at][:, None, :]) for each in (scores, gold))
    better = true > 0
    return ((ours > 0) + 0.5 * (ours == 0)).sum(axis=(1, 2), where=better) / better.sum(axis=(1, 2))


def has_spread(rows: np.ndarray) -> np.ndarray:
    """(P,) whether the values of (P, n) differ within each row by more than rounding."""
    return np.ptp(rows, axis=1) > MIN_SPREAD * np.maximum(1.0, np.abs(rows).max(1))


def link(by: str, scores: np.ndarray, gold: np.ndarray, right: np.ndarray | None = None) -> Link:
    """How a picker's (P, n) scores agree with gold's.

    Args:
        by: name of the picker.
        scores: of the picker.
        gold: of gold.
        right: what the AUC is against, such as right or wrong; gold by default.
    """
    correlation, auc = within_correlation(scores, gold), within_auc(scores, gold if right is None else right)
    return Link(
        by=by,
        correlation=Mean.of(correlation) if len(correlation) else None,
        auc=Mean.of(auc) if len(auc) and has_spread(scores).any() else None,
        num_prompts=len(correlation),
    )


# Words


def explain(found: Headroom) -> str:
    """What may be expected of the reward on this model, in one paragraph."""
    reward, gold = metric_info(found.reward), metric_info(found.gold)
    own, best = found.pick(found.reward), found.pick(found.gold)
    agreed = next(each for each in found.groups[0].links if each.by == found.reward)
    if agreed.correlation is None:
        return (
            f"{reward.label} and {gold.label} do not both differ between images of one prompt of {found.model}, so "
            f"nothing can be said of what raising {reward.label} does to {gold.label}: take more images of a prompt, "
            "or another reward."
        )
    gain, reach = own.gains[found.gold], best.gains[found.gold]
    much = f"{found.honest:.{reward.decimals}f}"
    words = [
        f"A reward that raises {reward.label} of {found.model} by at most {much} can be expected to raise {gold.label} "
        f"by about {_number(gain, gold.decimals)}: that is what the best of {found.samples} images of a prompt reach.",
        f"Picked by {gold.label} itself, they would reach {_number(reach, gold.decimals)}.",
        f"Within a prompt the two correlate at {_number(agreed.correlation, 2)}.",
    ]
    if agreed.correlation.low is not None and agreed.correlation.low <= 0:
        words.append("That is not clearly above zero: what this reward adds beyond it is likely to be hacked.")
    words.append(f"A gain of {reward.label} beyond {much} is more than better images alone could give.")
    return " ".join(words)


def _number(mean: Mean, decimals: int) -> str:
    ends = "" if mean.low is None or mean.high is None else f" [{mean.low:+.{decimals}f}, {mean.high:+.{decimals}f}]"
    return f"{mean.value:+.{decimals}f}{ends}".replace("-", "−")
