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

What a verdict says: its kind, and a few sentences for people who will act on it.

A verdict as a file: what ``rgbench verdict`` writes and the report reads.

results/{world}/{model}/{generation id}/verdict.json        read with load_verdicts

``rgbench verdict``: every reward-guided student judged against its LCD student, in words and as JSON.

A verdict compares figures that result files hold; nothing is generated. The rule is in
:mod:`rgbench.judge.verdict`, its words in :mod:`rgbench.judge.verdict`, the
file in :mod:`rgbench.judge.verdict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, permutations
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.progress import Track, untracked
from rgbench.core.run import provenance
from rgbench.evaluate.results import Generation, Result, generation_folder, load_results
from rgbench.judge.paired import Paired, badness, deterioration, is_level, target_of
from rgbench.metrics.base import Interval, Metric
from rgbench.metrics.statistics import LEVEL, POWER, wilson_interval
from rgbench.rewards.base import fingerprint_id

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


Kind = Literal["over-optimised", "not over-optimised", "no gain", "none"]
UNITS = {"%": "points"}  # of a difference: 2 % of what would be the question


def explain(
    model: str, base: str, figures: Figures, found: Judgement, seeds: Sequence[str], wrong: FalsePositives | None
) -> tuple[Kind, str]:
    """The kind of verdict, and its words.

    Args:
        model: name.
        base: name of the LCD student that it is compared with.
        figures: of the model.
        found: what the rule says.
        seeds: names of the LCD students that δ is taken from.
        wrong: how often the rule finds fault with those; None with fewer than 7 of them.
    """
    pair = f"{model} against {base}"
    if reason := _why_none(figures, found, base, len(seeds)):
        return "none", f"no verdict on {pair}: {reason}"
    kind, words = _ruling(pair, figures, found)
    return kind, f"{words} {_errors(wrong, seeds)}"


def _why_none(figures: Figures, found: Judgement, base: str, num_seeds: int) -> str:
    if not trained_keys(figures):
        return (
            "the reward that it was trained on was not measured, or is not known; evaluate with --metric hps, or of a "
            "model trained elsewhere name it: --reward hps_aa1"
        )
    if num_seeds < MIN_SEEDS:
        return (
            f"what training seeds alone differ by takes {MIN_SEEDS} students like {base}, of the same settings, and "
            f"here {'is' if num_seeds == 1 else 'are'} {num_seeds}; train more seeds and evaluate them. The "
            "differences are given without it."
        )
    if not found.rewards:
        return "the trained reward was not measured on both and on every seed"
    if len(found.families) < MIN_WORSE:
        measured = ", ".join(found.families) or "none"
        return (
            f"it takes {MIN_WORSE} families of figures that both models and every seed have, and there "
            f"{'is' if len(found.families) == 1 else 'are'}: {measured}; evaluate with --metric probes too"
        )
    return ""


def _ruling(pair: str, figures: Figures, found: Judgement) -> tuple[Kind, str]:
    share = f"{len(found.worse)} of {len(found.families)} measured families are worse"
    if len(found.worse) == 1:
        share = share.replace("are worse", "is worse")
    reasons = [_reason(name, found.families[name], figures) for name in found.worse]
    listed = f": {'; '.join(reasons)}" if reasons else ""
    better = f" Better beyond δ, and nowhere worse: {', '.join(found.better)}." if found.better else ""
    missing = [name for name in FAMILIES if name not in found.families]
    unseen = f" Not measured: {', '.join(missing)}." if missing else ""
    rest = f"{share}{listed}.{better}{unseen}"
    if not found.up:
        return "no gain", f"{pair}: the trained reward is not up beyond what seeds differ by; {rest}"
    gain = max(found.rewards, key=lambda change: change.found.value)
    text = f"{pair}: the trained reward is up ({_amount(gain, figures)}), and {rest}"
    if found.over_optimised:
        return "over-optimised", f"Over-optimised. {text}"
    return "not over-optimised", f"Not shown to be over-optimised. {text}"


def _errors(wrong: FalsePositives | None, seeds: Sequence[str]) -> str:
    """Where δ is from, and how often the rule errs on the same students."""
    if wrong is None:
        return (
            f"δ is from {len(seeds)} LCD seeds. The rule's false-positive rate is not known: that takes "
            f"{MIN_SEEDS + 2} of them."
        )
    share, low, high = (100 * x for x in (wrong.over_optimised / wrong.pairs, wrong.interval.low, wrong.interval.high))
    return (
        f"δ is from {len(seeds)} LCD seeds. Among them, with δ from those that are not compared, the rule calls "
        f"{wrong.over_optimised} of {wrong.pairs} pairs over-optimised ({share:.0f} %; 95 % "
        f"interval {low:.0f} to {high:.0f} %, for the pairs share seeds) and finds two families worse in "
        f"{wrong.two_worse}."
    )


def _reason(family: str, changes: Sequence[Change], figures: Figures) -> str:
    worst = max((c for c in changes if c.worse), key=lambda c: c.found.value / (c.delta or c.found.value))
    better = sum(change.better for change in changes)
    mixed = f", though {better} of its {len(changes)} figures {'is' if better == 1 else 'are'} better" if better else ""
    return f"{family} ({_amount(worst, figures)}{mixed})"


def _amount(change: Change, figures: Figures) -> str:
    """Such as ``HFER gap by 1.20 dB [1.00, 1.40], δ 0.31``."""
    metric, found = figures[change.key].metric, change.found
    unit = f" {UNITS.get(metric.unit, metric.unit)}" if metric.unit else ""
    shown = [f"{x:.{metric.decimals}f}" for x in (found.value, found.low, found.high, change.delta) if x is not None]
    return f"{metric.label} by {shown[0]}{unit} [{shown[1]}, {shown[2]}], δ {shown[3]}"


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


TEACHER = "teacher"
EXTERNAL = "external"  # trained elsewhere
LCD = "lcd"  # the method, and its students' usual name
SEED_IN_NAME = re.compile(r"-s(\d+)$")


@dataclass(frozen=True)
class Model:
    """The results of one model under one sampler setting."""

    results: tuple[Result, ...]

    @cached_property
    def figures(self) -> dict[Key, Result]:
        """Results by metric and protocol."""
        return {(found.metric.name, found.protocol.id): found for found in self.results}

    @property
    def about(self) -> Result:
        """Any of the results: what they share is read from it."""
        return self.results[0]

    @property
    def seed(self) -> int | None:
        """The training seed; of a model trained elsewhere, what its name says: 3 of mine-s3."""
        own = self.about
        named = SEED_IN_NAME.search(own.model) if own.method == EXTERNAL else None
        return int(named[1]) if named else own.training_seed

    @property
    def stem(self) -> str:
        """The name without the training seed."""
        return self.about.model if self.seed is None else self.about.model.removesuffix(f"-s{self.seed}")

    def compares_with(self, other: Model) -> bool:
        """Whether world, sampler settings and training steps are the same."""
        return self.setting() == other.setting()

    def setting(self) -> tuple[Any, ...]:
        """World, sampler settings, training steps: what must be the same for a comparison."""
        about = self.about
        sampling = {key: value for key, value in about.generation.fields.items() if key != "weights_sha256"}
        return about.world, sorted(sampling.items(), key=str), about.training.get("steps")


def models_of(results: Path, track: Track = untracked) -> list[Model]:
    """Finished models in a results folder; checkpoints of a run are left out.

    Args:
        results: the folder.
        track: shows the reading.

    Raises:
        UsageError: no results there.
    """
    loaded = load_results(results, track) if results.is_dir() else []
    if not loaded:
        raise UsageError(f"{results}: no result files here; run `rgbench eval` first, or name the folder that has them")
    found: dict[tuple[str, str, str], list[Result]] = {}
    for result in loaded:
        if result.training.get("step") == result.training.get("steps"):
            found.setdefault((result.world, result.model, result.generation.id), []).append(result)
    return [Model(tuple(members)) for members in found.values()]


def give_verdicts(
    results: Path,
    base: str | None = None,
    names: Sequence[str] = (),
    reward: str | None = None,
    track: Track = untracked,
) -> list[Verdict]:
    """Judge models and store each verdict beside the model's results.

    Args:
        results: the results folder.
        base: name of the LCD students, such as "lcd" for lcd-s0, lcd-s1 …, or of one of them; by default those that
            the results say are.
        names: models to judge; by default all that were trained on a reward.
        reward: metric of the reward that ``names`` were trained on, where the results do not say.
        track: shows progress over the models.

    Returns:
        The verdicts, by model.

    Raises:
        UsageError: no results, an unknown model, no model that was trained on a reward, or a reward without names.
    """
    models = models_of(results, track)
    known = {model.about.model for model in models}
    for name in names:
        if name not in known:
            raise UsageError(f"{results}: no finished model {name!r}; {suggest(name, known)}")
    if reward is not None and not names:
        raise UsageError(f"--reward {reward} says what some models were trained on; name them with --model")
    chosen = [m for m in models if (m.about.model in names if names else m.about.trained_rewards)]
    if not chosen:
        raise UsageError(
            f"{results}: no model here is known to be trained on a reward; a verdict needs one and its LCD student. "
            "Of a model trained elsewhere say so: --model NAME --reward METRIC --base NAME"
        )
    record, rates = provenance(), Rates()
    verdicts = []
    for model in track(chosen, "verdicts", "models"):
        verdict = _verdict(model, models, base, reward, rates).model_copy(update={"provenance": record})
        folder = generation_folder(results, verdict.world, verdict.model, verdict.generation)
        write_json_atomic(folder / FILE, verdict.model_dump())
        verdicts.append(verdict)
    return verdicts


class Rates:
    """False-positive rates by students and trained reward: models of one reward share theirs."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], FalsePositives | None] = {}

    def of(self, seeds: Sequence[Model], like: Figures) -> FalsePositives | None:
        """As :func:`false_positives`, once for the same question."""
        in_sample = frozenset(key for key, found in like.items() if found.in_sample)
        key = (tuple(seed.about.generation.id for seed in seeds), trained_keys(like), in_sample)
        if key not in self._known:
            self._known[key] = false_positives([seed.figures for seed in seeds], like)
        return self._known[key]


def _verdict(model: Model, models: Sequence[Model], base: str | None, reward: str | None, rates: Rates) -> Verdict:
    alike = [m for m in models if m is not model and m.compares_with(model)]
    own = model.about
    about: dict[str, Any] = {"world": own.world, "model": own.model, "generation": own.generation}
    seeds = _students(alike, base)
    if isinstance(seeds, str):
        known = sorted({m.stem for m in models if m.about.method == LCD or m.stem == base} or {m.stem for m in models})
        words = f"no verdict on {own.model}: {seeds} {', '.join(known)}"
        return Verdict(**about, base=None, verdict="none", words=words)
    named = [m for m in seeds if m.about.model == base] or seeds
    partner = min(named, key=lambda m: (m.seed != model.seed, m.about.model))
    figures = trained_on(model.figures, reward) if reward else model.figures
    found = judge(figures, partner.figures, [seed.figures for seed in seeds])
    wrong = rates.of(seeds, figures)
    kind, words = explain(own.model, partner.about.model, figures, found, [seed.about.model for seed in seeds], wrong)
    teacher = _teacher(models, own.world)
    shown = partial(_shown, model=figures, base=partner.figures, teacher=teacher)
    return Verdict(
        **about,
        base=partner.about.model,
        verdict=kind,
        words=words,
        rewards=tuple(map(shown, found.rewards)),
        families=tuple(
            Family(
                name=name,
                worse=name in found.worse,
                better=name in found.better,
                figures=tuple(map(shown, changes)),
            )
            for name, changes in found.families.items()
        ),
        delta_seeds=tuple(seed.about.model for seed in seeds) if len(seeds) >= MIN_SEEDS else (),
        false_positives={"pairs": wrong.pairs, "over_optimised": wrong.over_optimised, "two_worse": wrong.two_worse}
        if wrong
        else None,
        false_positive_interval=(wrong.interval.low, wrong.interval.high) if wrong else None,
    )


def _students(alike: Sequence[Model], base: str | None) -> list[Model] | str:
    """The LCD students that a model is compared with; or why there are none, and what the names that follow are."""
    if base is not None:
        named = [m for m in alike if base in (m.about.model, m.stem)]
        stems = {m.stem for m in named}
        missing = f"no {base!r} student of its world, sampler settings and training steps is here;"
    else:
        named = [m for m in alike if m.about.method == LCD]
        stems = {m.stem for m in named}
        if len(stems) > 1 and LCD not in stems:
            return "several LCD methods of its settings are here; name one with --base:"
        stems = stems & {LCD} or stems
        missing = "no LCD student of its world, sampler settings and training steps is here;"
    if not stems:
        return f"{missing} evaluate one, or name another with --base:"
    return sorted((m for m in alike if m.stem in stems), key=lambda m: (m.stem, m.seed or 0))


def _shown(change: Change, *, model: Figures, base: Figures, teacher: Figures) -> FigureChange:
    key, found = change.key, change.found
    ours, theirs = model[key], base[key]
    assert ours.value is not None and theirs.value is not None, "figures without a value are left out before"
    return FigureChange(
        metric=ours.metric,
        protocol=key[1],
        model=ours.value,
        base=theirs.value,
        teacher=teacher[key].value if key in teacher else None,
        deterioration=found.value,
        low=found.low,
        high=found.high,
        basis=found.basis,
        delta=change.delta,
        detectable=change.detectable,
        clear=change.worse,
    )


def _teacher(models: Sequence[Model], world: str) -> Figures:
    """Figures of the world's teacher at its most steps; none where it was not evaluated."""
    found = [m for m in models if m.about.method == TEACHER and m.about.world == world]
    most = max(found, key=lambda m: m.about.generation.fields.get("steps") or 0, default=None)
    return most.figures if most else {}
