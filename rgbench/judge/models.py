"""Models and columns of a results folder.

Which runs are seeds of one method, what was measured under one protocol, which runs had equal budgets and which LCD
student a model is compared with is decided here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from rgbench.core.errors import UsageError, suggest
from rgbench.core.progress import Track, untracked
from rgbench.evaluate.results import ModelResult, load_results
from rgbench.metrics.statistics import LEVEL, t_interval
from rgbench.metrics.values import (
    Direction,
    Family,
    Interval,
    MetricInfo,
    MetricValue,
    Protocol,
    metric_info,
    shipped_infos,
)
from rgbench.rewards.base import fingerprint_id

TEACHER, LCD, EXTERNAL = "teacher", "lcd", "external"
METHODS = {TEACHER: "Teacher", LCD: "LCD", "rg_lcd": "RG-LCD", "lrm": "LRM"}
METHODS |= {"tcd": "TCD", "rg_tcd": "RG-TCD", "lrm_tcd": "LRM on TCD"}
METHODS |= {
    "mlcm": "MLCM",
    "rg_mlcm": "RG-MLCM",
    "lrm_mlcm": "LRM on MLCM",
    "weighted": "Weighted",
    "vsd": "VSD",
    "dollar": "DOLLAR",
    EXTERNAL: "External",
}
SEED_IN_NAME = re.compile(r"-s(\d+)$")

Key = tuple[str, str]  # metric, protocol id


@dataclass(frozen=True, eq=False)
class Column:
    """One metric under one protocol.

    Attributes:
        metric: name.
        protocol: how it was measured.
        info: label, unit, direction, family, decimals.
        reference: "real" where values are differences to real images, else None.
        distinct: what tells it from another column of the metric, such as ``n = 8``.
    """

    metric: str
    protocol: Protocol
    info: MetricInfo
    reference: str | None
    distinct: str = ""

    @property
    def key(self) -> Key:
        """Metric and protocol id."""
        return self.metric, self.protocol.id

    @property
    def label(self) -> str:
        """The metric's label; of differences to real images with "gap"."""
        label = f"{self.info.label} gap" if self.reference else self.info.label
        return f"{label}, {self.distinct}" if self.distinct else label

    @property
    def unit(self) -> str:
        return self.info.unit

    @property
    def decimals(self) -> int:
        return self.info.decimals

    @property
    def family(self) -> Family:
        return self.info.family

    @property
    def has_good_end(self) -> bool:
        """Whether better and worse are known: not for a distance to unknown, or to lossy, real images."""
        if self.info.direction is not Direction.REFERENCE:
            return True
        images = self.protocol.fields.get("reference")
        lossy = isinstance(images, dict) and images.get("lossy") is True
        return self.reference is not None and not lossy

    def oriented(self, value: float) -> float | None:
        """The value with its sign set so that higher is better; None where no good end is known."""
        if not self.has_good_end:
            return None
        if self.info.direction is Direction.REFERENCE:
            return -abs(value)
        return value if self.info.direction is Direction.HIGHER else -value

    @property
    def reward_fields(self) -> Mapping[str, Any] | None:
        """Fingerprint of the reward whose mean score this is; None of other metrics."""
        found = self.protocol.fields.get("reward")
        scored = self.family in (Family.REWARD, Family.HELD_OUT)
        return found if scored and isinstance(found, dict) else None


