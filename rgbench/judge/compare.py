"""Comparison of models with a base, column by column.

Differences are those of :func:`rgbench.judge.paired.delta`. One contrast may be named beforehand: it keeps its p, and
all others are adjusted by Holm. Where both models kept their spectra, rows ``lsd_…_to_base_db`` follow, the
log-spectral distance between the two:

    LSD = √mean_k (10 log₁₀ S_k − 10 log₁₀ S_base,k)²,  S_k: mean power of ring k

It is 0 for equal spectra alone; two students of one method show what luck makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from rgbench.core.errors import UsageError, suggest
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import Column, Model, ResultSet
from rgbench.judge.paired import Delta, Pair, common_seeds, delta, prompt_means
from rgbench.metrics.probes.spectrum import log_spectral_distance
from rgbench.metrics.statistics import LEVEL, Wins, count_wins, holm, jackknife_interval, t_interval
from rgbench.metrics.values import Direction, Family, Interval, MetricInfo, Protocol

MIN_SEEDS = 6  # with fewer, not even all signs agreeing is a two-sided p under 5 %
PLANES = {"luma": "power", "chroma": "chroma_power"}  # vectors that results of spectra keep
LEFT_OUT = "{}_left_out"  # key of the spectra without each group of prompts


@dataclass(frozen=True)
class Comparison:
    """A model against its base in one column.

    Attributes:
        model: of several seeds or one run.
        base: likewise.
        column: what is compared.
        delta: None where the base has no value.
        wins: share of the prompts that the model wins; None without per-image values of common images.
        p: of the test over seeds, adjusted by Holm unless primary; None with fewer than 6 seeds.
        primary: whether the contrast was named beforehand.
    """

    model: Model
    base: Model
    column: Column
    delta: Delta | None
    wins: Wins | None
    p: float | None = None
    primary: bool = False


def compare(
    sets: Sequence[ResultSet],
    base: str,
    names: Sequence[str] = (),
    primary: tuple[str, str] | None = None,
    track: Track = untracked,
) -> list[Comparison]:
    """Compare models with a base in every column that they have.

    Args:
        sets: results by world.
        base: name of the base, without or with seed.
        names: models, without or with seed; all by default.
        primary: (model, metric) of the contrast that was named beforehand.
        track: shows progress over the models.

    Raises:
        UsageError: an unknown name, nothing to compare, or a primary contrast that is not there once.
    """
    tasks = [(results, *pair) for results in sets for pair in _pairs(results, base, names)]
    if not tasks:
        raise UsageError(_why_none(sets, base, names))
    found = []
    for results, model, against in track(tasks, "comparisons", "models"):
        for column in results.columns:
            if model.seeds(column):
                change = delta(model, against, column)
                found.append(Comparison(model, against, column, change, win_rate(model, against, column)))
        found += _spectra(results, model, against)
    return _adjusted(found, primary)


def win_rate(model: Model, base: Model, column: Column) -> Wins | None:
    """Share of the prompts on which the model is better, ties half.

    Over one pair of runs with its Wilson interval; over several common seeds their mean, with a t interval over seeds.
    None without common images, and where no good end of a prompt's own value is known.
    """
    found = []
    for pair in common_seeds(model, base, column):
        sides = [prompt_means(side.results[seed], column) for side, seed in zip((model, base), pair, strict=True)]
        if sides[0] is None or sides[1] is None or sides[0].images != sides[1].images:
            continue
        if column.oriented(0.0) is not None and not _unpaired(model.results[pair[0]], column):
            found.append(
                count_wins(*([column.oriented(x) or 0.0 for x in side.means.tolist()] for side in sides if side))
            )
    if len(found) < 2:
        return found[0] if found else None
    mean, low, high = t_interval([wins.rate for wins in found])
    method = f"t over {len(found)} training seeds"
    return Wins(mean, Interval(low=max(0.0, low), high=min(1.0, high), level=LEVEL, method=method))


def spectral_distance(model: Model, base: Model, column: Column, plane: str = "luma") -> Delta | None:
    """How far the mean spectra of two models are apart, in dB; over common seeds their mean.

    Args:
        model: of one world.
        base: of the same world; the model itself for the mean over pairs of its training seeds.
        column: of any value of ``--metric spectrum``.
        plane: "luma" or "chroma", the mean of Cb and Cr.

    Returns:
        None where either kept no spectrum, or a ring of it is empty.
    """
    pairs = common_seeds(model, base, column) if base is not model else combinations(model.seeds(column), 2)
    found = [_distance(model, base, pair, column, plane) for pair in pairs]
    whole = [each for each in found if each is not None]
    if len(whole) < 2:
        return whole[0] if whole else None
    mean, low, high = t_interval([each.value for each in whole])
    if base is model:  # the pairs share seeds
        return replace(whole[0], value=mean, low=None, high=None, basis="none", num_pairs=0)
    return replace(whole[0], value=mean, low=max(0.0, low), high=high, basis="seeds", num_pairs=len(whole))


def _distance(model: Model, base: Model, pair: Pair, column: Column, plane: str) -> Delta | None:
    extras = [side.results[seed].by_key[column.key].extra for side, seed in zip((model, base), pair, strict=True)]
    key, name = PLANES[plane], f"lsd_{plane}_to_base_db"
    ours, theirs = (np.asarray(extra.get(key, ()), dtype=np.float64) for extra in extras)
    if not ours.size or ours.shape != theirs.shape:
        return None
    value = log_spectral_distance(ours, theirs)
    if not math.isfinite(value):
        return None
    label = f"Log-spectral distance to the base, {plane}"
    info = MetricInfo(
        name=name, label=label, about=label, unit="dB", direction=Direction.LOWER, family=Family.SPECTRUM, decimals=2
    )
    own = Column(name, Protocol(id=column.protocol.id, fields=column.protocol.fields), info, None)
    parts = [np.asarray(extra.get(LEFT_OUT.format(key), ()), dtype=np.float64) for extra in extras]
    interval = None
    if parts[0].ndim == 2 and parts[0].shape == parts[1].shape:
        drawn = [log_spectral_distance(a, b) for a, b in zip(*parts, strict=True)]
        interval = jackknife_interval(value, drawn) if np.isfinite(drawn).all() else None
    if interval is None:
        return Delta(own, value, None, None, None, None, None, "none", 0, value, 0.0)
    ends = max(0.0, interval.low), interval.high
    return Delta(own, value, *ends, None, None, None, "jackknife", len(parts[0]), value, 0.0)


def _pairs(results: ResultSet, base: str, names: Sequence[str]) -> list[tuple[Model, Model]]:
    chosen = []
    for model in results.models:
        asked = [name for name in names if name in (model.name, *model.names)]
        own = base in (model.name, *model.names)
        for one in [model.run(name) for name in asked] or ([] if names or own else [model]):
            against = results.baseline(one, base)
            if against is not None:
                chosen.append((one, against))
    return chosen


def _why_none(sets: Sequence[ResultSet], base: str, names: Sequence[str]) -> str:
    known = {name for results in sets for model in results.models for name in (model.name, *model.names)}
    for name in (base, *names):
        if name not in known:
            return f"no model {name!r} in the results; {suggest(name, known)}"
    reasons = [
        results.why_no_baseline(model, base)
        for results in sets
        for model in results.models
        if base not in (model.name, *model.names) and (not names or set(names) & {model.name, *model.names})
    ]
    return reasons[0] if reasons else f"nothing but {base} is here, which is not compared with itself"


def _spectra(results: ResultSet, model: Model, base: Model) -> list[Comparison]:
    for column in results.columns:
        if column.family is Family.SPECTRUM and model.seeds(column) and base.seeds(column):
            distances = [spectral_distance(model, base, column, plane) for plane in PLANES]
            if any(distances):
                return [Comparison(model, base, each.column, each, None) for each in distances if each is not None]
    return []


def _adjusted(found: list[Comparison], primary: tuple[str, str] | None) -> list[Comparison]:
    """P values over seeds: the primary contrast's own, all others by Holm."""
    chosen = [i for i, each in enumerate(found) if (each.model.name, each.column.metric) == primary]
    if primary is not None and len(chosen) != 1:
        known = sorted({f"{each.model.name}:{each.column.metric}" for each in found if each.delta is not None})
        raise UsageError(
            f"--primary wants MODEL:METRIC of one comparison, and {':'.join(primary)} is {len(chosen)}; "
            f"{suggest(':'.join(primary), known)}"
        )
    able = {
        i: each.delta.p for i, each in enumerate(found) if each.delta is not None and each.delta.num_pairs >= MIN_SEEDS
    }
    raw = {i: p for i, p in able.items() if p is not None and i not in chosen}
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    return [
        replace(each, p=able.get(i) if i in chosen else adjusted.get(i), primary=i in chosen)
        for i, each in enumerate(found)
    ]


def _unpaired(result: ModelResult, column: Column) -> bool:
    """Whether real images belong to no prompt, so that a prompt's own distance to their mean means nothing."""
    return "real_error" in result.by_key[column.key].extra
