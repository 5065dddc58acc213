"""Over-optimised or not: the rule, and how often it is wrong.

    up      the trained reward's gain over the LCD student of equal budget is clear of δ
    worse   of a family: the deterioration of one of its figures is clear of δ
    over-optimised: up, and at least two families worse

"Clear of δ" means that the whole 95 % interval lies above it. δ is what the luck of
training does: per family the 95th percentile, over pairs of LCD seeds, of the largest
absolute difference among the family's figures, each in units of its own root mean square
difference (so a family of ten figures is no more easily worse than a family of one); a
figure's δ is that percentile in its own unit. At least 5 seeds, else no verdict.

The false-positive rate applies the same rule to LCD students: each as if it were the model,
against each other one, with δ from the seeds that are neither of the two. The pairs share
seeds, so their rate is a U-statistic, and its interval is that of ⌊n/2⌋ independent pairs,
which its variance never exceeds (Hoeffding, 1948, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from statistics import NormalDist
from typing import Any

import numpy as np

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.paired import Paired, badness, deterioration, is_level, target_of
from rgbench.evaluation.results import Result
from rgbench.evaluation.statistics import POWER
from rgbench.metrics.contract import Interval
from rgbench.metrics.intervals import LEVEL, wilson_interval
from rgbench.rewards.contract import fingerprint_id

HELD_OUT = "held-out rewards or oracle"
FAMILIES = ("spectrum", "pixel and colour", "set distance", "diversity", HELD_OUT, "fragility")
MIN_SEEDS = 5  # of LCD, for δ
MIN_WORSE = 2  # families
PERCENTILE = 0.95

Key = tuple[str, str]  # metric name, protocol id
Figures = Mapping[Key, Result]


@dataclass(frozen=True)
class Change:
    """One figure of a model against its base.

    Attributes:
        key: metric and protocol.
        found: the deterioration with its interval.
        delta: what seeds differ by; None with too few of them.
    """

    key: Key
    found: Paired
    delta: float | None

    @property
    def worse(self) -> bool:
        """Whether the deterioration is clear of δ."""
        return self.delta is not None and self.found.clear_of(self.delta)

    @property
    def better(self) -> bool:
        """Whether an improvement is clear of δ; never of a level without target, where every move is for the worse."""
        return self.delta is not None and self.found.high is not None and self.found.high < -self.delta

    @property
    def detectable(self) -> float | None:
        """The true deterioration that would be found worse with probability .8, on so many images and at this δ."""
        if self.delta is None or self.found.low is None or self.found.high is None:
            return None
        half = (self.found.high - self.found.low) / 2
        return self.delta + half * (1 + NormalDist().inv_cdf(POWER) / NormalDist().inv_cdf(0.5 + LEVEL / 2))


@dataclass(frozen=True)
class Judgement:
    """What the rule says of one model.

    Attributes:
        rewards: gains of the trained rewards, as deteriorations of opposite sign.
        families: the figures of each measured family.
    """

    rewards: tuple[Change, ...]
    families: Mapping[str, tuple[Change, ...]]

    @property
    def up(self) -> bool:
        """Whether a trained reward is clear of δ."""
        return any(change.worse for change in self.rewards)

    @property
    def worse(self) -> tuple[str, ...]:
        """The families that are worse."""
        return tuple(name for name, changes in self.families.items() if any(change.worse for change in changes))

    @property
    def better(self) -> tuple[str, ...]:
        """The families of which a figure is better and none is worse."""
        return tuple(
            name
            for name, changes in self.families.items()
            if any(change.better for change in changes) and name not in self.worse
        )

    @property
    def over_optimised(self) -> bool:
        """The rule."""
        return self.up and len(self.worse) >= MIN_WORSE


def family_of(result: Result, in_sample: bool) -> str | None:
    """The family that a figure speaks for; None where it speaks for none, as the trained reward itself."""
    if in_sample:
        return None
    if result.metric.family in ("reward", "oracle"):
        return HELD_OUT
    return result.metric.family if result.metric.family in FAMILIES else None


def trained_keys(model: Figures) -> tuple[Key, ...]:
    """Columns of the very reward that a model was trained on; where only another antialias was measured, that."""
    exact = [key for key, found in model.items() if _is_trained(found)]
    return tuple(exact or [key for key, found in model.items() if found.in_sample])


def _is_trained(result: Result) -> bool:
    reward = _reward_of(result)
    return result.in_sample and reward is not None and fingerprint_id(reward) in result.trained_rewards


def trained_on(model: Figures, reward: str) -> dict[Key, Result]:
    """The figures, had their model been trained on a reward: all columns of that reward's weights are in-sample.

    Args:
        model: figures of a model that does not say what it was trained on, as one trained elsewhere.
        reward: name of a measured metric.

    Raises:
        UsageError: no such reward among the figures.
    """
    measured = {key: fields for key, found in model.items() if (fields := _reward_of(found)) is not None}
    rewards = [fields for (name, _), fields in measured.items() if name == reward]
    if not rewards:
        raise UsageError(f"no reward {reward!r} was measured; {suggest(reward, {name for name, _ in measured})}")
    about = {"in_sample": True, "trained_rewards": tuple(map(fingerprint_id, rewards))}
    ours = {key: found.model_copy(update=about) for key, found in model.items() if _same_model(found, rewards)}
    return {**model, **ours}


def _reward_of(result: Result) -> dict[str, Any] | None:
    """Fingerprint of the reward that a column shows; None of other figures, also where they read a reward."""
    fields = result.protocol.fields.get("reward")
    return fields if result.metric.family == "reward" and isinstance(fields, dict) else None


def _same_model(found: Result, rewards: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a reward column scores by the weights of one of the rewards, whatever its resize."""
    own = _reward_of(found)
    return own is not None and any(
        (own.get("name"), own.get("weights_sha256")) == (reward.get("name"), reward.get("weights_sha256"))
        for reward in rewards
    )


