"""What happens along training, from result files: hack step, best-of-n equivalence, reward against distance.

    gold against proxy   each figure the model was not trained on, along the steps of a run's checkpoints
    hack step            the step at which gold peaks while the trained reward still rises after it: :func:`find_hack`
    best of n            draws of the base model that are worth one of the trained model
    Pareto front         models and checkpoints that no other beats in reward and in set distance

Checkpoints are evaluated with ``rgbench eval RUN --checkpoints``; rewards of several images
per prompt come with a list in which each stands several times.

Best-of-n equivalence: how many draws of the base model are worth one of the trained model.

    E[max of n] = Σ_{i=n..N} C(i−1, n−1) / C(N, n) · x_(i)        x_(1) ≤ … ≤ x_(N)

is the unbiased order-statistic estimator from N ≥ n scores of one prompt (the U-statistic
of the maximum; as in Gao et al., 2023, arXiv 2210.10760, appendix). The equivalent n is the
smallest at which its mean over prompts reaches the trained model's mean reward; where even
n = N does not, it is censored: "> N". Choosing the best of n moves a model by at most

    KL_bon = ln n − (n − 1)/n        (Stiennon et al., 2020; Hilton, 2022)

nats, so n says how hard the reward was optimised in units that no training changes.

Reward against set distance: which models no other beats on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from rgbench.core.errors import UsageError, suggest
from rgbench.data.prompts import without_copy
from rgbench.evaluate.results import Result, load_samples
from rgbench.judge.paired import Paired, badness, deterioration, target_of
from rgbench.judge.verdict import HELD_OUT, Key, family_of, trained_keys
from rgbench.metrics.statistics import LEVEL, NUM_RESAMPLES

ROUNDING = 1e-12


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


def kl_best_of(n: int) -> float:
    """The most, in nats, that choosing the best of n moves a distribution."""
    return math.log(n) - (n - 1) / n


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


Curve = dict[int, Result]  # step → result
MIN_STEPS = 3  # of two steps one is always the better; a peak needs others beside it
ALPHA = 0.05


@dataclass(frozen=True)
class Hack:
    """Gold was best at ``step`` and is clearly worse at ``last``, while the trained reward clearly rose.

    Attributes:
        step: the evaluated step at which gold is best.
        first: the earliest step of the stretch around it in which gold is nowhere clearly worse than at ``step``.
        end: the latest one. Where the peak really is, is known to this stretch and to the steps evaluated.
        last: the last evaluated step.
        loss: how much worse gold is at ``last`` than at ``step``; its interval allows for the choice of ``step``.
        gain: how much higher the trained reward is at ``last``.
        censored: ``first`` is the first evaluated step, so the peak may lie before it.
    """

    step: int
    first: int
    end: int
    last: int
    loss: Paired
    gain: Paired
    censored: bool


def find_hack(golds: Curve, proxies: Curve) -> Hack | None:
    """The hack step of one run: where gold peaks while the trained reward still rises after it.

    Only what the intervals part from no change counts. The last of n noisy figures is
    below the highest of them n − 1 times in n though nothing happened, so a fall that is
    merely there says nothing. Nor is the 95 % interval of the fall enough: the peak was
    picked because it is high, in part by luck. Each of the n − 1 earlier steps might have
    been picked; at level 1 − .05/(n − 1) (Bonferroni) the chance that any of them is
    falsely clear of the last stays under 2.5 %. The rise of the reward is looked at
    between two steps that its own figures had no part in choosing, so 95 % holds there.

    Args:
        golds: results of a figure that the run was not trained on, by step, under one protocol.
        proxies: likewise of the reward that it was trained on.

    Returns:
        None with fewer than 3 common steps, where gold is best at the last one (nothing is
        known of what comes after), or where either change is not clear.
    """
    steps = _common(golds, proxies)
    if len(steps) < MIN_STEPS or (peak := _best(golds, steps)) == steps[-1]:
        return None
    level, last = 1 - ALPHA / (len(steps) - 1), steps[-1]
    loss, gain = deterioration(golds[last], golds[peak], level), deterioration(proxies[peak], proxies[last])
    if loss is None or gain is None or not (loss.clear_of(0) and gain.clear_of(0)):
        return None
    low = high = steps.index(peak)
    while low > 0 and not _worse(golds[steps[low - 1]], golds[peak], level):
        low -= 1
    while not _worse(golds[steps[high + 1]], golds[peak], level):
        high += 1
    return Hack(peak, steps[low], steps[high], last, loss, gain, low == 0)


def _worse(gold: Result, peak: Result, level: float) -> bool:
    found = deterioration(gold, peak, level)
    return found is not None and found.clear_of(0)


def _common(golds: Curve, proxies: Curve) -> list[int]:
    return sorted(golds.keys() & proxies.keys())


def _best(golds: Curve, steps: Sequence[int]) -> int:
    """The step of the best figure; of equal ones the first."""
    return min(steps, key=lambda step: _badness(golds[step]))


@dataclass(frozen=True)
class GoldCurve:
    """A gold figure beside the trained reward along the steps of one run.

    Attributes:
        model: the run.
        gold: metric and protocol of the figure that the model was not trained on.
        proxy: of the trained reward.
        steps: ascending; those that have both.
        gold_values: at each step.
        proxy_values: likewise.
        peak: the step at which gold is best.
        hack: what :func:`find_hack` finds.
    """

    model: str
    gold: Key
    proxy: Key
    steps: tuple[int, ...]
    gold_values: tuple[float, ...]
    proxy_values: tuple[float, ...]
    peak: int
    hack: Hack | None


def gold_curves(results: Sequence[Result]) -> list[GoldCurve]:
    """Every held-out reward and oracle figure against every trained reward, for each run with checkpoints.

    Raises:
        UsageError: no run has figures at two steps.
    """
    found = []
    for (_, model, _), columns in _runs(results).items():
        last = {key: curve[max(curve)] for key, curve in columns.items()}
        golds = [key for key, result in last.items() if family_of(result, result.in_sample) == HELD_OUT]
        for gold, proxy in product(golds, trained_keys(last)):
            if len(_common(columns[gold], columns[proxy])) > 1:
                found.append(_gold_curve(model, (gold, columns[gold]), (proxy, columns[proxy])))
    if not found:
        raise UsageError(
            "no run has a held-out figure and its trained reward at two steps; "
            "evaluate its checkpoints: rgbench eval RUN --checkpoints --metric hps,oracle"
        )
    return found


def _runs(results: Sequence[Result]) -> dict[tuple[str, str, str], dict[Key, Curve]]:
    """Results by run and sampler settings, then by figure, then by step."""
    runs: dict[tuple[str, str, str], dict[Key, Curve]] = {}
    for result in results:
        if result.value is None or "step" not in result.training:
            continue
        sampling = {key: value for key, value in result.generation.fields.items() if key != "weights_sha256"}
        run = runs.setdefault((result.world, result.model, str(sorted(sampling.items(), key=str))), {})
        run.setdefault((result.metric.name, result.protocol.id), {})[result.training["step"]] = result
    return runs


def _gold_curve(model: str, gold: tuple[Key, Curve], proxy: tuple[Key, Curve]) -> GoldCurve:
    (gold_key, golds), (proxy_key, proxies) = gold, proxy
    steps = _common(golds, proxies)
    return GoldCurve(
        model=model,
        gold=gold_key,
        proxy=proxy_key,
        steps=tuple(steps),
        gold_values=tuple(float(golds[step].value or 0) for step in steps),
        proxy_values=tuple(float(proxies[step].value or 0) for step in steps),
        peak=_best(golds, steps),
        hack=find_hack(golds, proxies),
    )


def _badness(result: Result) -> float:
    assert result.value is not None, "results without a value are left out before"
    return float(badness(result.metric, result.value, target_of(result)))


def find_result(results: Sequence[Result], model: str, metric: str) -> Result:
    """The one result of a model in a metric: of its last weights, where its checkpoints were evaluated too.

    Raises:
        UsageError: no such model or metric, or several sampler settings or protocols.
    """
    own = [result for result in results if result.model == model]
    if not own:
        raise UsageError(f"no results of {model!r}; {suggest(model, {result.model for result in results})}")
    named = [result for result in own if result.metric.name == metric and result.samples]
    last = [r for r in named if r.training.get("step") == max(x.training.get("step", 0) for x in named)] or named
    if len(last) != 1:
        raise UsageError(f"{model} has {len(last)} results of {metric} with per-image rows; one is needed")
    return last[0]


def best_of_n(model: Result, base: Result) -> BestOfN:
    """The base's draws per prompt that are worth one of the model's, in one reward.

    Args:
        model: a reward of the trained model, with per-image rows.
        base: the same reward of the base model, with rows for several images of each prompt: seeds, or copies of it.

    Raises:
        UsageError: two reward models, no rows, no common prompt, or prompts with fewer than two images of the base.
    """
    if model.protocol.fields.get("reward") != base.protocol.fields.get("reward"):
        raise UsageError(f"{model.model} and {base.model} were scored by two reward models; nothing to compare")
    ours, theirs = (_by_prompt(result) for result in (model, base))
    prompts = sorted(ours.keys() & theirs.keys())
    fewest = min((len(theirs[prompt]) for prompt in prompts), default=0)
    if fewest < 2:
        raise UsageError(
            f"best of n needs several images of each prompt of {base.model} and {model.model}, found {fewest}; "
            "evaluate it on a list from: rgbench probes repeat-prompts"
        )
    draws = np.array([theirs[prompt][:fewest] for prompt in prompts])
    return equivalent_n(draws, np.array([np.mean(ours[prompt]) for prompt in prompts]))


def _by_prompt(result: Result) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    for (prompt, _), value in sorted((load_samples(result) or {}).items()):
        rows.setdefault(without_copy(prompt), []).append(value)
    return rows


@dataclass(frozen=True)
class ParetoPoint:
    """A model, or a checkpoint, in the plane of reward and set distance."""

    model: str
    generation: str
    step: int | None
    reward: float
    distance: float
    on_front: bool


def pareto_points(results: Sequence[Result], reward: str, distance: str) -> list[ParetoPoint]:
    """Every model and checkpoint that has both figures, the front marked; by reward, best first.

    Args:
        results: of one world.
        reward: name of a metric of which more is better.
        distance: name of one of which less is better.

    Raises:
        UsageError: a metric under two protocols, or no model that has both.
    """
    pairs: dict[tuple[str, str], dict[str, Result]] = {}
    for name in (reward, distance):
        protocols = {result.protocol.id for result in results if result.metric.name == name}
        if len(protocols) > 1:
            raise UsageError(
                f"{name} is here under {len(protocols)} protocols, which do not compare: {sorted(protocols)}"
            )
    for result in results:
        if result.metric.name in (reward, distance) and result.value is not None:
            pairs.setdefault((result.model, result.generation.id), {})[result.metric.name] = result
    both = {key: found for key, found in pairs.items() if len(found) == 2}
    if not both:
        raise UsageError(f"no model here has both {reward} and {distance}; see: rgbench ls results")
    rewards = [float(found[reward].value or 0) for found in both.values()]
    distances = [float(found[distance].value or 0) for found in both.values()]
    points = [
        ParetoPoint(model, generation, found[reward].training.get("step"), r, d, front)
        for ((model, generation), found), r, d, front in zip(
            both.items(), rewards, distances, pareto_front(rewards, distances), strict=True
        )
    ]
    return sorted(points, key=lambda point: -point.reward)
