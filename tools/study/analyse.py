"""What the results of a study say: contrasts over training seeds, the hump of gold over reward, best of n.

    contrast   mean of d_s over common seeds s, d_s = model_s − base_s (− the difference of two more arms), paired t
    hump       the arm at which mean gold is highest; what gold gains until there and loses after it
    best of n  gold gained by the best of n images of the base, at the reward gained by a student

The arm of the highest mean is chosen for being high, so its own value is not what another seed would reach there. Rise
and fall are therefore read, for each seed, at the arm that the other seeds choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import ModelResult
from rgbench.judge.compare import MIN_SEEDS
from rgbench.judge.models import TEACHER, ResultSet, result_set, sampling_of
from rgbench.judge.trajectory import order_weights
from rgbench.judge.verdict import GOLD, Declared, Outcome, Verdict, judge
from rgbench.metrics.statistics import ALPHA, LEVEL, NUM_RESAMPLES, holm, kl_best_of, paired_t, t_interval
from rgbench.metrics.values import MetricValue
from tools.study.plan import BEST_OF_N, GOLD_NAME, Contrast, Curve, Images, Kind, Study

REWARD = "hps"
ERRS = "held-out"  # name of the base's seeds that are judged as if they had been trained on a reward
Point = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True, eq=False)
class Measured:
    """The results of a study's runs.

    Attributes:
        study: declared.
        results: of its runs, sampled as the arms say, checkpoints included.
        draws: of its base, several images of each prompt.
        gold: name of the metric that is gold.
        steps: of the sampler of each arm's own recipe.
        teachers: results of the arms' teachers, which nothing is tested against.
    """

    study: Study
    results: tuple[ModelResult, ...]
    draws: tuple[ModelResult, ...]
    gold: str
    steps: Mapping[str, int]
    teachers: tuple[ModelResult, ...] = ()

    @classmethod
    def of(cls, study: Study, loaded: Sequence[ModelResult], drawn: Sequence[ModelResult] = ()) -> Measured:
        """Pick the results of a study's runs.

        Args:
            study: declared.
            loaded: of the folder of results.
            drawn: of that of several images of each prompt.

        Raises:
            UsageError: a value that was measured twice, or under two protocols.
        """
        wanted = {f"{arm}-s{seed}": arm for arm in study.arms for seed in study.seeds(arm)}
        sampling = {arm: study.sampling(arm) for arm in study.arms}

        def is_wanted(result: ModelResult) -> bool:
            arm = wanted.get(result.head.model)
            if arm is None:
                return False
            fields, own = sampling_of(result), sampling[arm]
            every = (own.steps, *study.arms[arm].steps)
            return fields.get("guidance_scale") == own.guidance_scale and fields.get("steps") in every

        found, draws = (tuple(filter(is_wanted, each)) for each in (loaded, drawn))
        names = {value.metric for result in found for value in result.values}
        gold = next((name for name in GOLD.metrics if name in names), GOLD.metrics[0])
        worlds = {result.head.world for result in found}
        teachers = tuple(each for each in loaded if each.head.method == TEACHER and each.head.world in worlds)
        own = cls(study, found, draws, gold, {arm: each.steps for arm, each in sampling.items()}, teachers)
        own._check()
        return own

    def _values(self) -> Iterator[tuple[Kind, ModelResult, MetricValue]]:
        """Every value that is of one of the study's sets of images, and which."""
        study = self.study
        sets: list[tuple[Kind, Images | None, Sequence[ModelResult]]] = [
            ("eval", study.eval, self.results),
            ("along", study.along, self.results),
            ("draws", study.draws, self.draws),
        ]
        for kind, images, results in sets:
            for result in results if images is not None else ():
                yield from ((kind, result, value) for value in result.values if images and images.hold(value))

    def _check(self) -> None:
        places: dict[tuple[Kind, str, int, int, str], set[str]] = {}
        protocols: dict[tuple[Kind, str], set[str]] = {}
        for kind, result, value in self._values():
            at = (kind, result.head.model, _steps(result), result.head.training.get("step", 0), value.metric)
            places.setdefault(at, set()).add(f"{result.head.generation.id} {value.protocol.id}")
            protocols.setdefault((kind, value.metric), set()).add(value.protocol.id)
        for (_, model, _, _, metric), ids in places.items():
            if len(ids) > 1:
                listed = ", ".join(sorted(ids))
                raise UsageError(f"{model}: {metric} of the same images was measured twice ({listed}); remove one")
        for (_, metric), ids in protocols.items():
            if len(ids) > 1:
                raise UsageError(f"{metric} was measured under two protocols: {', '.join(sorted(ids))}; remove one")

    @cached_property
    def _finals(self) -> dict[tuple[str, int, str, Kind], tuple[ModelResult, MetricValue]]:
        return {
            (result.head.model, _steps(result), value.metric, kind): (result, value)
            for kind, result, value in self._values()
            if not result.is_checkpoint and value.value is not None
        }

    def name(self, metric: str) -> str:
        """The metric itself; of ``gold`` the one that is."""
        return self.gold if metric == GOLD_NAME else metric

    def shown(self, metrics: Sequence[str]) -> list[str]:
        """Metrics without a win rate where there is no gold utility, and without gold's own name beside ``gold``."""
        lacks = {self.gold} if GOLD_NAME in metrics else set()
        lacks |= {"gold_win_rate"} if self.gold != GOLD.metrics[0] else set()
        return [metric for metric in metrics if metric not in lacks]

    def values(self, arm: str, metric: str, steps: int | None = None) -> dict[int, float]:
        """Values by training seed, at a number of sampling steps; at the recipe's own by default."""
        found = {}
        for seed in self.study.seeds(arm):
            each = self._finals.get((f"{arm}-s{seed}", steps or self.steps[arm], self.name(metric), "eval"))
            if each is not None:
                found[seed] = float(each[1].value or 0)
        return found

    def of_teachers(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Sampling steps of each teacher and its values by metric, of the arms' prompts and protocols."""
        shared = {value.key for kind, _, value in self._values() if kind == "eval"}
        for result in self.teachers:
            values = {
                each.metric: each.value for each in result.values if each.key in shared and each.value is not None
            }
            if values:
                yield _steps(result), values

    def all_steps(self, arm: str) -> tuple[int, ...]:
        """Numbers of sampling steps at which an arm is measured; its recipe's own first."""
        return self.steps[arm], *self.study.arms[arm].steps

    def train_seconds(self, arm: str) -> list[float]:
        """CPU seconds of the training of each run that says so."""
        found = {result.head.model: result.head.cost.get("train_cpu_sec") for result in self.results}
        times = [found.get(f"{arm}-s{seed}") for seed in self.study.seeds(arm)]
        return [float(each) for each in times if each is not None]

    def rows(self, arm: str, seed: int, metric: str, kind: Kind) -> dict[tuple[str, int], float] | None:
        """Per-image values of a run by (prompt id, noise seed); None where there are none."""
        found = self._finals.get((f"{arm}-s{seed}", self.steps[arm], self.name(metric), kind))
        stored = found[0].rows(*found[1].key) if found is not None else None
        return stored.by_image() if stored is not None else None

    def along(self, arm: str, metric: str) -> dict[int, float]:
        """Values by optimiser step, of the seed whose checkpoints were measured."""
        run = f"{arm}-s{self.study.arms[arm].along}"
        found = {
            result.head.training["step"]: value.value
            for kind, result, value in self._values()
            if (kind, result.head.model, value.metric) == ("along", run, self.name(metric)) and value.value is not None
        }
        return dict(sorted(found.items()))

    def missing(self) -> list[str]:
        """Runs whose results the analysis lacks, with what lacks; in the order of the study."""
        found, reads = [], self.shown(self.study.eval.reads)
        for arm in self.study.arms:
            for steps in self.all_steps(arm):
                lacking: dict[tuple[int, ...], list[str]] = {}
                for metric in reads:
                    have = self.values(arm, metric, steps)
                    seeds = tuple(seed for seed in self.study.seeds(arm) if seed not in have)
                    lacking.setdefault(seeds, []).append(self.name(metric))
                where = f" at {steps} steps" if steps != self.steps[arm] else ""
                for seeds, metrics in lacking.items():
                    what = "everything" if len(metrics) == len(reads) else ", ".join(metrics)
                    found += [f"{arm}{where}: {what} of seeds {', '.join(map(str, seeds))}"] if seeds else []
        return found

    @cached_property
    def set(self) -> ResultSet | None:
        """The results as the verdict takes them; None without any."""
        return result_set(self.results) if any(not result.is_checkpoint for result in self.results) else None

    def verdict(self, arm: str, steps: int | None = None) -> Verdict | None:
        """The verdict on an arm, as :meth:`values`; None where it has no results, or no reward."""
        found = self.set.find(arm) if self.set is not None and self.set.has(arm) else ()
        models = [model for model in found if model.sampling.get("steps") == (steps or self.steps[arm])]
        if len(models) > 1:
            raise UsageError(f"{arm}: its runs have {len(models)} recipes or samplings; remove the results of one")
        return judge(self.set, models[0]) if self.set is not None and models and models[0].trained_rewards else None

    def errors(self) -> dict[int, Outcome]:
        """How seeds of the base that nothing is compared with are judged, against those that arms are compared with."""
        common = set.intersection(*(set(self.study.seeds(arm)) for arm in self.study.arms))
        held = [seed for seed in self.study.seeds(self.study.base) if seed not in common]
        if self.set is None or not self.set.has(self.study.base):
            return {}
        own = self.steps[self.study.base]
        (whole,) = (model for model in self.set.find(self.study.base) if model.sampling.get("steps") == own)
        base = replace(whole, results={seed: each for seed, each in whole.results.items() if seed in common})
        found = {}
        for seed in (seed for seed in held if seed in whole.results):
            one = replace(whole, name=ERRS, results={seed: whole.results[seed]})
            alone = replace(self.set, models=(base, one))
            found[seed] = judge(alone, one, Declared(base=base.name, reward=REWARD)).outcome
        return found


def _steps(result: ModelResult) -> int:
    return int(result.head.generation.fields.get("steps") or 0)


# Contrasts


@dataclass(frozen=True)
class Tested:
    """A contrast with its outcome.

    Attributes:
        contrast: declared.
        seeds: common training seeds.
        value: mean difference; None with fewer than two seeds.
        low: of the 95 % interval.
        high: likewise.
        p: two-sided; None with fewer than six seeds.
        adjusted: by Holm over the secondary contrasts; of the primary one p.
    """

    contrast: Contrast
    seeds: tuple[int, ...]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None

    @property
    def says(self) -> str:
        """The outcome in words."""
        if self.value is None:
            return "missing"
        if self.adjusted is None:
            return "no test"
        if self.adjusted >= ALPHA:
            return "not shown"
        found = "up" if self.value > 0 else "down"
        if self.contrast.expected == "either":
            return found
        return "as expected" if found == self.contrast.expected else "the opposite"


def run_contrasts(measured: Measured) -> list[Tested]:
    """Test every contrast of a study; the primary one first."""
    primary, *secondary = [_tested(measured, contrast) for contrast in measured.study.contrasts]
    raw = {i: each.p for i, each in enumerate(secondary) if each.p is not None}
    # those that miss count as tested: a failed arm makes no other contrast more significant
    padded = [*raw.values(), *[1.0] * (len(secondary) - len(raw))]
    adjusted = dict(zip(raw, holm(padded), strict=False))
    return [replace(primary, adjusted=primary.p)] + [
        replace(each, adjusted=adjusted.get(i)) for i, each in enumerate(secondary)
    ]


def _tested(measured: Measured, contrast: Contrast) -> Tested:
    sides = _sides(measured, contrast)
    seeds = tuple(sorted(set.intersection(*(set(side) for side in sides))))
    if len(seeds) < 2:
        return Tested(contrast, seeds)
    ours = [sides[0][seed] - sides[1][seed] for seed in seeds]
    theirs = [sides[2][seed] - sides[3][seed] if len(sides) > 2 else 0.0 for seed in seeds]
    mean, low, high = t_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    p = paired_t(ours, theirs) if len(seeds) >= MIN_SEEDS else None
    return Tested(contrast, seeds, mean, low, high, p)


def _sides(measured: Measured, contrast: Contrast) -> list[dict[int, float]]:
    if contrast.base == BEST_OF_N:
        matched = match_best_of_n(measured, contrast.model)
        gains = {seed: each.gold for seed, each in matched.items()}
        return [gains, {seed: each.best_gold for seed, each in matched.items()}]
    return [measured.values(arm, contrast.metric) for arm in contrast.arms]


# The hump


@dataclass(frozen=True)
class Hump:
    """Where gold peaks along rising strength.

    Attributes:
        arms: names, by strength.
        strengths: of the arms, ascending; the first is 0.
        rewards: mean trained reward of each arm.
        golds: mean gold of each arm.
        peak: place of the highest mean gold among them.
        places: share of the bootstrap's draws of seeds in which each arm is the peak.
        reward: trained reward at the peak, with its percentile interval over the draws.
        rise: gold at the peak above the first arm, each seed at the arm that the others choose, with a t interval.
        fall: gold at the peak above the last arm, likewise.
        seeds: common training seeds.
    """

    arms: tuple[str, ...]
    strengths: tuple[float, ...]
    rewards: tuple[float, ...]
    golds: tuple[float, ...]
    peak: int
    places: tuple[float, ...]
    reward: Point
    rise: Point
    fall: Point
    seeds: tuple[int, ...]

    @property
    def is_shown(self) -> bool:
        """Whether gold clearly rises to the peak and clearly falls after it."""
        return 0 < self.peak < len(self.golds) - 1 and self.rise[1] > 0 and self.fall[1] > 0


def find_hump(
    strengths: Sequence[float],
    rewards: np.ndarray,
    golds: np.ndarray,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    seed: int = 0,
) -> Hump:
    """The peak of gold along strength, with its uncertainty over training seeds.

    Args:
        strengths: (A,) ascending.
        rewards: (A, S) trained reward of each arm and training seed.
        golds: (A, S) gold.
        arms: names of the arms.
        seeds: the training seeds.
        seed: of the bootstrap.

    Raises:
        ValueError: other shapes, fewer than three arms or three seeds.
    """
    if rewards.shape != golds.shape or len(golds) != len(strengths) or min(golds.shape) < 3:
        raise ValueError(f"no hump of {golds.shape} golds and {rewards.shape} rewards at {len(strengths)} strengths")
    num = golds.shape[1]
    means, peak = golds.mean(1), int(golds.mean(1).argmax())
    drawn = np.random.default_rng(seed).integers(0, num, (NUM_RESAMPLES, num))
    peaks = golds[:, drawn].mean(2).argmax(0)  # (resamples,)
    reached = rewards[peaks[:, None], drawn].mean(1)
    low, high = np.quantile(reached, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    others = [int(np.delete(golds, s, axis=1).mean(1).argmax()) for s in range(num)]
    at_peak = golds[others, range(num)]
    return Hump(
        arms=tuple(arms),
        strengths=tuple(strengths),
        rewards=tuple(rewards.mean(1).tolist()),
        golds=tuple(means.tolist()),
        peak=peak,
        places=tuple(float((peaks == place).mean()) for place in range(len(strengths))),
        reward=(float(rewards[peak].mean()), float(low), float(high)),
        rise=t_interval((at_peak - golds[0]).tolist()),
        fall=t_interval((at_peak - golds[-1]).tolist()),
        seeds=tuple(seeds),
    )


def hump_of(measured: Measured, curve: Curve) -> Hump | None:
    """The hump of one curve over the seeds that all its arms have; None with fewer than three arms or seeds."""
    have = {float(text): arm for text, arm in curve.arms.items() if measured.values(arm, GOLD_NAME)}
    sides = [(measured.values(arm, REWARD), measured.values(arm, GOLD_NAME)) for arm in have.values()]
    common = sorted(set.intersection(*(set(r) & set(g) for r, g in sides))) if sides else []
    if len(have) < len(curve.arms) or min(len(have), len(common)) < 3:
        return None
    rewards, golds = (np.array([[side[i][seed] for seed in common] for side in sides]) for i in (0, 1))
    return find_hump(list(have), rewards, golds, list(have.values()), common)


# Best of n


@dataclass(frozen=True)
class Choice:
    """What choosing the best of n = 1 … N images by the reward reaches.

    Attributes:
        rewards: (N,) mean reward above n = 1.
        golds: (N,) mean gold above n = 1.
    """

    rewards: np.ndarray
    golds: np.ndarray

    def at(self, reward: float) -> tuple[float, float]:
        """Gold and n at a gain of the reward, linear between whole n; beyond either end, that end."""
        n = np.arange(1, len(self.rewards) + 1, dtype=np.float64)
        return float(np.interp(reward, self.rewards, self.golds)), float(np.interp(reward, self.rewards, n))


def best_of(rewards: np.ndarray, golds: np.ndarray) -> Choice:
    """Unbiased estimates over all subsets of n of N images of each prompt.

    Args:
        rewards: (P, N) of which the highest is chosen.
        golds: (P, N).
    """
    order = np.argsort(rewards, axis=1, kind="stable")
    num = rewards.shape[1]
    weights = np.stack([order_weights(num, n) for n in range(1, num + 1)], axis=1)
    found = [np.take_along_axis(each, order, 1).mean(0) @ weights for each in (rewards, golds)]
    return Choice(*(each - each[0] for each in found))


def choices(measured: Measured) -> dict[int, Choice]:
    """Best of n of each seed of the base that has draws."""
    study = measured.study
    found = {}
    for seed in study.seeds(study.base) if study.draws is not None else ():
        both = [measured.rows(study.base, seed, name, "draws") for name in (REWARD, GOLD_NAME)]
        if both[0] is not None and both[1] is not None:
            prompts = _prompts(both[0])
            noises = sorted({noise for _, noise in both[0]})
            found[seed] = best_of(*(np.array([[rows[p, n] for n in noises] for p in prompts]) for rows in both if rows))
    return found


def _prompts(rows: Mapping[tuple[str, int], float]) -> list[str]:
    return sorted({prompt for prompt, _ in rows})


@dataclass(frozen=True)
class Match:
    """A student beside the best of n images of the base, of one training seed.

    Attributes:
        reward: gained over the base on the same prompts and noise.
        gold: likewise.
        best_gold: gained by the best of n at that reward.
        n: equivalent, 1 to N.
        is_beyond: whether the student's reward is outside of what 1 to N reach.
    """

    reward: float
    gold: float
    best_gold: float
    n: float
    is_beyond: bool

    @property
    def kl(self) -> float:
        """The most, in nats, that the best of the next whole n moves the base's distribution."""
        return kl_best_of(int(np.ceil(self.n)))


def match_best_of_n(measured: Measured, arm: str) -> dict[int, Match]:
    """Each seed of an arm beside the best of n of the base's same seed."""
    study = measured.study
    found = {}
    for seed, choice in choices(measured).items():
        drawn = measured.rows(study.base, seed, REWARD, "draws") or {}
        gains = []
        for metric in (REWARD, GOLD_NAME):
            ours, theirs = (measured.rows(name, seed, metric, "eval") for name in (arm, study.base))
            if ours is None or theirs is None:
                break
            at = [key for key in ours if key in theirs and key in drawn]
            gains.append(float(np.mean([ours[key] - theirs[key] for key in at])))
        if len(gains) == 2:
            reward, gold = gains
            best_gold, n = choice.at(reward)
            is_beyond = not 0 <= reward <= choice.rewards[-1]
            found[seed] = Match(reward, gold, best_gold, n, bool(is_beyond))
    return found