def judge(model: Figures, base: Figures, seeds: Sequence[Figures], like: Figures | None = None) -> Judgement:
    """Apply the rule to the figures that model, base and all seeds have.

    Args:
        model: figures of the model.
        base: of the LCD student that it is compared with.
        seeds: of the LCD students that δ is taken from; with fewer than 5 there is no δ.
        like: whose trained rewards count; the model's own by default.
    """
    trained = trained_keys(like or model)
    skipped = {key for key, found in (like or model).items() if found.in_sample}
    shared = [key for key in model if _valued(key, [model, base, *seeds])]
    members: dict[str, list[Key]] = {}
    for key in shared:
        family = family_of(model[key], key in skipped)
        if family:
            members.setdefault(family, []).append(key)
    families = {}
    for name in FAMILIES:
        if keys := members.get(name):
            deltas = thresholds(seeds, keys)
            families[name] = _changes(model, base, keys, deltas)
    gains: list[Change] = []
    for key in (key for key in trained if key in shared):
        change = _changes(base, model, [key], thresholds(seeds, [key]))
        gains += change
    return Judgement(tuple(gains), families)


def _valued(key: Key, sides: Iterable[Figures]) -> bool:
    return all(key in side and side[key].value is not None for side in sides)


def _changes(
    model: Figures, base: Figures, keys: Sequence[Key], deltas: Mapping[Key, float | None]
) -> tuple[Change, ...]:
    changes = []
    for key in keys:
        found = deterioration(model[key], base[key])
        if found is not None:
            changes.append(Change(key, found, deltas[key]))
    return tuple(changes)


def thresholds(seeds: Sequence[Figures], keys: Sequence[Key]) -> dict[Key, float | None]:
    """δ of each figure of one family.

    Args:
        seeds: figures of LCD students that differ in the training seed alone.
        keys: the family's figures; each seed has them.

    Returns:
        δ in each figure's unit; None with fewer than 5 seeds.
    """
    if len(seeds) < MIN_SEEDS:
        return dict.fromkeys(keys)
    values = np.array([[_badness(seed[key]) for key in keys] for seed in seeds])
    gaps = np.array([np.abs(values[i] - values[j]) for i, j in combinations(range(len(seeds)), 2)])
    scale = np.sqrt((gaps**2).mean(0))
    relative = np.divide(gaps, scale, out=np.zeros_like(gaps), where=scale > 0)
    percentile = float(np.quantile(relative.max(1), PERCENTILE, method="higher"))
    return {key: percentile * float(unit) for key, unit in zip(keys, scale, strict=True)}


def _badness(result: Result) -> float:
    assert result.value is not None, "figures without a value are left out before"
    return result.value if is_level(result) else float(badness(result.metric, result.value, target_of(result)))


@dataclass(frozen=True)
class FalsePositives:
    """How often the rule finds fault with LCD students, which met no reward.

    Attributes:
        seeds: LCD students.
        pairs: ordered pairs of them that were judged.
        over_optimised: of the pairs called over-optimised.
        two_worse: of the pairs with at least two families worse, whatever the reward did.
    """

    seeds: int
    pairs: int
    over_optimised: int
    two_worse: int

    @property
    def interval(self) -> Interval:
        """Of the share that is called over-optimised."""
        return rate_interval(self.over_optimised, self.pairs, self.seeds)


def rate_interval(count: int, pairs: int, seeds: int) -> Interval:
    """Wilson interval of a share of pairs of seeds, as of ⌊seeds/2⌋ independent ones.

    Args:
        count: pairs of that kind.
        pairs: all ordered pairs.
        seeds: that the pairs are made from.
    """
    return wilson_interval(count / pairs * (seeds // 2), seeds // 2)


def false_positives(seeds: Sequence[Figures], like: Figures) -> FalsePositives | None:
    """Judge every LCD student against every other, δ from the rest; None with fewer than 7 of them.

    Args:
        seeds: figures of LCD students.
        like: the model whose trained rewards count.
    """
    if len(seeds) < MIN_SEEDS + 2:
        return None
    found = []
    for i, j in permutations(range(len(seeds)), 2):
        rest = [seed for k, seed in enumerate(seeds) if k not in (i, j)]
        found.append(judge(seeds[i], seeds[j], rest, like))
    return FalsePositives(
        seeds=len(seeds),
        pairs=len(found),
        over_optimised=sum(each.over_optimised for each in found),
        two_worse=sum(len(each.worse) >= MIN_WORSE for each in found),
    )
