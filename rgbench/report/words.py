"""Words of the report: values with their intervals, changes with sign and arrow, names of models, sentences.

Numbers show two digits of half their interval and no more; a value that is missing is "—".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rgbench.judge.compare import win_rate
from rgbench.judge.models import EXTERNAL, LCD, TEACHER, Column, Model, ResultSet
from rgbench.judge.paired import Delta, delta
from rgbench.judge.trajectory import TrainingRun, training_runs
from rgbench.judge.verdict import QUESTIONS, Outcome, Verdict, proxy_accuracy
from rgbench.metrics.values import Family, MetricValue

MISSING = "—"
DIFFERENCE_UNITS = {"%": "points"}  # 2 % of what would be the question
TONES = {
    Outcome.OVER_OPTIMISED: "worse",
    Outcome.WORSE: "worse",
    Outcome.REWARD_WITHOUT_GOLD: "mixed",
    Outcome.PAID_FOR: "mixed",
    Outcome.ALIGNED: "better",
    Outcome.NO_GAIN: "flat",
    Outcome.UNDECIDED: "none",
    Outcome.NO_TEST: "none",
}


def format_number(value: float, decimals: int, *, signed: bool = False) -> str:
    """`value` with `decimals` places and a minus as long as the plus; never a signed zero.

    >>> format_number(-0.004, 2), format_number(3.14159, 2, signed=True), format_number(-3.14159, 1)
    ('0.00', '+3.14', '−3.1')
    """
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def format_value(value: float, low: float | None, high: float | None, decimals: int, *, signed: bool = False) -> str:
    """``value ± half width``, or ``value [low, high]`` where the interval leans by over a tenth of its half width.

    Args:
        value: the number.
        low: end of its interval; None where there is none.
        high: likewise.
        decimals: places at most; fewer where two digits of the half width take fewer.
        signed: with a plus sign, for differences.

    >>> format_value(191.587, 181.47, 201.71, 2), format_value(79.553, 79.41, 79.69, 2)
    ('192 ± 10', '79.55 ± 0.14')
    """
    if low is None or high is None:
        return format_number(value, decimals, signed=signed)
    half = (high - low) / 2
    places = places_worth(low, high, decimals)
    text = format_number(value, places, signed=signed)
    if abs((high + low) / 2 - value) > 0.1 * half:
        bounds = (format_number(bound, places, signed=signed) for bound in (low, high))
        return f"{text} [{', '.join(bounds)}]"
    width = format_number(half, places)
    return f"{text} ± {'<' + format_number(10.0**-places, places) if half > 0 and float(width) == 0 else width}"


def places_worth(low: float | None, high: float | None, decimals: int) -> int:
    """Decimal places that show two digits of an interval's half width, at most `decimals`.

    >>> places_worth(123.2, 132.7, 2), places_worth(181, 202, 2), places_worth(None, None, 2)
    (1, 0, 2)
    """
    if low is None or high is None or high <= low:
        return decimals
    return min(decimals, max(0, 1 - math.floor(math.log10((high - low) / 2))))


def ends(value: MetricValue) -> tuple[float | None, float | None]:
    """Of its interval; None where there is none."""
    return (value.interval.low, value.interval.high) if value.interval else (None, None)


def shown(value: MetricValue | None, column: Column) -> str:
    """A value as tables print it."""
    if value is None or value.value is None:
        return MISSING
    return format_value(value.value, *ends(value), column.decimals)


def shown_change(change: Delta) -> str:
    """A change with its arrow and sign, such as ``▼ −12.6 ± 1.9``; ``=`` stands where the interval holds no change."""
    arrow = change.arrow or ("=" if change.low is not None and not change.is_clear else "")
    return f"{arrow} {format_value(change.value, change.low, change.high, change.column.decimals, signed=True)}".strip()


def trend(change: Delta, trained: bool) -> str:
    """Beyond the interval "better" or "worse", of a reward that was trained on "higher" or "lower"; else ""."""
    if not (change.is_better or change.is_worse):
        return ""
    if trained:
        return "higher" if change.value > 0 else "lower"
    return "better" if change.is_better else "worse"


def plural(num: int, noun: str) -> str:
    """
    >>> plural(1, "prompt"), plural(2, "prompt")
    ('1 prompt', '2 prompts')
    """
    return f"{num} {noun}{'' if num == 1 else 's'}"


@lru_cache(maxsize=16)
def names(results: ResultSet) -> dict[Model, str]:
    """A short name for each model that no other has: its method, and what its own name adds to that of its method."""
    found = {model: _plain_name(model, results) for model in results.models}
    for more in (lambda model: model.sampler_label, lambda model: model.label):
        count = Counter(found.values())
        found = {model: text if count[text] == 1 else f"{text}, {more(model)}" for model, text in found.items()}
    return found


def _plain_name(model: Model, results: ResultSet) -> str:
    if model.method == EXTERNAL:
        return model.name
    variants = {variant(other) for other in results.models if other.method == model.method}
    return f"{model.method_label} {variant(model) if len(variants) > 1 else ''}".strip()


def variant(model: Model) -> str:
    """``b10`` of the runs ``rg_lcd-b10-s0``."""
    (name, *_), (seed, *_) = model.names, model.results
    return name.removesuffix(f"-s{seed}").removeprefix(model.method).strip("-_ ")


def samplers(results: ResultSet) -> str:
    """Sampler settings that no name holds, each once: ``Students: LCM, 4 steps, g 5. Teacher: DDIM, 50 steps, g 3.``"""
    plain = [model for model in results.models if model.sampler_label not in names(results)[model]]
    students = [model for model in plain if model.method != TEACHER]
    groups: dict[str, list[Model]] = {}
    for model in (*students, *(model for model in plain if model.method == TEACHER)):
        groups.setdefault(model.sampler_label, []).append(model)
    texts = []
    for setting, members in groups.items():
        alike = members == students and len(members) > 1
        texts.append(f"{'Students' if alike else ', '.join(names(results)[m] for m in members)}: {setting}.")
    return " ".join(texts)


@dataclass(frozen=True)
class Reading:
    """One model against its baseline.

    Attributes:
        title: whom against whom.
        label: the verdict in a few words.
        tone: of the label: "worse", "mixed", "better", "flat" or "none".
        sentence: what the verdict says; "" for nothing.
        facts: the changes in one metric of each family, then what happened along training.
    """

    title: str
    label: str
    tone: str
    sentence: str
    facts: tuple[str, ...]


def readings(results: ResultSet, verdicts: Sequence[Verdict]) -> list[Reading]:
    """One reading for each student that is not an LCD baseline itself."""
    return [_reading(results, model, verdicts) for model in results.models if model.method not in (TEACHER, LCD)]


def _reading(results: ResultSet, model: Model, verdicts: Sequence[Verdict]) -> Reading:
    own, base = verdicts_of(model, verdicts), results.baseline(model)
    title = names(results)[model] + (f" against {names(results)[base]}" if base else "")
    facts = [_fact(model, base, c) for c in _told(results, model) if delta(model, base, c)] if base else []
    if own:
        (outcome, count), *_ = Counter(verdict.outcome for verdict in own).most_common()
        label = outcome.value if count == len(own) else f"{outcome.value} ({count} of {len(own)} runs)"
        sentence = " ".join(verdict.words for verdict in own)
        return Reading(title, label, TONES[outcome], sentence, (*facts, *_along(results, model)))
    sentence = "" if base else f"{results.why_no_baseline(model)}."
    label = "not trained on a reward" if base else "nothing to compare with"
    return Reading(title, label, "none", sentence, (*facts, *_along(results, model)))


def verdicts_of(model: Model, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Verdicts on a model, or on runs of it, at its sampler settings."""
    used = {f"{result.head.model}/{result.head.generation.id}" for result in model.results.values()}
    return [each for each in verdicts if each.method == model.name and (not each.used or used & each.used.keys())]


