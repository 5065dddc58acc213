"""Training runs along their steps, and against choosing among draws.

    hack step    where gold peaks while the trained reward still rises after it: :func:`find_hack`
    best of n    draws of a base model that are worth one of a trained model: :func:`best_of_n`
    Pareto front models and checkpoints that no other beats in reward and in set distance

Checkpoints are evaluated with ``rgbench eval RUN --checkpoints``. Best-of-n equivalence reads several images of each
prompt:

    E[max of n] = Σ_{i=n..N} C(i−1, n−1) / C(N, n) · x_(i)        x_(1) ≤ … ≤ x_(N)

is the unbiased estimator from N ≥ n scores of one prompt (the U-statistic of the maximum; Gao et al., 2023, arXiv
2210.10760, appendix). The equivalent n is the smallest at which its mean over prompts reaches the trained model's mean
reward; where even n = N does not, it is censored: "> N". Choosing the best of n moves a model by at most

    KL_bon = ln n − (n − 1)/n        (Stiennon et al., 2020; Hilton, 2022)

nats, so n says how hard the reward was optimised in units that no training changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rgbench.core.errors import UsageError
from rgbench.data.prompts import without_copy
from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import Column, Model, ResultSet, sampling_of, seed_of
from rgbench.judge.paired import Delta, run_delta
from rgbench.metrics.statistics import ALPHA, LEVEL, NUM_RESAMPLES, kl_best_of
from rgbench.metrics.values import Family

ROUNDING = 1e-12
MIN_STEPS = 3  # of two steps one is always the better; a peak needs others beside it
GOLDS = (Family.ORACLE, Family.HELD_OUT, Family.REWARD)  # families that may be gold, but for the trained reward

Points = Mapping[int, ModelResult]  # by step


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """One run along its steps, sampled in one way.

    Attributes:
        model: of its last step; None where that was not evaluated.
        name: of the run.
        points: results by step, ascending.
        proxy: the reward it was trained on; None where there is none.
        golds: oracle and rewards that it was not trained on.
    """

    model: Model | None
    name: str
    points: Points
    proxy: Column | None
    golds: tuple[Column, ...]

    def curve(self, column: Column) -> dict[int, float]:
        """Values by step, where there are any."""
        found = {
            step: result.by_key[column.key].value for step, result in self.points.items() if column.key in result.by_key
        }
        return {step: value for step, value in found.items() if value is not None}

    def longest(self, results: ResultSet, column: Column) -> Column:
        """The metric under the protocol of most steps: checkpoints may have been measured on fewer prompts."""
        alike = [other for other in results.columns if other.metric == column.metric]
        return max((column, *alike), key=lambda other: len(self.curve(other)))

    def hack(self, gold: Column) -> Hack | None:
        """The hack step by one gold column; see :func:`find_hack`."""
        return find_hack(self.points, gold, self.proxy) if self.proxy is not None else None


@dataclass(frozen=True)
class Hack:
    """Gold was best at ``step`` and is clearly worse at ``last``, while the trained reward clearly rose.

    Attributes:
        step: the evaluated step at which gold is best.
        first: the earliest step of the stretch around it in which gold is nowhere clearly worse than at ``step``.
        end: the latest one. Where the peak really is, is known to this stretch and to the steps evaluated.
        last: the last evaluated step.
        loss: gold at ``last`` against gold at ``step``; its interval allows for the choice of ``step``.
        gain: the trained reward at ``last`` against ``step``.
        censored: ``first`` is the first evaluated step, so the peak may lie before it.
    """

    step: int
    first: int
    end: int
    last: int
    loss: Delta
    gain: Delta
    censored: bool


def training_runs(results: ResultSet) -> list[TrainingRun]:
    """Every run of a world with results at two steps or more."""
    points: dict[tuple[str, str], dict[int, ModelResult]] = {}
    finished = [result for model in results.models for result in model.results.values()]
    for result in (*results.checkpoints, *finished):
        if "step" in result.head.training:
            key = result.head.model, str(sorted(sampling_of(result).items(), key=str))
            points.setdefault(key, {})[result.head.training["step"]] = result
    return [_run(results, dict(sorted(own.items()))) for own in points.values() if len(own) > 1]


def find_hack(points: Points, gold: Column, proxy: Column) -> Hack | None:
    """The hack step of one run: where gold peaks while the trained reward still rises after it.

    Only what intervals part from no change counts. The last of n noisy values is below the highest of them n − 1 times
    in n though nothing happened, and the peak was picked because it is high, in part by luck: each of the n − 1
    earlier steps might have been picked. At level 1 − .05/(n − 1) (Bonferroni) the chance that any of them is falsely
    clear of the last stays under 2.5 %. The reward's rise lies between two steps that its own values had no part in
    choosing, so 95 % holds there.

    Args:
        points: results of the run by step.
        gold: a column that the run was not trained on.
        proxy: the reward that it was trained on.

    Returns:
        None with fewer than 3 common steps, where gold is best at the last one, or where either change is not clear.
    """
    steps = [step for step, result in points.items() if _value(result, gold) is not None is not _value(result, proxy)]
    if len(steps) < MIN_STEPS:
        return None
    peak = max(steps, key=lambda step: _value(points[step], gold) or -math.inf)
    peak = next(step for step in steps if _value(points[step], gold) == _value(points[peak], gold))
    last = steps[-1]
    if peak == last:
        return None
    level = 1 - ALPHA / (len(steps) - 1)
    loss = run_delta(points[last], points[peak], gold, level)
    gain = run_delta(points[last], points[peak], proxy)
    if loss is None or gain is None or not (loss.is_worse and gain.is_better):
        return None

    def is_worse(step: int) -> bool:
        found = run_delta(points[step], points[peak], gold, level)
        return found is not None and found.is_worse

    low = high = steps.index(peak)
    while low > 0 and not is_worse(steps[low - 1]):
        low -= 1
    while not is_worse(steps[high + 1]):
        high += 1
    return Hack(peak, steps[low], steps[high], last, loss, gain, low == 0)


def _run(results: ResultSet, points: dict[int, ModelResult]) -> TrainingRun:
    last = list(points.values())[-1]
    models = [model.run(last.head.model) for model in results.models if last in model.results.values()]
    alone = Model(last.head.method, last.head.model, None, sampling_of(last), {seed_of(last): last})
    proxy = results.trained_column(alone)
    own = {column.metric for column in results.same_reward(proxy)} if proxy is not None else set()
    run = TrainingRun(models[0] if models else None, last.head.model, points, None, ())
    found = (run.longest(results, column) for column in results.columns if column.family in GOLDS)
    golds = dict.fromkeys(column for column in found if column.metric not in own and run.curve(column))
    return replace(run, proxy=proxy and run.longest(results, proxy), golds=tuple(golds))


def _value(result: ModelResult, column: Column) -> float | None:
    """The oriented value; None where there is none."""
    found = result.by_key.get(column.key)
    return None if found is None or found.value is None else column.oriented(found.value)


# Best of n


@dataclass(frozen=True)
class BestOfN:
    """The equivalent n of a trained model.

    Attributes:
        n: None where it is above ``num_samples``.
        low: of the 95 % interval over prompts; None where that end is above ``num_samples``.
        high: likewise.
        kl: KL_bon of n in nats; None where n is.
        num_samples: N, the base's images of each prompt.
        num_prompts: prompts that both models have.
    """

    n: int | None
    low: int | None
    high: int | None
    kl: float | None
    num_samples: int
    num_prompts: int

    def __str__(self) -> str:
        return f"> {self.num_samples}" if self.n is None else str(self.n)


def order_weights(num: int, n: int) -> np.ndarray:
    """(N,) weights of the ascending order statistics in the unbiased estimator of E[max of n]."""
    if not 1 <= n <= num:
        raise ValueError(f"the maximum of {n} cannot be estimated from {num} samples")
    total = math.lgamma(num + 1) - math.lgamma(n + 1) - math.lgamma(num - n + 1)
    weights = np.zeros(num)
    for i in range(n, num + 1):
        weights[i - 1] = math.exp(math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) - total)
    return weights


def expected_maxima(scores: np.ndarray) -> np.ndarray:
    """Unbiased E[max of n] of each row for n = 1 … N.

    Args:
        scores: (P, N) scores, one row per prompt.

    Returns:
        (P, N); column n − 1 is for n.
    """
    ascending = np.sort(np.asarray(scores, dtype=np.float64), axis=1)
    num = ascending.shape[1]
    return ascending @ np.stack([order_weights(num, n) for n in range(1, num + 1)], axis=1)


def equivalent_n(base: np.ndarray, trained: np.ndarray, seed: int = 0) -> BestOfN:
    """The n at which best-of-n of the base reaches the trained model's reward.

    Args:
        base: (P, N) rewards of the base model.
        trained: (P,) mean reward of the trained model for the same prompts.
        seed: of the bootstrap over prompts.

    Raises:
        ValueError: the sides have other prompts, or there is none.
    """
    if len(base) != len(trained) or not len(base):
        raise ValueError(f"{len(base)} and {len(trained)} prompts cannot be compared")
    maxima, trained = expected_maxima(base), np.asarray(trained, dtype=np.float64)
    rng, num = np.random.default_rng(seed), len(trained)
    drawn = [rng.integers(0, num, num) for _ in range(NUM_RESAMPLES)]
    spread = np.array([_reached(maxima[at].mean(0), float(trained[at].mean())) for at in drawn])
    ends = np.quantile(spread, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="nearest")
    most = base.shape[1]
    n = _known(_reached(maxima.mean(0), float(trained.mean())), most)
    return BestOfN(
        n=n,
        low=_known(float(ends[0]), most),
        high=_known(float(ends[1]), most),
        kl=None if n is None else kl_best_of(n),
        num_samples=most,
        num_prompts=num,
    )


def _reached(means: np.ndarray, target: float) -> float:
    """The first n whose mean reaches the target; N + 1 where none does. Weights that sum to 1 − 1e-16 do not matter."""
    found = np.flatnonzero(means >= target - ROUNDING * max(1.0, abs(target)))
    return float(found[0] + 1 if len(found) else len(means) + 1)


def _known(n: float, most: int) -> int | None:
    return int(n) if n <= most else None


def best_of_n(results: ResultSet, model: str, base: str, reward: str) -> BestOfN:
    """The base's draws per prompt that are worth one of the model's, in one reward.

    Args:
        results: of both models.
        model: name of a run with per-image values.
        base: name of a run with per-image values of several images of each prompt: noise seeds, or copies of it.
        reward: metric.

    Raises:
        UsageError: no such model or metric, several protocols or sampler settings, two reward models, or no prompt of
            which the base has several images.
    """
    (ours, one), (theirs, other) = (_rows(results, name, reward) for name in (model, base))
    if one.reward_fields != other.reward_fields:
        raise UsageError(f"{model} and {base} were scored by two reward models, which do not compare")
    prompts = sorted(ours.keys() & theirs.keys())
    fewest = min((len(theirs[prompt]) for prompt in prompts), default=0)
    if fewest < 2:
        raise UsageError(
            f"best of n needs several images of each prompt of {base} and {model}, found {fewest}; "
            "evaluate it on a list from: rgbench probes repeat-prompts"
        )
    draws = np.array([theirs[prompt][:fewest] for prompt in prompts])
    return equivalent_n(draws, np.array([np.mean(ours[prompt]) for prompt in prompts]))


def _rows(results: ResultSet, name: str, metric: str) -> tuple[dict[str, list[float]], Column]:
    found = []
    for model in results.find(name):
        for result in model.run(name).results.values():
            for column in results.columns:
                value = result.by_key.get(column.key)
                if column.metric == metric and value is not None and value.rows_sha256 is not None:
                    found.append((result, column))
    if len(found) != 1:
        raise UsageError(f"{name} has {len(found)} results of {metric} with per-image values; one is needed")
    result, column = found[0]
    stored = result.rows(*column.key)
    assert stored is not None, "it has per-image values"
    rows: dict[str, list[float]] = {}
    for (prompt, _), score in sorted(stored.by_image().items()):
        rows.setdefault(without_copy(prompt), []).append(score)
    return rows, column


# Pareto front


@dataclass(frozen=True)
class ParetoPoint:
    """A model, or a checkpoint, in the plane of reward and set distance."""

    model: str
    generation: str
    step: int | None
    reward: float
    distance: float
    on_front: bool


def pareto_front(rewards: Sequence[float], distances: Sequence[float]) -> list[bool]:
    """Whether each point is on the front: no other has a reward as high and a distance as low, one of them better.

    Args:
        rewards: higher is better.
        distances: lower is better.

    Raises:
        ValueError: unequal lengths.
    """
    points = list(zip(rewards, distances, strict=True))
    return [
        not any(r >= reward and d <= distance and (r, d) != (reward, distance) for r, d in points)
        for reward, distance in points
    ]


def pareto_points(results: ResultSet, reward: str, distance: str) -> list[ParetoPoint]:
    """Every run and checkpoint that has both values, the front marked; by reward, best first.

    Args:
        results: of one world.
        reward: name of a metric of which more is better.
        distance: name of one of which less is better.

    Raises:
        UsageError: a metric under two protocols, or no model that has both.
    """
    columns = []
    for name in (reward, distance):
        own = [column for column in results.columns if column.metric == name]
        if len(own) > 1:
            ids = sorted(column.protocol.id for column in own)
            raise UsageError(f"{name} was measured under {len(own)} protocols, which do not compare: {ids}")
        columns += own
    finished = [result for model in results.models for result in model.results.values()]
    both = [
        result
        for result in (*finished, *results.checkpoints)
        if len(columns) == 2 and all(_value(result, column) is not None for column in columns)
    ]
    if not both:
        raise UsageError(f"no model here has both {reward} and {distance}; see: rgbench ls results")
    rewards, distances = ([float(result.by_key[c.key].value or 0) for result in both] for c in columns)
    points = [
        ParetoPoint(result.head.model, result.head.generation.id, result.head.training.get("step"), r, d, front)
        for result, r, d, front in zip(both, rewards, distances, pareto_front(rewards, distances), strict=True)
    ]
    return sorted(points, key=lambda point: -point.reward)
