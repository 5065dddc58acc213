"""Comparisons between models and between methods, from result files.

    models    two models on common prompts and seeds: difference with a paired interval; where there are
              per-image values, win rate and the smallest difference that so many images could show
    methods   the training seed is the unit: paired t over the seeds that both methods have; one primary
              contrast is named beforehand and keeps its p, all others are adjusted by Holm

A comparison of models says nothing of the luck of training; one of methods does. A figure that
only the model has keeps its row, without a difference; one that no two seeds share has none. Where both
models kept their spectra, rows ``lsd_…_to_base_db`` follow: the log-spectral distance between the two, not a
difference of two distances to real.

Log-spectral distance between the images of two models, from the spectra that their results keep.

    LSD = √mean_k (10 log₁₀ S_k − 10 log₁₀ S_base,k)²,  S_k: mean power of ring k

0 only where the two spectra are equal, so the luck of which images were made keeps it above 0; what
two students of one method differ by says by how much. Both models show the same prompts, so their
groups are left out together for the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rgbench.core.errors import UsageError, suggest
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import Result
from rgbench.judge.paired import Paired, badness, by_prompt, difference, has_prompt_targets, target_of
from rgbench.judge.verdict import EXTERNAL, TEACHER, Key, Model
from rgbench.metrics.probes.spectrum import log_spectral_distance
from rgbench.metrics.statistics import (
    Wins,
    count_wins,
    detectable_over_seeds,
    holm,
    jackknife_interval,
    minimum_detectable_effect,
    paired_t,
    stratified_deviation,
    t_interval,
)

PLANES = {"luma": "power", "chroma": "chroma_power"}
LEFT_OUT = "{}_left_out"  # key of the spectra without each group of prompts


def spectral_distance(model: Result, base: Result, plane: str = "luma") -> Paired | None:
    """How far the mean spectrum of one model is from another's, in dB.

    Args:
        model: any figure of ``--metric spectrum``.
        base: the same figure of the other model.
        plane: "luma" or "chroma", the mean of Cb and Cr.

    Returns:
        None where either kept no spectrum, or a ring of it is empty; without an interval where one kept no spectra
        of which groups of prompts are left out.

    Raises:
        ValueError: results of two metrics or protocols, which cannot be compared.
    """
    if (model.metric.name, model.protocol.id) != (base.metric.name, base.protocol.id):
        raise ValueError(f"{model.protocol.id} and {base.protocol.id} are two protocols; nothing to compare")
    key = PLANES[plane]
    ours, theirs = (_vectors(result.extra.get(key), 1) for result in (model, base))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    value = log_spectral_distance(ours, theirs)
    if not np.isfinite(value):
        return None
    parts = [_vectors(result.extra.get(LEFT_OUT.format(key)), 2) for result in (model, base)]
    if parts[0] is None or parts[1] is None or parts[0].shape != parts[1].shape:
        return Paired(value, None, None, "none")
    drawn = [log_spectral_distance(a, b) for a, b in zip(*parts, strict=True)]
    interval = jackknife_interval(value, drawn) if np.isfinite(drawn).all() else None
    if interval is None:
        return Paired(value, None, None, "none")
    return Paired(value, max(0.0, interval.low), interval.high, "jackknife")


def _vectors(kept: Any, dimensions: int) -> np.ndarray | None:
    found = np.asarray(kept, dtype=np.float64) if isinstance(kept, list) and kept else None
    return found if found is not None and found.ndim == dimensions else None


SPECTRA = ("hfer_gap_db", "hfer_db")  # the figures whose results keep what a distance of two spectra needs
MIN_SEEDS = 6  # with fewer, not even all signs agreeing is a two-sided p under 5 %


@dataclass(frozen=True)
class Images:
    """What the prompts that two models share say one by one.

    Attributes:
        wins: a win is the prompt whose image, or the mean of whose seeds, is nearer to the good end.
        detectable: the smallest true difference found with probability .8 on so many prompts.
    """

    wins: Wins
    detectable: float


@dataclass(frozen=True)
class ModelContrast:
    """A model against its base in one figure.

    Attributes:
        model: name.
        base: name.
        result: the model's result: metric, protocol.
        found: model − base with its interval; None where the base has no value under this protocol.
        images: where both kept values of the same images and a good end is known.
    """

    model: str
    base: str
    result: Result
    found: Paired | None
    images: Images | None


@dataclass(frozen=True)
class MethodContrast:
    """A method against its base in one figure, over training seeds.

    Attributes:
        method: name without the seed.
        base: likewise.
        result: any of the method's results: metric, protocol.
        seeds: training seeds that both have.
        mean: of method − base over seeds.
        low: of the 95 % t interval.
        high: likewise.
        detectable: the smallest true difference found with probability .8 over so many seeds.
        p: two-sided; of the primary contrast as it is, of all others adjusted by Holm; None with fewer than 6 seeds.
        primary: whether it is the contrast named beforehand.
    """

    method: str
    base: str
    result: Result
    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float
    detectable: float
    p: float | None
    primary: bool


def compare_models(models: Sequence[Model], base: str, track: Track = untracked) -> list[ModelContrast]:
    """Every model against the base student of its training seed (else the first), figure by figure.

    Args:
        models: from ``models_of``.
        base: name of the base students, without or with seed, or of the teacher.
        track: shows progress over the models.

    Raises:
        UsageError: no such base.
    """
    require_base(models, base)
    found = []
    for model in track(models, "comparisons", "models"):
        if base in (model.about.model, model.stem):
            continue
        if partner := partner_of(model, models, base):
            found += _contrasts(model, partner)
    return found


def partner_of(model: Model, models: Sequence[Model], base: str) -> Model | None:
    """The base of the model's settings and training seed, else the first; of a teacher's settings that of most steps.

    Args:
        model: that is compared.
        models: from ``models_of``.
        base: name of the base, without or with seed.

    Returns:
        None where none may be compared with it.
    """
    named = [m for m in models if base in (m.about.model, m.stem) and _may_compare(m, model)]
    steps = {id(m): m.about.generation.fields.get("steps") or 0 for m in named}
    return min(
        named,
        key=lambda m: (not m.compares_with(model), m.seed != model.seed, m.about.model, -steps[id(m)]),
        default=None,
    )


def _may_compare(base: Model, model: Model) -> bool:
    """Students at one setting; a teacher, or a model trained elsewhere, at its own, for images of one size."""
    if base.about.method not in (TEACHER, EXTERNAL):
        return model.compares_with(base)
    ours, theirs = (m.about.generation.fields.get("resolution") for m in (model, base))
    return base.about.world == model.about.world and ours == theirs


def require_base(models: Sequence[Model], base: str) -> None:
    """Raise a UsageError where no model has that name."""
    known = {name for model in models for name in (model.about.model, model.stem)}
    if base not in known:
        raise UsageError(f"no model {base!r} in the results; {suggest(base, known)}")


def _contrasts(model: Model, base: Model) -> list[ModelContrast]:
    contrasts = []
    for key, result in model.figures.items():
        other = base.figures.get(key)
        found = difference(result, other) if other is not None else None
        images = _images(result, other) if other is not None else None
        contrasts.append(ModelContrast(model.about.model, base.about.model, result, found, images))
        if other is not None and key[0] in SPECTRA:
            contrasts += _spectra(contrasts[-1], other)
    return contrasts


def _spectra(of: ModelContrast, other: Result) -> list[ModelContrast]:
    """How far apart the two models' spectra are, a figure that neither has alone."""
    found = {plane: spectral_distance(of.result, other, plane) for plane in PLANES}
    told = {"direction": "lower", "label": "Log-spectral distance to the base"}
    metrics = {plane: of.result.metric.model_copy(update=told | {"name": f"lsd_{plane}_to_base_db"}) for plane in found}
    return [
        replace(of, result=of.result.model_copy(update={"metric": metrics[plane]}), found=distance, images=None)
        for plane, distance in found.items()
        if distance is not None
    ]