def _told(results: ResultSet, model: Model) -> list[Column]:
    """The rewards that it was trained on, then the metric that stands for each family."""
    values = {column: value for column in results.columns if (value := model.value(column)) is not None}
    trained = results.trained_column(model)
    found = sorted((column for column, value in values.items() if value.in_sample), key=lambda c: c is not trained)
    for family in Family:
        own = [column for column, value in values.items() if column.family is family and not value.in_sample]
        found += lead_columns(own)[:1]
    return found


def lead_columns(columns: Iterable[Column]) -> list[Column]:
    """Columns with those first that verdicts declare, in the order of the declaration."""
    declared = [metric for question in QUESTIONS for metric in question.metrics]
    return sorted(columns, key=lambda c: declared.index(c.metric) if c.metric in declared else len(declared))


def _fact(model: Model, base: Model, column: Column) -> str:
    """Such as ``HPS (trained on, †): ▲ +2.33 ± 0.17, 79.46 → 81.79, higher on 92 % [91, 94] of the prompts.``"""
    change, value = delta(model, base, column), model.value(column)
    assert change is not None and value is not None, "the caller asks for a change"
    places = places_worth(change.low, change.high, column.decimals)
    ends = " → ".join(format_number(end, places) for end in (change.base, change.model))
    text = f"{shown_change(change)}, {ends} {column.unit}".rstrip()
    if not value.in_sample:
        if column.reference and column.has_good_end and change.arrow:
            text += ", nearer to real" if change.is_better else ", further from real"
        return f"{column.label}: {text}."
    wins = win_rate(model, base, column)
    if wins is not None:
        rate, low, high = (f"{100 * share:.0f}" for share in (wins.rate, wins.interval.low, wins.interval.high))
        text += f", higher on {rate} % [{low}, {high}] of the prompts"
    return f"{column.label} (trained on, †): {text}."


