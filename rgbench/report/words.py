"""Words of the report: values with their intervals, changes with sign and arrow, names of models, sentences.

Numbers show two digits of half their interval and no more; a value that is missing is "—".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rgbench.judge.compare import win_rate
from rgbench.judge.models import EXTERNAL, LCD, TEACHER, Column, Model, ResultSet
from rgbench.judge.paired import MIN_SPREAD, Delta, delta
from rgbench.judge.trajectory import TrainingRun, training_runs
from rgbench.judge.verdict import (
    BOTH_WAYS,
    GOLD,
    MIN_SEEDS,
    QUESTIONS,
    REWARD,
    Finding,
    Outcome,
    Verdict,
    proxy_accuracy,
)
from rgbench.metrics.values import Direction, Family, MetricValue

MISSING = "—"
ARROWS = {Direction.HIGHER: "↑", Direction.LOWER: "↓", Direction.REFERENCE: "→0"}  # where a metric's good end is
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
ANSWERS = {
    Outcome.NO_TEST: "its latent proxy did not follow the reward, so it tests nothing",
    Outcome.OVER_OPTIMISED: "the student learned to please the reward model: the reward rose, the images got worse",
    Outcome.ALIGNED: "the images got better: the reward rose, and so did gold",
    Outcome.PAID_FOR: "the images got better by gold, at the cost of {worse}",
    Outcome.REWARD_WITHOUT_GOLD: "the student learned to please the reward model: the reward rose, gold did not",
    Outcome.WORSE: "the reward and gold both fell",
    Outcome.NO_GAIN: "the reward did not rise",
    Outcome.UNDECIDED: "these runs do not decide it",
}
BASES = {  # what the interval of a change rests on, by Delta.basis
    "seeds": "paired over {} common training seeds",
    "spread": "one run against the spread of {} training seeds",
    "images": "paired over {} prompts",
    "jackknife": "paired, leaving out {} groups of prompts in turn",
    "quadrature": "not paired",
}
MAX_SETTINGS = 3  # of a recipe in a model's name


def answer_words(outcome: Outcome, worse: Sequence[str]) -> str:
    """What an outcome answers; ``worse`` names the questions other than gold whose metrics got worse."""
    return ANSWERS[outcome].format(worse=" and ".join(worse).lower())


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


def shown_finding(finding: Finding, column: Column) -> str:
    """A tested change with its arrow, sign and unit, such as ``▼ Oracle, all right −12.6 ± 1.9 points``.

    One that was tested for worse alone, and is not, has no mark but its better direction: ``Recall ↑ +0.02 ± 0.03``.
    """
    change = format_value(finding.change, finding.low, finding.high, column.decimals, signed=True)
    if finding.says or finding.question in BOTH_WAYS:
        arrow = {"up": "▲", "": "="}.get(finding.says, "▼")
        label = f"{arrow} {column.label}"
    else:
        label = f"{column.label} {ARROWS[column.info.direction]}"
    return f"{label} {change} {DIFFERENCE_UNITS.get(column.unit, column.unit)}".strip()


def about_value(value: MetricValue, column: Column) -> str:
    """A value as a reader hovers over it: with its interval, how that was made, and what was measured."""
    assert value.value is not None, "the caller has a value to show"
    parts = [f"{column.label}: {format_number(value.value, column.decimals)} {column.unit}".rstrip()]
    if value.interval is not None:
        low, high = (format_number(end, column.decimals) for end in ends(value) if end is not None)
        parts.append(f"95 % interval {low} to {high} ({value.interval.method})")
    each = " of each training seed" if "seeds" in value.extra else ""
    return "; ".join([*parts, f"{plural(value.num_images, 'image')}{each}", *_measured_on(column)])


def about_change(change: Delta) -> str:
    """A change as a reader hovers over it: from what to what, its interval, and what that rests on."""
    column, basis = change.column, BASES.get(change.basis, "").format(change.num_pairs)
    base, model = (format_number(end, column.decimals) for end in (change.base, change.model))
    parts = [f"{column.label}: {base} → {model} {column.unit}".rstrip()]
    if change.low is not None and change.high is not None:
        low, high = (format_number(end, column.decimals, signed=True) for end in (change.low, change.high))
        parts.append(f"95 % interval of the change {low} to {high} ({basis})")
    return "; ".join([*parts, *_measured_on(column)])


def about_finding(finding: Finding, column: Column) -> str:
    """A tested change as a reader hovers over it: from what to what, and its corrected p."""
    base, model = (format_number(end, column.decimals) for end in (finding.base, finding.model))
    change = f"{column.label}: {base} → {model} {column.unit}".rstrip()
    return "; ".join([change, f"p = {finding.adjusted:.2g} after correction", *_measured_on(column)])


def _measured_on(column: Column) -> Iterator[str]:
    """The protocol in words: its prompts and noise, and its real images."""
    prompts, seeds, reference = (column.protocol.fields.get(key) for key in ("prompts", "seeds", "reference"))
    if isinstance(prompts, Mapping) and prompts.get("num"):
        noise = f", noise seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
        yield f"{plural(prompts['num'], 'prompt')} of {prompts.get('name', 'a list')}{noise}"
    if isinstance(reference, Mapping) and reference.get("kind"):
        yield f"against {reference['kind']}"


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
    """A short name for each model that no other has: its label, or its method and what differs within it."""
    found = {model: _plain_name(model, results) for model in results.models}
    for more in (lambda model: model.sampler_label, lambda model: model.label):
        count = Counter(found.values())
        found = {model: text if count[text] == 1 else f"{text}, {more(model)}" for model, text in found.items()}
    return found


def _plain_name(model: Model, results: ResultSet) -> str:
    if given := next((results.labels[name] for name in (model.name, *model.names) if name in results.labels), ""):
        return given
    if model.method == EXTERNAL:
        return model.name
    own = variant(model, results)
    alone = len({variant(other, results) for other in results.models if other.method == model.method}) == 1
    return model.method_label if alone or not own else f"{model.method_label}, {own}"


def variant(model: Model, results: ResultSet) -> str:
    """What differs between recipes of its method: ``share .5``; without recipes, ``b10`` of ``rg_lcd-b10-s0``."""
    recipes = [other.first.head.recipe for other in results.models if other.method == model.method]
    every = dict.fromkeys(key for recipe in recipes for key in recipe)
    keys = [key for key in every if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]
    if all(recipes) and 0 < len(keys) <= MAX_SETTINGS:
        own = {key.rpartition(".")[2].replace("_", " "): model.first.head.recipe.get(key) for key in keys}
        return ", ".join(f"{key} {_setting(value)}" for key, value in own.items() if value is not None)
    (name, *_), (seed, *_) = model.names, model.results
    return name.removesuffix(f"-s{seed}").removeprefix(model.method).strip("-_ ")


def _setting(value: Any) -> str:
    """A value of a recipe: ``.5`` for 0.5."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


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
        texts.append(f"{'Students' if alike else '; '.join(names(results)[m] for m in members)}: {setting}.")
    return " ".join(texts)