def _images(result: Result, other: Result) -> Images | None:
    ours, theirs = by_prompt(result), by_prompt(other)
    if not has_prompt_targets(result) or ours is None or theirs is None or ours.images != theirs.images:
        return None
    target = target_of(other)
    deviation = stratified_deviation(ours.means - theirs.means, ours.groups)
    return Images(
        wins=count_wins(*(-np.asarray(badness(result.metric, x, target)) for x in (ours.means, theirs.means))),
        detectable=minimum_detectable_effect(deviation, len(ours.means)),
    )


def compare_methods(models: Sequence[Model], base: str, primary: tuple[str, str]) -> list[MethodContrast]:
    """Every method against the base method over common training seeds, figure by figure.

    Args:
        models: from ``models_of``.
        base: the base method's name without seed.
        primary: (method, metric) of the contrast that was named beforehand.

    Raises:
        UsageError: no such base, or the primary contrast is not in the results on two common seeds.
    """
    require_base(models, base)
    raw = [found for pair in _method_pairs(models, base) for found in _over_seeds(*pair)]
    chosen = [i for i, found in enumerate(raw) if (found.method, found.result.metric.name) == primary]
    if len(chosen) != 1:
        known = sorted({f"{found.method}:{found.result.metric.name}" for found in raw})
        raise UsageError(
            f"the primary contrast {':'.join(primary)} against {base} is in the results {len(chosen)} times on two "
            f"common training seeds; it must be there once. {suggest(':'.join(primary), known)}"
        )
    rest = [i for i, found in enumerate(raw) if i != chosen[0] and found.p is not None]
    adjusted = dict(zip(rest, holm([p for i in rest if (p := raw[i].p) is not None]), strict=True))
    return [_settled(found, adjusted.get(i, found.p), i == chosen[0]) for i, found in enumerate(raw)]


