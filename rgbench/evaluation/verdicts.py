"""``rgbench verdict``: every reward-guided student judged against its LCD student, in words and as JSON.

A verdict compares figures that result files hold; nothing is generated. The rule is in
:mod:`rgbench.evaluation.verdict`, its words in :mod:`rgbench.evaluation.verdict_words`, the
file in :mod:`rgbench.evaluation.verdict_file`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.results import Result, generation_folder, load_results
from rgbench.evaluation.verdict import (
    MIN_SEEDS,
    Change,
    FalsePositives,
    Figures,
    Key,
    false_positives,
    judge,
    trained_keys,
    trained_on,
)
from rgbench.evaluation.verdict_file import FILE, Family, FigureChange, Verdict
from rgbench.evaluation.verdict_words import explain
from rgbench.files import write_json_atomic
from rgbench.metrics.tracking import Track, untracked
from rgbench.run import provenance

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
