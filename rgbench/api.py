"""rgbench from Python: what its commands do, with pandas frames, matplotlib axes and diffusers pipelines.

``import rgbench`` gives these names as ``rgbench.train`` and so on. Names, settings and errors are those of the command
line. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgbench.core.process import tune
from rgbench.core.run import RunDirectory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from rgbench.evaluate.results import ModelResult
    from rgbench.judge.headroom import Headroom, Mean

VALUES = ("metric", "label", "unit", "value", "low", "high", "num_images", "in_sample", "flags", "protocol")
RESULTS = ("world", "model", "method", "seed", "step", "sampler", "sampling_steps", "guidance_scale", *VALUES)
VERDICTS = ("model", "base", "outcome", "question", "metric", "student", "lcd", "change", "low", "high", "p", "says")
HEADROOM = ("model", "images", "by", "measure", "value", "low", "high")


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        path: its folder.
    """

    path: Path

    def log(self) -> DataFrame:
        """``log.jsonl``: a row for each logged step, a column for each curve; NaN where a step did not measure it."""
        import pandas as pd

        return pd.DataFrame(RunDirectory.open(self.path).read_log()).set_index("step")

    def student(self) -> DiffusionPipeline:
        """The student of a finished run, as plain diffusers loads it.

        Raises:
            OSError: it is not finished, or has no student.
        """
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(self.path / "pipeline")

    def plot(self, axes: Axes | None = None) -> Axes:
        """Gold against the trained reward along training, of a run with ``monitor.oracle_every``.

        Args:
            axes: to draw into; new ones by default.
        """
        from matplotlib import pyplot

        from rgbench.train.log import plot_gold

        return plot_gold(RunDirectory.open(self.path).read_log(), axes or pyplot.subplots()[1])


def train(recipe: str | Path, *overrides: str, out: str | Path | None = None, device: str = "auto") -> Run:
    """Train the student of a recipe, or resume its run; a finished run is left as it is.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        overrides: ``key.path=value``, such as "train.steps=50".
        out: folder of the run; ``runs/{recipe name}-s{seed}`` by default.
        device: "auto", "cpu" or "cuda".

    Raises:
        UsageError: a recipe that cannot be used, a missing part, or an existing run of another recipe.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.
        RgbenchError: a loss or gradient is not finite.
    """
    tune()
    from rgbench.train.train import train as run

    return Run(run(str(recipe), list(overrides), out=None if out is None else Path(out), device=device))


def evaluate(*targets: str | Path, **options: Any) -> DataFrame:
    """Generate images with models and measure them; what is stored already is not measured again.

    Args:
        targets: runs, pipeline folders, hub ids, folders of images, or presets for their teachers; all finished runs
            and their teachers by default.
        options: fields of :class:`rgbench.evaluate.config.EvalConfig`, the options of ``rgbench eval``:
            ``metrics="fid,hps"``, ``num=64``, ``results="results"``.

    Returns:
        A row for each value, as :func:`results`.

    Raises:
        UsageError: an unknown target, metric or option.
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        RgbenchError: an image or value is not finite.
    """
    from rgbench.evaluate.config import EvalConfig

    config = EvalConfig(targets=tuple(map(str, targets)), **options)
    tune()
    from rgbench.evaluate.evaluate import evaluate as run

    return _values(run(config))


def results(folder: str | Path = "results") -> DataFrame:
    """Every value under a folder of results, a row each.

    Columns are ``world``, ``model``, ``method``, ``seed`` and ``step`` of training, ``sampler``, ``sampling_steps`` and
    ``guidance_scale``; ``metric`` and its ``label``, ``unit``, ``value``, ``low`` and ``high`` of its interval over
    images, ``num_images``, ``in_sample`` (the model was trained on this reward), ``flags`` and ``protocol``: values of
    equal protocols may be compared.

    Raises:
        UsageError: a result that cannot be read.
    """
    tune()
    from rgbench.evaluate.results import load_results

    return _values(load_results(Path(folder)))


def _values(found: Iterable[ModelResult]) -> DataFrame:
    import pandas as pd

    from rgbench.judge.models import Column
    from rgbench.metrics.values import metric_info

    rows = []
    for result in found:
        head, sampling = result.head, result.head.generation.fields
        how = [sampling.get(key) for key in ("sampler", "steps", "guidance_scale")]
        who = (head.world, head.model, head.method, head.training_seed, head.training.get("step"), *how)
        for value in result.values:
            info = metric_info(value.metric, head.metrics)
            label = Column(value.metric, value.protocol, info, value.reference).label
            ends = (value.interval.low, value.interval.high) if value.interval else (None, None)
            about = (value.num_images, value.in_sample, ", ".join(value.flags), value.protocol.id)
            rows.append((*who, value.metric, label, info.unit, value.value, *ends, *about))
    frame = pd.DataFrame(rows, columns=list(RESULTS))
    return frame.astype(dict.fromkeys(("seed", "step", "sampling_steps"), "Int64"))  # which may lack numbers