@dataclass(frozen=True)
class Reading:
    """One model against its baseline, or the teacher where there is none.

    Attributes:
        model: that is read.
        title: whom against whom.
        label: the verdict in a few words.
        tone: of the label: "worse", "mixed", "better", "flat" or "none".
        answer: one sentence.
        words: what the verdict says, and what would give one; "" for nothing.
        facts: the changes in one metric of each family, then what happened along training.
    """

    model: Model
    title: str
    label: str
    tone: str
    answer: str
    words: str
    facts: tuple[str, ...]


def readings(results: ResultSet, verdicts: Sequence[Verdict]) -> list[Reading]:
    """One reading for each student that is not an LCD baseline itself."""
    return [_reading(results, model, verdicts) for model in results.models if model.method not in (TEACHER, LCD)]


def _reading(results: ResultSet, model: Model, verdicts: Sequence[Verdict]) -> Reading:
    own, alike = verdicts_of(model, verdicts), results.baseline(model)
    base = alike or results.teacher
    title = names(results)[model] + (f" against {names(results)[base]}" if base else "")
    told = [column for column in _told(results, model) if base and delta(model, base, column)]
    tested = {(each.metric, each.protocol): each for verdict in own[:1] for each in verdict.findings}
    facts = (
        *(f"{_fact(model, base, column, tested.get(column.key))}." for column in told if base),
        *_along(results, model),
    )
    words = [verdict.words for verdict in own]
    if alike is None:
        words.append(f"{'Compared with the teacher' if base else 'Not compared'}: {results.why_no_baseline(model)}.")
    if not own:
        label = "not trained on a reward" if base else "nothing to compare with"
        return Reading(model, title, label, "none", " ".join(facts[:2]), " ".join(words), facts)
    (outcome, count), *_ = Counter(verdict.outcome for verdict in own).most_common()
    label = outcome.value if count == len(own) else f"{outcome.value} ({count} of {len(own)} runs)"
    answer = _answer(results, next(verdict for verdict in own if verdict.outcome is outcome))
    if all(verdict.rule == "none" for verdict in own):
        remedy = to_decide(results, model) or f"{own[0].decides[:1].upper()}{own[0].decides[1:]}."
        label, answer = "no verdict yet", " ".join((*facts[:2], remedy))
    return Reading(model, title, label, TONES[outcome], answer, " ".join(words), facts)