def _settled(found: MethodContrast, p: float | None, primary: bool) -> MethodContrast:
    return replace(found, p=p, primary=primary)


Members = dict[int, Model]  # training seed → student


def _method_pairs(models: Sequence[Model], base: str) -> list[tuple[str, Members, str, Members]]:
    """Students of each method and setting with those of the base that compare with them."""
    pairs = []
    done: set[tuple[str, str]] = set()
    for model in models:
        setting = (model.stem, str(model.setting()))
        if model.seed is None or model.stem == base or setting in done:
            continue
        done.add(setting)
        ours: Members = {}
        theirs: Members = {}
        for other in models:
            seed = other.seed
            if seed is not None and other.compares_with(model) and other.stem in (model.stem, base):
                (ours if other.stem == model.stem else theirs)[seed] = other
        pairs.append((model.stem, ours, base, theirs))
    return pairs


def _over_seeds(method: str, ours: Members, base: str, theirs: Members) -> list[MethodContrast]:
    found = []
    common = sorted(ours.keys() & theirs.keys())
    keys: dict[Key, Result] = {key: result for model in ours.values() for key, result in model.figures.items()}
    for key, result in keys.items():
        sides = [[_value(side[seed], key) for seed in common] for side in (ours, theirs)]
        kept = [(seed, a, b) for seed, a, b in zip(common, *sides, strict=True) if a is not None and b is not None]
        if len(kept) < 2:
            continue
        seeds, a, b = zip(*kept, strict=True)
        differences = [x - y for x, y in zip(a, b, strict=True)]
        detectable = detectable_over_seeds(differences)
        p = paired_t(a, b) if len(seeds) >= MIN_SEEDS else None
        found.append(
            MethodContrast(method, base, result, seeds, *t_interval(differences), detectable, p, primary=False)
        )
    return found


def _value(model: Model, key: Key) -> float | None:
    return model.figures[key].value if key in model.figures else None
