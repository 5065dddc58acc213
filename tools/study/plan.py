"""Studies: arms × training seeds, declared in a file before they are run, and cut into units of work.

A unit is one command of ``rgbench``, of at most some ten minutes on one thread:

    train   the run of one arm and seed; resumes at its newest checkpoint
    eval    its images, measured
    along   the images of its checkpoints
    draws   several images of each prompt, for best-of-n

What a unit leaves says that it is done: an arm whose results are there already is neither trained nor measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rgbench.core.config import Section, load_yaml, validate
from rgbench.core.errors import UsageError, suggest
from rgbench.core.run import RunDirectory
from rgbench.evaluate.config import parse_seeds
from rgbench.evaluate.results import load_result
from rgbench.evaluate.targets import FINISHED
from rgbench.judge.verdict import GOLD
from rgbench.metrics.values import MetricValue
from rgbench.train.recipe import load_recipe

GOLD_NAME = "gold"  # in a study: the first of the verdict's gold metrics
BEST_OF_N = "best_of_n"  # in a contrast: the base's best of n images, at the reward that the model reached
KEPT_IMAGES = 64  # of the first seed of each arm, for the report's grids
Kind = Literal["train", "eval", "along", "draws"]
# Seconds of one thread, measured on this world with two runs side by side; of units that are not measured yet.
SECONDS = {"lcd": 190.0, "rg_lcd": 330.0, "lrm": 480.0, "eval": 200.0, "along": 250.0, "draws": 250.0}

Names = Annotated[tuple[str, ...], Field(strict=False)]
Line = tuple[str, str]


class Arm(Section):
    """A recipe with its changes; its key names the runs, ``KEY-s{seed}``.

    Attributes:
        recipe: packaged recipe.
        set: overrides, ``key=value``.
        seeds: training seeds, such as ``0-5``.
        along: training seed whose checkpoints are measured as well.
        steps: of the sampler, at which its images are measured beside the recipe's own.
    """

    recipe: str
    set: Names = ()
    seeds: str
    along: int | None = None
    steps: Annotated[tuple[int, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _one_of_the_seeds(self) -> Arm:
        if self.along is not None and self.along not in parse_seeds(self.seeds):
            raise ValueError(f"along {self.along}: not one of the seeds {self.seeds}")
        return self


class Images(Section):
    """Images of one kind of unit, and what is measured of them.

    Attributes:
        num: prompts.
        seeds: noise seeds; one image of each prompt and seed.
        metrics: for ``--metric``.
        reads: metric values that the analysis reads.
        set: overrides of the run, so that its checkpoints are there.
    """

    num: Annotated[int, Field(ge=1)]
    seeds: str = "0"
    metrics: Names
    reads: Names
    set: Names = ()

    def hold(self, value: MetricValue) -> bool:
        """Whether a value is of these images."""
        seeds = parse_seeds(self.seeds)
        return value.num_images == self.num * len(seeds) and value.protocol.fields.get("seeds", [0]) == seeds

    @property
    def wanted(self) -> list[str]:
        """Names of the values that the analysis reads."""
        return [GOLD.metrics[0] if name == GOLD_NAME else name for name in self.reads]


class Contrast(Section):
    """A difference of two arms in one metric, paired by training seed.

    Attributes:
        metric: name of a metric value, or ``gold``.
        model: arm.
        base: arm that is subtracted; or ``best_of_n``.
        minus: two more arms, whose difference is subtracted: an interaction.
        expected: sign that the hypothesis says.
    """

    metric: str
    model: str
    base: str
    minus: Annotated[tuple[str, str], Field(strict=False)] | None = None
    expected: Literal["up", "down", "either"]

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of arms, without ``best_of_n``."""
        return tuple(name for name in (self.model, self.base, *(self.minus or ())) if name != BEST_OF_N)


class Curve(Section):
    """Arms of one method by the strength of the guidance.

    Attributes:
        name: of the method.
        arms: strength → arm, ascending; the first is the one without a reward.
    """

    name: str
    arms: dict[str, str]