def report(
    results: str | Path = "results", out: str | Path | None = None, formats: Sequence[str] = (), **choice: Any
) -> list[Path]:
    """Write comparison tables, plots and one page from results.

    Args:
        results: folder of results.
        out: folder of the report; ``{results}/report`` by default.
        formats: of "md", "csv", "tex", "html"; all by default.
        choice: fields of :class:`rgbench.report.report.Choice`, what to show: ``models=["rg_lcd"]``,
            ``metrics=["hps"]``, ``labels={"rg_lcd": "Guided"}``, ``title="Mine"``, ``base="teacher"``.

    Returns:
        The files written.

    Raises:
        UsageError: no results, one that cannot be read, or an unknown format, model or metric.
    """
    tune()
    from rgbench.report.report import Choice
    from rgbench.report.report import report as run

    folder = Path(results) / "report" if out is None else Path(out)
    return run(Path(results), folder, formats, choice=Choice(**choice))


def plots(results: str | Path = "results") -> dict[str, list[Axes]]:
    """The plots of the report that the results have data for.

    Args:
        results: folder of results.

    Returns:
        Axes of each plot by its name, of all worlds; ``axes[0].figure`` shows a plot in a notebook.

    Raises:
        UsageError: no results, or one that cannot be read.
    """
    tune()
    from rgbench.judge.models import load_result_sets
    from rgbench.report.plots import draw

    found: dict[str, list[Axes]] = {}
    for world in load_result_sets(Path(results)):
        for plot, figure in draw(world)[0].items():
            found.setdefault(plot.stem, []).extend(figure.axes)
    return found


def verdict(
    results: str | Path = "results",
    models: Sequence[str] = (),
    *,
    base: str | None = None,
    gold: str | None = None,
    reward: str | None = None,
    headroom: float | None = None,
) -> DataFrame:
    """Say whether a reward made the images better, against LCD students of equal budget; stored as the command does.

    Args:
        results: folder of results.
        models: to judge; all that were trained on a reward by default.
        base: name of the LCD students; found by default.
        gold: metric that is gold; "gold_utility" or "oracle_all" by default.
        reward: metric of the reward that ``models`` were trained on, if elsewhere.
        headroom: most that better images could gain of the reward, in its unit; by default what was measured.

    Returns:
        A row for each model and declared metric, with the values of ``student`` and ``lcd``, the signed ``change``,
        its 95 % interval, the adjusted ``p`` and what it ``says``. ``frame.attrs["words"]`` has the words on each.

    Raises:
        UsageError: no results, nothing to judge, an unknown model, or a metric declared twice.
    """
    tune()
    import pandas as pd

    from rgbench.judge.verdict import Declared, give_verdicts

    rows: list[tuple[Any, ...]] = []
    declared = Declared(base=base, gold=gold, reward=reward, headroom=headroom)
    found = give_verdicts(Path(results), models, declared)
    for each in found:
        who = (each.model, each.base, each.outcome.value)
        for one in each.findings:
            change = (one.change, one.low, one.high, one.adjusted, one.says)
            rows.append((*who, one.question, one.metric, one.model, one.base, *change))
        if not each.findings:
            rows.append((*who, *[None] * (len(VERDICTS) - len(who))))
    frame = pd.DataFrame(rows, columns=list(VERDICTS))
    frame.attrs["words"] = {each.model: each.words for each in found}
    return frame


def headroom(
    target: str | Path,
    *,
    samples: int = 8,
    reward: str = "hps",
    held_out: Sequence[str] = (),
    proxy: str | Path | None = None,
    ranges: int = 4,
    **options: Any,
) -> DataFrame:
    """Measure what a reward could gain by picking among a model's own images, and what that does to gold.

    Args:
        target: a run, a pipeline folder, or "teacher".
        samples: images of each prompt.
        reward: metric of the trained reward.
        held_out: metrics of held-out rewards.
        proxy: folder of a latent proxy; the world's by default.
        ranges: timestep ranges of single-step predictions; 0 for none.
        options: as for :func:`evaluate`; ``num`` is 64 of the benchtop's prompts by default.

    Returns:
        A row for each picker ``by`` and ``measure``: what the images that it picks reach in each metric, and its
        correlation with gold and AUC within a prompt, with 95 % intervals. ``images`` says of which prompts, or from
        which timestep. ``frame.attrs["words"]`` says what may be expected.

    Raises:
        UsageError: an unknown target or metric, or nothing that stands for gold.
    """
    from rgbench.evaluate.config import EvalConfig

    config = EvalConfig(targets=(str(target),), **options)
    tune()
    import pandas as pd

    from rgbench.judge.measure_headroom import HeadroomOptions, measure_headroom

    folder = None if proxy is None else Path(proxy)
    (found,) = measure_headroom(config, HeadroomOptions(samples, reward, tuple(held_out), folder, ranges))
    rows = [(found.model, *row) for row in _headroom_rows(found)]
    frame = pd.DataFrame(rows, columns=list(HEADROOM))
    frame.attrs["words"] = found.words
    return frame


def _headroom_rows(found: Headroom) -> Iterable[tuple[Any, ...]]:
    def numbers(mean: Mean | None) -> tuple[float | None, ...]:
        return (None, None, None) if mean is None else (mean.value, mean.low, mean.high)

    links = [(group.name or "all", link) for group in found.groups for link in group.links]
    links += [(f"one step from t = {at.timestep}", link) for at in found.ranges for link in at.links]
    for group in found.groups:
        for pick in group.picks:
            yield from ((group.name or "all", pick.by, name, *numbers(mean)) for name, mean in pick.reaches.items())
    for images, link in links:
        yield images, link.by, f"correlation with {found.gold}", *numbers(link.correlation)
        yield images, link.by, "AUC", *numbers(link.auc)