@dataclass(frozen=True, eq=False)
class Model:
    """One method at one recipe and one sampler setting, with its training seeds.

    Attributes:
        method: "teacher", a trainer's kind, or "external".
        name: of its runs, without the training seed.
        recipe_sha256: of its recipe; None where it is unknown.
        sampling: sampler settings, which its images were made with.
        results: by training seed, ascending; of a model that has none, by None.
        distinct: what tells it from another of the same label: sampler settings, or a generation id.
    """

    method: str
    name: str
    recipe_sha256: str | None
    sampling: Mapping[str, Any]
    results: Mapping[int | None, ModelResult]
    distinct: str = ""

    @property
    def first(self) -> ModelResult:
        """The result of the first seed, for what all share."""
        return next(iter(self.results.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the runs."""
        return tuple(result.head.model for result in self.results.values())

    @property
    def method_label(self) -> str:
        return METHODS.get(self.method, self.method)

    @property
    def label(self) -> str:
        """Such as ``lcd-b0, 16 seeds``, or the one run's name."""
        label = f"{self.name}, {len(self.results)} seeds" if len(self.results) > 1 else self.names[0]
        return f"{label} ({self.distinct})" if self.distinct else label

    @property
    def sampler_label(self) -> str:
        """Such as ``LCM, 4 steps, g 5``."""
        sampler = str(self.sampling.get("sampler") or "")
        parts = [sampler.upper() if sampler.islower() else sampler]
        if (steps := self.sampling.get("steps")) is not None:
            parts.append(f"{steps} step{'s' if steps != 1 else ''}")
        if (guidance := self.sampling.get("guidance_scale")) is not None:
            parts.append(f"g {guidance:g}")
        if (gamma := self.sampling.get("gamma")) is not None:
            parts.append(f"γ {gamma:g}")
        return ", ".join(part for part in parts if part) or "—"

    @property
    def budget(self) -> dict[str, int]:
        """Training steps, and whatever else a result says of the budget."""
        return {key: value for key, value in self.first.head.training.items() if key != "step"}

    @property
    def trained_rewards(self) -> tuple[str, ...]:
        """Fingerprint ids of the rewards it was trained on."""
        return self.first.head.trained_rewards

    def run(self, name: str) -> Model:
        """The one run of a name; the model itself where that is its own name."""
        if name == self.name or name not in self.names:
            return self
        chosen = {seed: result for seed, result in self.results.items() if result.head.model == name}
        return replace(self, results=chosen)

    def result(self, column: Column, seed: int | None) -> MetricValue | None:
        """The value of one training seed; None where there is none or it is undefined."""
        found = self.results[seed].by_key.get(column.key) if seed in self.results else None
        return found if found is not None and found.value is not None else None

    def seeds(self, column: Column) -> list[int | None]:
        """Training seeds that have a value."""
        return [seed for seed in self.results if self.result(column, seed) is not None]

    def value(self, column: Column) -> MetricValue | None:
        """One run's own value; of several seeds their mean, with a t interval over seeds and ``extra["seeds"]``."""
        found = [value for seed in self.results if (value := self.result(column, seed)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        mean, low, high = t_interval([float(value.value or 0) for value in found])
        return MetricValue(
            metric=column.metric,
            protocol=column.protocol,
            value=mean,
            interval=Interval(low=low, high=high, level=LEVEL, method=f"t over {len(found)} training seeds"),
            num_images=found[0].num_images,
            reference=column.reference,
            flags=tuple(sorted({flag for value in found for flag in value.flags})),
            in_sample=any(value.in_sample for value in found),
            extra={"seeds": len(found)},
        )


@dataclass(frozen=True, eq=False)
class ResultSet:
    """Everything that was measured in one world.

    Attributes:
        world: name.
        models: teacher first, then LCD and what is compared with it.
        columns: in the order of tables.
        checkpoints: results of runs before their last step, which belong to no model.
        shown: keys of the columns that say something of models, not of training alone.
        base: name of the model that all others are compared with; None for the LCD students of equal budget.
        labels: names to show in place of their own, by name of a model.
    """

    world: str
    models: tuple[Model, ...]
    columns: tuple[Column, ...]
    checkpoints: tuple[ModelResult, ...] = ()
    shown: frozenset[Key] = frozenset()
    base: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> Model | None:
        """The teacher at its most steps."""
        found = [model for model in self.models if model.method == TEACHER]
        return max(found, key=lambda model: model.sampling.get("steps") or 0, default=None)

    def baseline(self, model: Model, name: str | None = None) -> Model | None:
        """The model of equal budget and sampler without a reward: the LCD students, or those of a name.

        Of several the one that shares most training seeds, then ``lcd``, then the first by name. A teacher or a model
        trained elsewhere that is asked for by name needs no equal budget or sampler, only images of equal size.

        Args:
            model: that is compared.
            name: of the base, without or with training seed; by default :attr:`base`.
        """
        name = name or self.base
        if name is None:
            able = [base for base in self.models if base.method == LCD and model.method != LCD]
        else:
            able = [base for base in self.models if name in (base.name, *base.names)]
        fitting = [base for base in able if base is not model and not unlike(model, base)]
        best = min(fitting, key=lambda base: _base_rank(model, base), default=None)
        return best.run(name) if best is not None and name else best

    def why_no_baseline(self, model: Model, name: str | None = None) -> str:
        """Why :meth:`baseline` is None, and what would mend it."""
        name = name or self.base
        able = [base for base in self.models if (name in (base.name, *base.names) if name else base.method == LCD)]
        able = [base for base in able if base is not model]
        if not able:
            if name:
                known = {known for base in self.models for known in (base.name, *base.names)} - {model.name}
                return f"no model {name!r} in world {self.world}; {suggest(name, known)}"
            return f"no LCD student in world {self.world}; train one with the same steps, evaluate it, or name --base"
        reasons = "; ".join(f"{base.name}: {unlike(model, base)}" for base in able[:3])
        return f"nothing to compare {model.name} with ({reasons}); train and evaluate one alike"

    def column(self, *names: str) -> Column | None:
        """The column of the first metric among ``names`` that was measured; the one that most models have."""
        for name in names:
            if found := [column for column in self.columns if column.metric == name]:
                return max(found, key=self.num_models)
        return None

    def num_models(self, column: Column) -> int:
        """Models that have a value; 0 of a column of training alone."""
        return sum(bool(model.seeds(column)) for model in self.models) if column.key in self.shown else 0

    def trained_column(self, model: Model) -> Column | None:
        """The reward that a model was trained on; where only another resize of it was measured, that.

        Of several columns the one of most training seeds, then of most prompts.
        """
        able = [column for column in self.columns if model.seeds(column) and column.reward_fields is not None]
        exact = [column for column in able if fingerprint_id(dict(column.reward_fields or {})) in model.trained_rewards]
        near = [column for column in able if any(v.in_sample for v in _values(model, column))]
        return max(exact or near, key=lambda c: (len(model.seeds(c)), _num_prompts(c) or 0), default=None)

    def trained_reward(self) -> Column | None:
        """The reward that most models were trained on; without any, the first reward column."""
        trained = [column for model in self.models if (column := self.trained_column(model)) is not None]
        if trained:
            return max(self.columns, key=trained.count)
        return next((column for column in self.columns if column.family is Family.REWARD), None)

    def same_reward(self, column: Column) -> tuple[Column, ...]:
        """Columns that score by the weights of a reward column, whatever their resize."""

        def weights(fields: Mapping[str, Any]) -> tuple[Any, Any]:
            return fields.get("name"), fields.get("weights_sha256")

        own = column.reward_fields
        if own is None:
            return (column,)
        return tuple(
            c for c in self.columns if c.reward_fields is not None and weights(c.reward_fields) == weights(own)
        )

    def only(self, names: Sequence[str]) -> ResultSet:
        """The models of some names, without or with seed, and what each is compared with."""
        chosen = [model for model in self.models if {model.name, *model.names} & set(names)]
        kept = {*chosen, *(base for model in chosen if (base := self.baseline(model) or self.teacher))}
        runs = {name for model in kept for name in model.names}
        return replace(
            self,
            models=tuple(model for model in self.models if model in kept),
            checkpoints=tuple(result for result in self.checkpoints if result.head.model in runs),
        )

    def twice(self, model: Model) -> tuple[str, ...]:
        """Runs of a model that have two results of one training seed, which keep all its seeds apart."""
        alike = [m for m in self.models if (m.name, m.recipe_sha256) == (model.name, model.recipe_sha256)]
        names = [name for m in alike if m.sampling == model.sampling for name in m.names]
        return tuple(name for name in dict.fromkeys(names) if names.count(name) > 1)

    def has(self, name: str) -> bool:
        """Whether a model or run of that name is here."""
        return any(name in (model.name, *model.names) for model in self.models)

    def find(self, name: str) -> tuple[Model, ...]:
        """Models of a name, without or with training seed; with one, of that run alone.

        Raises:
            UsageError: none.
        """
        found = tuple(model.run(name) for model in self.models if name in (model.name, *model.names))
        if not found:
            known = {known for model in self.models for known in (model.name, *model.names)}
            raise UsageError(f"no finished model {name!r} in world {self.world}; {suggest(name, known)}")
        return found


def load_result_sets(root: Path, track: Track = untracked) -> list[ResultSet]:
    """Read every result under a folder; one set a world, by name.

    Args:
        root: the results folder.
        track: shows the reading.

    Raises:
        UsageError: no folder, no results, or one that cannot be read.
    """
    loaded = load_results(root, track) if root.is_dir() else []
    if not loaded:
        raise UsageError(f"{root}: no results here; run `rgbench eval` first, or name the folder that has them")
    ordered = sorted(loaded, key=lambda result: result.head.world)
    return [result_set(list(members)) for _, members in groupby(ordered, key=lambda result: result.head.world)]


def result_set(results: Sequence[ModelResult]) -> ResultSet:
    """The models and columns of one world's results."""
    finished = [result for result in results if not result.is_checkpoint]
    groups: dict[tuple[str, ...], list[ModelResult]] = {}
    for result in finished:
        groups.setdefault(_method_key(result), []).append(result)
    models = _told_apart([model for members in groups.values() for model in _models(members)])
    columns: dict[Key, Column] = {}
    for result in results:
        for value in result.values:
            if value.key not in columns:
                info = metric_info(value.metric, result.head.metrics)
                columns[value.key] = Column(value.metric, value.protocol, info, value.reference)
    shown = {value.key for result in finished for value in _of_models(result, results)}
    for key, column in columns.items():  # images of checkpoints have no say in the names of models' columns
        others = [other for name, other in columns.items() if name in shown or name == key]
        columns[key] = replace(column, distinct=_distinct(column, others))
    families, order = list(Family), {name: place for place, name in enumerate(shipped_infos())}
    return ResultSet(
        world=results[0].head.world,
        models=tuple(sorted(models, key=_rank)),
        columns=tuple(
            sorted(
                columns.values(),
                key=lambda c: (families.index(c.family), order.get(c.metric, len(order)), _num_prompts(c) or 0, c.key),
            )
        ),
        checkpoints=tuple(result for result in results if result.is_checkpoint),
        shown=frozenset(shown),
    )


def _of_models(result: ModelResult, results: Sequence[ModelResult]) -> Iterator[MetricValue]:
    """Values of a finished run, without those that only end the curve of its checkpoints.

    They are measured as the checkpoints were, beside the same metric measured otherwise.
    """
    same = [other for other in results if other.is_checkpoint and other.head.model == result.head.model]
    along = {key for other in same for key in other.by_key}
    own = {value.metric for value in result.values if value.key not in along}
    yield from (value for value in result.values if value.key not in along or value.metric not in own)


def unlike(model: Model, base: Model) -> str:
    """What forbids to compare two models, in words; "" where nothing does."""
    if base.method in (TEACHER, EXTERNAL):
        sides = [m.sampling.get("resolution") for m in (model, base)]
        return "" if sides[0] == sides[1] else f"images of {sides[1]} px, not {sides[0]}"
    for key in model.budget.keys() & base.budget.keys():
        if model.budget[key] != base.budget[key]:
            return f"trained for {base.budget[key]} {key}, not {model.budget[key]}"
    if _canonical(model.sampling) != _canonical(base.sampling):
        return f"sampled with {base.sampler_label}, not {model.sampler_label}"
    return ""


def sampling_of(result: ModelResult) -> dict[str, Any]:
    """The generation's fields without the weights, or the given images: what training seeds of one method share.

    Of a student whose recipe is known, its hash covers the teacher's configurations; those of the exported folder are
    written by libraries, and another version of one writes the same settings otherwise.
    """
    own = ["weights_sha256", "images_sha256", *(["config_sha256"] if result.head.recipe_sha256 else [])]
    return {key: value for key, value in result.head.generation.fields.items() if key not in own}


def seed_of(result: ModelResult) -> int | None:
    """The training seed; of a model trained elsewhere, what its name says: 3 of ``mine-s3``."""
    named = SEED_IN_NAME.search(result.head.model) if result.head.method == EXTERNAL else None
    return int(named[1]) if named else result.head.training_seed


def _method_key(result: ModelResult) -> tuple[str, ...]:
    """What training seeds of one method share: recipe, sampler, and NAME where they are called ``NAME-s{seed}``."""
    head, stem = result.head, _stem(result)
    recipe = head.recipe_sha256 or f"{stem} {head.training.get('steps')}"
    return head.method, recipe, stem if stem != head.model else "", _canonical(sampling_of(result))


def _models(results: Sequence[ModelResult]) -> list[Model]:
    """One model of several seeds; where a seed was run twice, one of each run."""
    return [_model(results)] if _one_a_seed(results) else [_model([each]) for each in results]


def _model(results: Sequence[ModelResult]) -> Model:
    ordered = sorted(results, key=_order)
    head, by_seed = ordered[0].head, {seed_of(result): result for result in ordered}
    return Model(head.method, _stem(ordered[0]), head.recipe_sha256, sampling_of(ordered[0]), by_seed)


def _told_apart(models: Sequence[Model]) -> list[Model]:
    """Models whose labels differ: by sampler settings where they must, else by generation id."""
    found = list(models)
    for about in (lambda m: m.sampler_label, lambda m: m.first.head.generation.id):
        labels = [model.label for model in found]
        found = [replace(m, distinct=about(m)) if labels.count(m.label) > 1 else m for m in found]
    return found


def _one_a_seed(results: Sequence[ModelResult]) -> bool:
    return len({seed_of(result) for result in results}) == len(results)


def _distinct(column: Column, columns: Iterable[Column]) -> str:
    """``n = 8``, where columns of one metric differ in how many prompts they took."""
    counts = {_num_prompts(other) for other in columns if other.metric == column.metric}
    return f"n = {_num_prompts(column)}" if len(counts) > 1 and None not in counts else ""


def _num_prompts(column: Column) -> int | None:
    prompts = column.protocol.fields.get("prompts")
    return prompts.get("num") if isinstance(prompts, Mapping) else None


def _stem(result: ModelResult) -> str:
    seed = seed_of(result)
    return result.head.model if seed is None else result.head.model.removesuffix(f"-s{seed}")


def _order(result: ModelResult) -> tuple[Any, ...]:
    seed = seed_of(result)
    return seed is not None, seed or 0, result.head.model, result.head.generation.id


def _rank(model: Model) -> tuple[Any, ...]:
    order = list(METHODS)
    method = order.index(model.method) if model.method in order else len(order)
    steps = model.sampling.get("steps") or 0
    return method, model.name, -steps if model.method == TEACHER else steps, _canonical(model.sampling)


def _base_rank(model: Model, base: Model) -> tuple[Any, ...]:
    common = len(base.results.keys() & model.results.keys())
    other = base.sampling != model.sampling
    return other, -common, base.name != LCD, -(base.sampling.get("steps") or 0), base.name


def _values(model: Model, column: Column) -> Iterable[MetricValue]:
    return (value for seed in model.results if (value := model.result(column, seed)) is not None)


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)