class Study(Section):
    """What is declared before the runs.

    Attributes:
        title: of its section of the page.
        hypotheses: one sentence each.
        unit: of analysis.
        test: of a contrast.
        correction: over the secondary contrasts.
        exclusions: rules.
        budget: what all arms have in common, and what the study may cost.
        tuning: what was tuned, on which seeds.
        common: overrides of all runs that change no number: logging and saving.
        arms: by name of their runs.
        primary: the one contrast that the study was made for.
        secondary: further ones.
        eval: images of each run.
        along: images of checkpoints.
        draws: several images of each prompt of the arm ``base``.
        base: arm without a reward.
        curves: for the hump.
    """

    title: str
    hypotheses: Names
    unit: Literal["training seed"]
    test: Literal["paired t over common training seeds, two-sided"]
    correction: Literal["Holm over the secondary contrasts; the primary contrast stands alone"]
    exclusions: Names
    budget: str
    tuning: str
    common: Names = ()
    base: str
    arms: dict[str, Arm]
    primary: Contrast
    secondary: Annotated[tuple[Contrast, ...], Field(strict=False)] = ()
    eval: Images
    along: Images | None = None
    draws: Images | None = None
    curves: Annotated[tuple[Curve, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _names_its_arms(self) -> Study:
        named = [self.base, *(name for contrast in self.contrasts for name in contrast.arms)]
        named += [name for curve in self.curves for name in curve.arms.values()]
        for name in named:
            if name not in self.arms:
                raise ValueError(f"no arm {name!r}; {suggest(name, self.arms)}")
        if self.draws is None and any(contrast.base == BEST_OF_N for contrast in self.contrasts):
            raise ValueError(f"{BEST_OF_N} needs draws")
        if self.along is None and any(arm.along is not None for arm in self.arms.values()):
            raise ValueError("an arm names a seed whose checkpoints are measured, and along does not say how")
        return self

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The primary one first."""
        return self.primary, *self.secondary

    def sampling(self, arm: str) -> Any:
        """The section ``sampling`` of an arm's recipe."""
        return load_recipe(self.arms[arm].recipe, [*self.arms[arm].set, *self.common]).sampling

    def seeds(self, arm: str) -> list[int]:
        """Training seeds of an arm."""
        return parse_seeds(self.arms[arm].seeds)


def load_study(path: Path) -> Study:
    """Read a study's file, and check the recipe of every arm.

    Raises:
        ConfigError: names the file, the line and the key at fault.
    """
    values, lines = load_yaml(path)
    study: Study = validate(Study, values, lines, path)
    for name, arm in study.arms.items():
        load_recipe(arm.recipe, [*arm.set, *study.common, f"name={name}"])
    return study


@dataclass(frozen=True)
class Unit:
    """One command, restartable.

    Attributes:
        name: such as ``train lrm-s0``.
        kind: of the unit.
        run: name of the run.
        words: of the command, without ``rgbench``.
        place: of the run for a training, of the results for the others.
        needs: names of units that come before.
        method: recipe and overrides of the arm.
        images: whose values the results must hold; None of a training.
        steps: of the sampler that made them; None of a training.
    """

    name: str
    kind: Kind
    run: str
    words: tuple[str, ...]
    place: Path
    method: tuple[str, ...]
    needs: tuple[str, ...] = ()
    images: Images | None = None
    steps: int | None = None

    @property
    def pays(self) -> str:
        """What its cost depends on: a key of :data:`SECONDS`."""
        return self.method[0] if self.kind == "train" else self.kind

    def is_done(self) -> bool:
        """Whether what it makes is there."""
        if self.kind == "train":
            run = RunDirectory(self.place)
            return run.run_file.is_file() and run.read()["status"] == FINISHED
        return any(self._holds(folder) for folder in sorted(self.place.glob(f"*/{self.run}/*")) if folder.is_dir())

    def _holds(self, folder: Path) -> bool:
        assert self.images is not None, "a training has its own sign"
        try:
            found = load_result(folder)
        except UsageError:  # none, or damaged: measured again
            return False
        values = {value.metric for value in found.values if self.images.hold(value)}
        alike = not found.is_checkpoint and found.head.generation.fields.get("steps") == self.steps
        return alike and values.issuperset(self.images.wanted)


def draws_beside(results: Path) -> Path:
    """The folder of several images of each prompt, which in ``results`` would be columns of their own in reports."""
    return results.with_name(f"{results.name}-draws")


def units_of(studies: Iterable[Study], runs: Path, results: Path) -> list[Unit]:
    """Units of some studies in the order in which they are done: first seeds of all arms first; equal ones once.

    Args:
        studies: in order.
        runs: folder of runs.
        results: folder of results.

    Raises:
        UsageError: two studies have an arm of one name and different recipes.
    """
    found: dict[str, Unit] = {}
    for study in studies:
        steps = {name: study.sampling(name).steps for name in study.arms}
        rows = [(study.seeds(name).index(seed), name, seed) for name in study.arms for seed in study.seeds(name)]
        for place, name, seed in sorted(rows, key=lambda row: row[0]):
            for unit in _units_of_run(study, name, seed, steps[name], place == 0, runs, results):
                other = found.setdefault(unit.name, unit)
                if other.method != unit.method:
                    raise UsageError(f"two studies have another recipe for {unit.run}: give one of the arms a new name")
    return list(found.values())


def _units_of_run(
    study: Study, name: str, seed: int, own: int, is_first: bool, runs: Path, results: Path
) -> list[Unit]:
    arm, run = study.arms[name], f"{name}-s{seed}"
    kept = study.along.set if study.along is not None and arm.along == seed else ()
    words = ("train", arm.recipe, *arm.set, *study.common, *kept, f"name={name}", f"seed={seed}")
    method = (arm.recipe, *arm.set)
    found = [Unit(f"train {run}", "train", run, (*words, "--out", str(runs / run)), runs / run, method)]
    images: list[tuple[Kind, Images, int]] = [("eval", study.eval, steps) for steps in (own, *arm.steps)]
    if study.along is not None and arm.along == seed:
        images.append(("along", study.along, own))
    if study.draws is not None and name == study.base:
        images.append(("draws", study.draws, own))
    for kind, each, steps in images:
        place = draws_beside(results) if kind == "draws" else results
        kept_images = KEPT_IMAGES if kind == "eval" and is_first else 0
        words = ("eval", str(runs / run), "--metric", ",".join(each.metrics), "--num", str(each.num))
        words += ("--seeds", each.seeds, "--keep-images", str(kept_images), "--results", str(place))
        words += ("--checkpoints",) if kind == "along" else ("--steps", str(steps)) if steps != own else ()
        title = f"{kind} {run}" + (f" at {steps} steps" if steps != own else "")
        found.append(Unit(title, kind, run, words, place, method, (found[0].name,), each, steps))
    return found


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Attributes:
        done: units that are done, or that nothing needs any more.
        failed: units that failed before, and what waits for them.
        left: units to do, in order.
    """

    done: tuple[Unit, ...]
    failed: tuple[Unit, ...]
    left: tuple[Unit, ...]


def plan(units: Sequence[Unit], failed: Iterable[str]) -> Plan:
    """Sort units by what is done. A training is needed only by a unit that is not done.

    Args:
        units: of :func:`units_of`.
        failed: names of units that failed.
    """
    bad, open_units, needed = set(failed), [], set()
    for unit in units:
        if unit.kind != "train" and not unit.is_done():
            open_units.append(unit)
            needed |= set(unit.needs)
    open_units += [unit for unit in units if unit.kind == "train" and unit.name in needed and not unit.is_done()]
    names = {unit.name for unit in open_units}
    lost = {unit.name for unit in open_units if unit.name in bad or bad & set(unit.needs) & names}
    return Plan(
        done=tuple(unit for unit in units if unit.name not in names),
        failed=tuple(unit for unit in units if unit.name in lost),
        left=tuple(unit for unit in units if unit.name in names - lost),
    )


def seconds_of(unit: Unit, measured: Mapping[str, Sequence[float]]) -> float:
    """Estimate of a unit's seconds: the mean of measured units of its cost, or the declared one."""
    known = measured.get(unit.pays, ())
    return sum(known) / len(known) if known else SECONDS.get(unit.pays, SECONDS["lrm"])