def _along(results: ResultSet, model: Model) -> Iterator[str]:
    """What happened along training: each run's hack step, or that there is none; how good the latent proxy was."""
    for run in runs_of(results, model):
        gold = gold_of(run)
        if run.proxy is None or gold is None:
            continue
        hack = run.hack(gold)
        if hack is None:
            yield (
                f"Along training, {run.name}, {plural(len(run.points), 'step')} evaluated: at none does {gold.label} "
                f"clearly peak while {run.proxy.label} still rises."
            )
            continue
        stretch = f" ({hack.first} to {hack.end})" if hack.first != hack.end else ""
        changes = [f"{change.column.label} {shown_change(change)}" for change in (hack.loss, hack.gain)]
        yield (
            f"Along training, {run.name}: hack step {hack.step}{stretch}{' or before' if hack.censored else ''}; from "
            f"there to step {hack.last}: {', '.join(changes)}."
        )
    accuracy = proxy_accuracy(model)
    if accuracy is not None:
        low, high = (f"{100 * share:.1f}" for share in (accuracy.low, accuracy.high))
        yield f"The latent proxy orders {low} to {high} % of the training pairs as its expert does; 50 % is chance."


@lru_cache(maxsize=16)
def runs_along(results: ResultSet) -> tuple[TrainingRun, ...]:
    """Every run whose last step is a model's and whose checkpoints were evaluated."""
    return tuple(run for run in training_runs(results) if run.model is not None)


def runs_of(results: ResultSet, model: Model) -> list[TrainingRun]:
    """Those of one model."""
    return [run for run in runs_along(results) if list(run.points.values())[-1] in model.results.values()]


def model_of(results: ResultSet, run: TrainingRun) -> Model:
    """The model that a run is a training seed of."""
    return next(model for model in results.models if run in runs_of(results, model))


def gold_of(run: TrainingRun) -> Column | None:
    """What the run is held against: what verdicts declare as gold, else its first oracle or held-out reward."""
    return next(iter(lead_columns(run.golds)), None)