def _answer(results: ResultSet, verdict: Verdict) -> str:
    """The verdict in one sentence, with the changes of the trained reward and of gold."""
    columns = {column.key: column for column in results.columns}
    found = [finding for finding in verdict.findings if finding.question in (REWARD.name, GOLD.name)]
    changes = ", ".join(shown_finding(finding, columns[finding.metric, finding.protocol]) for finding in found)
    text = answer_words(verdict.outcome, [each.question for each in verdict.findings if each.says == "worse"])
    return f"{text[0].upper()}{text[1:]} ({changes})."


def to_decide(results: ResultSet, model: Model) -> str:
    """The command that trains the LCD seeds which a verdict lacks; "" where it lacks none, or no more of them help."""
    base = results.baseline(model)
    have = base.results if base is not None and base.method == LCD else {}
    if results.twice(model) or (base is not None and results.twice(base)):
        return ""
    num = (MIN_SPREAD if len(model.results) == 1 else MIN_SEEDS) - len(have)
    if num <= 0:
        return ""
    seeds = " ".join([str(seed) for seed in range(MIN_SEEDS + num) if seed not in have][:num])
    steps = f" train.steps={model.budget['steps']}" if "steps" in model.budget else ""
    recipe = {"benchtop": "lcd", "benchtop-flow": "benchtop-flow/lcd"}.get(results.world, "LCD_RECIPE")
    return (
        f"For a verdict train {plural(num, 'more seed' if have else 'seed')} of LCD and evaluate them alike: "
        f"for s in {seeds}; do rgbench train {recipe}{steps} seed=$s; done."
    )


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


def _fact(model: Model, base: Model, column: Column, tested: Finding | None) -> str:
    """Such as ``HPS (trained on, †): ▲ +2.33 ± 0.17, 79.46 → 81.79, higher on 92 % [91, 94] of the prompts``.

    Args:
        model: that changed.
        base: against which.
        column: what changed.
        tested: what the verdict's test says of it; where it finds no fall, that is said.
    """
    change, value = delta(model, base, column), model.value(column)
    assert change is not None and value is not None, "the caller asks for a change"
    places = places_worth(change.low, change.high, column.decimals)
    ends = " → ".join(format_number(end, places) for end in (change.base, change.model))
    text = f"{shown_change(change)}, {ends} {column.unit}".rstrip()
    if not value.in_sample:
        if column.reference and column.has_good_end and change.arrow:
            text += ", nearer to real" if change.is_better else ", further from real"
        if change.is_worse and tested is not None and not tested.says:
            text += ", not significant among all declared metrics"
        return f"{column.label}: {text}"
    wins = win_rate(model, base, column)
    if wins is not None:
        rate, low, high = (f"{100 * share:.0f}" for share in (wins.rate, wins.interval.low, wins.interval.high))
        text += f", higher on {rate} % [{low}, {high}] of the prompts"
    return f"{column.label} (trained on, †): {text}"


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
    if worth := proxy_words(model):
        yield worth


def proxy_words(model: Model) -> str:
    """What the latent proxy was worth along training; "" where there is none."""
    accuracy = proxy_accuracy(model)
    if accuracy is None:
        return ""
    low, high = (f"{100 * share:.1f}" for share in (accuracy.low, accuracy.high))
    than = "no better" if accuracy.low <= 0.5 else "better"
    return (
        f"The latent proxy orders pairs {than} than chance: {low} to {high} % of the training pairs as its expert "
        "does, where 50 % is chance."
    )


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
