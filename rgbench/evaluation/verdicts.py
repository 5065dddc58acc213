"""``rgbench verdict``: every reward-guided student judged against its LCD student, in words and as JSON.

A verdict compares figures that result files hold; nothing is generated. The rule is in
:mod:`rgbench.evaluation.verdict`, the file in :mod:`rgbench.evaluation.verdict_file`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.results import Result, generation_folder, load_results
from rgbench.evaluation.verdict import (
    FAMILIES,
    MIN_SEEDS,
    MIN_WORSE,
    Change,
    Figures,
    Judgement,
    Key,
    false_positives,
    judge,
    trained_keys,
)
from rgbench.evaluation.verdict_file import FILE, Family, FigureChange, Verdict
from rgbench.files import write_json_atomic
from rgbench.run import provenance

TEACHER = "teacher"
Kind = Literal["over-optimised", "not over-optimised", "no gain", "none"]


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
    def stem(self) -> str:
        """The name without the training seed."""
        seed = self.about.training_seed
        return self.about.model if seed is None else self.about.model.removesuffix(f"-s{seed}")

    def compares_with(self, other: Model) -> bool:
        """Whether world, sampler settings and training steps are the same."""
        return self.setting() == other.setting()

    def setting(self) -> tuple[Any, ...]:
        """World, sampler settings, training steps: what must be the same for a comparison."""
        about = self.about
        sampling = {key: value for key, value in about.generation.fields.items() if key != "weights_sha256"}
        return about.world, sorted(sampling.items(), key=str), about.training.get("steps")


def models_of(results: Path) -> list[Model]:
    """Finished models in a results folder; checkpoints of a run are left out.

    Raises:
        UsageError: no results there.
    """
    loaded = load_results(results) if results.is_dir() else []
    if not loaded:
        raise UsageError(f"{results}: no result files here; run `rgbench eval` first, or name the folder that has them")
    found: dict[tuple[str, str, str], list[Result]] = {}
    for result in loaded:
        if result.training.get("step") == result.training.get("steps"):
            found.setdefault((result.world, result.model, result.generation.id), []).append(result)
    return [Model(tuple(members)) for members in found.values()]


def give_verdicts(results: Path, base: str, names: Sequence[str] = ()) -> list[Verdict]:
    """Judge models and store each verdict beside the model's results.

    Args:
        results: the results folder.
        base: name of the LCD students, such as "lcd" for lcd-s0, lcd-s1 …, or of one of them.
        names: models to judge; by default all that were trained on a reward.

    Returns:
        The verdicts, by model.

    Raises:
        UsageError: no results, an unknown model, or no model that was trained on a reward.
    """
    models = models_of(results)
    known = {model.about.model for model in models}
    for name in names:
        if name not in known:
            raise UsageError(f"{results}: no finished model {name!r}; {suggest(name, known)}")
    chosen = [m for m in models if (m.about.model in names if names else m.about.trained_rewards)]
    if not chosen:
        raise UsageError(f"{results}: no model here was trained on a reward; a verdict needs one and its LCD student")
    record = provenance()
    verdicts = [_verdict(model, models, base).model_copy(update={"provenance": record}) for model in chosen]
    for verdict in verdicts:
        folder = generation_folder(results, verdict.world, verdict.model, verdict.generation)
        write_json_atomic(folder / FILE, verdict.model_dump())
    return verdicts


def _verdict(model: Model, models: Sequence[Model], base: str) -> Verdict:
    alike = [m for m in models if m is not model and m.compares_with(model)]
    named = [m for m in alike if base in (m.about.model, m.stem)]
    own = model.about
    about: dict[str, Any] = {"world": own.world, "model": own.model, "generation": own.generation}
    if not named:
        words = (
            f"no verdict: no {base!r} student of the same world, sampler settings and training steps is here; "
            f"evaluate one, or name another with --base ({suggest(base, {m.stem for m in models})})"
        )
        return Verdict(**about, base=None, verdict="none", words=words)
    partner = min(named, key=lambda m: (m.about.training_seed != model.about.training_seed, m.about.model))
    seeds = [m for m in alike if m.stem == partner.stem]
    figures = [seed.figures for seed in seeds]
    found = judge(model.figures, partner.figures, figures)
    wrong = false_positives(figures, model.figures)
    kind, words = _words(model, partner, found, len(seeds))
    if kind != "none":
        words += (
            f" Of {wrong.pairs} pairs of LCD students the same rule calls {wrong.over_optimised} over-optimised, and "
            f"finds two families worse in {wrong.two_worse}."
            if wrong
            else f" Its false-positive rate is not known: that takes {MIN_SEEDS + 2} LCD seeds, here are {len(seeds)}."
        )
    teacher = _teacher(models, model.about.world)
    return Verdict(
        **about,
        base=partner.about.model,
        verdict=kind,
        words=words,
        rewards=tuple(_shown(c, model.figures, partner.figures, teacher) for c in found.rewards),
        families=tuple(
            Family(
                name=name,
                worse=name in found.worse,
                figures=tuple(_shown(c, model.figures, partner.figures, teacher) for c in changes),
            )
            for name, changes in found.families.items()
        ),
        delta_seeds=tuple(sorted(seed.about.model for seed in seeds)) if len(seeds) >= MIN_SEEDS else (),
        false_positives=asdict(wrong) if wrong else None,
    )


def _words(model: Model, base: Model, found: Judgement, num_seeds: int) -> tuple[Kind, str]:
    """The kind of verdict, and what it says."""
    pair = f"{model.about.model} against {base.about.model}"
    if not trained_keys(model.figures):
        return "none", f"no verdict on {pair}: the reward that it was trained on was not measured; add --metric hps"
    if num_seeds < MIN_SEEDS:
        return "none", (
            f"no verdict on {pair}: what training seeds alone differ by takes {MIN_SEEDS} {base.stem!r} students of "
            f"the same settings, and here {'is' if num_seeds == 1 else 'are'} {num_seeds}; train more seeds and "
            "evaluate them. The differences are given without it."
        )
    if not found.rewards:
        return "none", f"no verdict on {pair}: the trained reward was not measured on both and on every seed"
    if len(found.families) < MIN_WORSE:
        measured = ", ".join(found.families) or "none"
        return "none", (
            f"no verdict on {pair}: it takes {MIN_WORSE} families of figures that both models and every seed have, "
            f"and there {'is' if len(found.families) == 1 else 'are'}: {measured}; evaluate with --metric probes too"
        )
    return _ruling(pair, model, found)


def _ruling(pair: str, model: Model, found: Judgement) -> tuple[Kind, str]:
    share = f"{len(found.worse)} of {len(found.families)} measured families are worse"
    if len(found.worse) == 1:
        share = share.replace("are worse", "is worse")
    reasons = [_reason(name, found.families[name], model.figures) for name in found.worse]
    listed = f": {'; '.join(reasons)}" if reasons else ""
    missing = [name for name in FAMILIES if name not in found.families]
    unseen = f" Not measured: {', '.join(missing)}." if missing else ""
    if not found.up:
        return "no gain", f"{pair}: the trained reward is not up beyond what seeds differ by; {share}{listed}.{unseen}"
    gain = max(found.rewards, key=lambda change: change.found.value)
    text = f"{pair}: the trained reward is up ({_amount(gain, model.figures)}), and {share}{listed}.{unseen}"
    if found.over_optimised:
        return "over-optimised", f"Over-optimised. {text}"
    return "not over-optimised", f"Not shown to be over-optimised. {text}"


def _reason(family: str, changes: Sequence[Change], figures: Figures) -> str:
    worst = max((c for c in changes if c.worse), key=lambda c: c.found.value / (c.delta or c.found.value))
    return f"{family} ({_amount(worst, figures)})"


def _amount(change: Change, figures: Figures) -> str:
    """Such as ``HFER gap by 1.20 dB [1.00, 1.40], seeds differ by 0.31``."""
    metric, found = figures[change.key].metric, change.found
    unit = f" {metric.unit}" if metric.unit else ""
    shown = [f"{x:.{metric.decimals}f}" for x in (found.value, found.low, found.high, change.delta) if x is not None]
    return f"{metric.label} by {shown[0]}{unit} [{shown[1]}, {shown[2]}], seeds differ by {shown[3]}"


def _shown(change: Change, model: Figures, base: Figures, teacher: Figures) -> FigureChange:
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
        clear=change.worse,
    )


def _teacher(models: Sequence[Model], world: str) -> Figures:
    """Figures of the world's teacher at its most steps; none where it was not evaluated."""
    found = [m for m in models if m.about.method == TEACHER and m.about.world == world]
    most = max(found, key=lambda m: m.about.generation.fields.get("steps") or 0, default=None)
    return most.figures if most else {}
