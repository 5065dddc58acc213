"""The page of the studies: text by hand, and parts between markers that are made from committed files alone.

<!-- strength: begin … --> … <!-- strength: end -->    one part for each study, named as its file
<!-- cost: begin … --> … <!-- cost: end -->            what all units took, and which failed
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rgbench.core.errors import UsageError
from rgbench.core.io import write_bytes_atomic, write_text_atomic
from rgbench.evaluate.results import load_results
from rgbench.report.plots import save
from tools.study.analyse import (
    REWARD,
    Hump,
    Measured,
    Point,
    Tested,
    choices,
    hump_of,
    match_best_of_n,
    run_contrasts,
)
from tools.study.figures import draw, info_of, label, spread
from tools.study.plan import BEST_OF_N, GOLD_NAME, Contrast, Study, draws_beside, load_study, units_of
from tools.study.work import Records, read_records

COST = "cost"
COLUMNS = (
    REWARD,
    GOLD_NAME,
    "oracle_all",
    "degradation",
    "gold_win_rate",
    "fd_efflite0",
    "recall_efflite0",
    "band_db",
    "saturation",
)
PICKED = (2, 4, 8)  # n of best-of-n that the table shows


def write_page(files: Sequence[Path], results: Path, records: Path, page: Path) -> list[Path]:
    """Replace the generated parts of the page, and write the figures into a folder of its name beside it.

    Args:
        files: studies; each has a part on the page, named as the file.
        results: folder of results.
        records: folder of ``units.json``, of which other studies' units are left out.
        page: with markers.

    Returns:
        What was written.

    Raises:
        UsageError: a page without the markers, or results of two kinds under one name.
    """
    loaded, drawn = load_results(results), load_results(draws_beside(results))
    text, written = page.read_text(encoding="utf-8"), []
    studies = {path.stem: load_study(path) for path in files}
    for name, study in studies.items():
        measured = Measured.of(study, loaded, drawn)
        parts = [*declared(study), *outcome(measured)]
        figure = draw(measured)
        if figure is not None:
            place = page.with_suffix("") / f"{name}.svg"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(place, save(figure, "svg"))
            parts.insert(len(declared(study)), f"![{study.title}]({page.stem}/{place.name})")
            written.append(place)
        text = with_part(text, name, "\n\n".join(parts), page)
    own = {unit.name for unit in units_of(studies.values(), Path("runs"), results)}
    kept = {name: record for name, record in read_records(records).units.items() if name in own}
    text = with_part(text, COST, "\n\n".join(cost(Records(units=kept), studies.values(), loaded)), page)
    write_text_atomic(page, text)
    return [*written, page]


def with_part(text: str, name: str, part: str, page: Path) -> str:
    """The page's text with one part replaced.

    Raises:
        UsageError: no markers of that name.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}: begin[^\n]*-->\n).*?(<!-- {re.escape(name)}: end -->)", re.DOTALL)
    if not pattern.search(text):
        raise UsageError(f"{page}: lacks the markers <!-- {name}: begin --> and <!-- {name}: end -->; add them")
    return pattern.sub(lambda found: f"{found[1]}\n{part}\n\n{found[2]}", text)


# What was declared


def declared(study: Study) -> list[str]:
    """The study's file in words: hypotheses, contrasts, exclusions, budget."""
    lines = [f"- {text}" for text in study.hypotheses]
    rules = [f"- {text}" for text in study.exclusions]
    test = f"**Declared.** Unit: {study.unit}. Test: {study.test}. {study.correction}. {study.budget} {study.tuning}"
    return ["\n".join(lines), test, "\n".join(rules)]


# What came


def outcome(measured: Measured) -> list[str]:
    """Tables of arms and contrasts, the hump, the verdict's errors, and what is missing."""
    study = measured.study
    parts = [_contrasts(measured, run_contrasts(measured))]
    if study.draws is not None:
        parts.append(_choices(measured))
    else:
        parts.append(_arms(measured))
    for curve in study.curves:
        hump = hump_of(measured, curve)
        parts.append(f"**{curve.name[:1].upper()}{curve.name[1:]}.** {_hump(measured, hump)}")
    if study.curves and (found := measured.errors()):
        over = sum(outcome == "over-optimised" for outcome in found.values())
        listed = ", ".join(f"s{seed} {outcome}" for seed, outcome in found.items())
        parts.append(
            f"LCD seeds that nothing is compared with, judged as if trained on the reward: {over} of {len(found)} "
            f"called over-optimised ({listed})."
        )
    missing = measured.missing()
    if missing:
        parts.append("Missing, and counted nowhere:\n\n" + "\n".join(f"- {each}" for each in missing))
    return parts


def _contrasts(measured: Measured, found: Sequence[Tested]) -> str:
    rows = []
    for each in found:
        info = info_of(measured, each.contrast.metric)
        ends = "—" if each.value is None else _interval((each.value, each.low or 0, each.high or 0), info.decimals)
        kind = "primary" if each is found[0] else "secondary"
        p = "—" if each.adjusted is None else f"{each.adjusted:.2g}"
        name = f"{_name(each.contrast)}, {info.label}"
        rows.append((kind, name, str(len(each.seeds)), ends, p, each.contrast.expected, each.says))
    header = ("", "Contrast", "Seeds", "Difference, 95 %", "p", "Expected", "Outcome")
    return table(header, rows)


def _name(contrast: Contrast) -> str:
    base = "best of n" if contrast.base == BEST_OF_N else contrast.base
    less = f" less {contrast.minus[0]} − {contrast.minus[1]}" if contrast.minus else ""
    return f"{contrast.model} − {base}{less}"


def _arms(measured: Measured) -> str:
    study, rows = measured.study, []
    known = [m for m in COLUMNS if m in study.eval.reads or any(measured.values(arm, m) for arm in study.arms)]
    columns = measured.shown(known)
    for steps, values in measured.of_teachers():
        single = [spread([values[name]] if name in values else []) for name in map(measured.name, columns)]
        cells = [_plus_minus(each, info_of(measured, m).decimals) for m, each in zip(columns, single, strict=True)]
        rows.append(("teacher", str(steps), "—", *cells, "—", "—"))
    for arm in study.arms:
        for steps in measured.all_steps(arm):
            cells = []
            for metric in columns:
                found = spread(measured.values(arm, metric, steps).values())
                cells.append(_plus_minus(found, info_of(measured, metric).decimals))
            verdict = measured.verdict(arm, steps)
            num = f"{len(measured.values(arm, REWARD, steps))} of {len(study.seeds(arm))}"
            cells.append(_plus_minus(spread(measured.train_seconds(arm)), 0))
            rows.append((arm, str(steps), num, *cells, verdict.outcome.value if verdict is not None else "—"))
    labels = [label(measured, metric) for metric in columns]
    return table(("Arm", "Steps", "Seeds", *labels, "Training, CPU s", "Verdict"), rows)


def _hump(measured: Measured, hump: Hump | None) -> str:
    if hump is None:
        return "Too few results for a hump."
    gold, reward = info_of(measured, GOLD_NAME), info_of(measured, REWARD)
    places = ", ".join(
        f"{strength:g} in {share:.0%}" for strength, share in zip(hump.strengths, hump.places, strict=True) if share
    )
    shown = "A hump is shown" if hump.is_shown else "No hump is shown"
    return (
        f"{shown} over {len(hump.seeds)} seeds. {gold.label} is highest at share {hump.strengths[hump.peak]:g} "
        f"(by bootstrap over seeds: {places} of the draws), at {reward.label} "
        f"{_interval(hump.reward, reward.decimals, signed=False)}. It rises by {_interval(hump.rise, gold.decimals)} "
        f"from LCD to the peak and falls by {_interval(hump.fall, gold.decimals, signed=False)} from the peak to the "
        "strongest arm, each seed read at the peak of the others."
    )


def _choices(measured: Measured) -> str:
    reward, gold = info_of(measured, REWARD), info_of(measured, GOLD_NAME)
    digits, found = (reward.decimals, gold.decimals, gold.decimals), choices(measured)
    rows: list[tuple[str, ...]] = []
    for n in PICKED:
        able = [each for each in found.values() if n <= len(each.rewards)]
        sides = [spread(each.rewards[n - 1] for each in able), spread(each.golds[n - 1] for each in able)]
        cells = map(_plus_minus, sides, digits)
        rows += [(f"LCD, best of {n}", str(len(able)), *cells, "—", str(n), "—")] if able else []
    for arm in measured.study.arms:
        matched = list(match_best_of_n(measured, arm).values()) if arm != measured.study.base else []
        sides = [spread(getattr(each, name) for each in matched) for name in ("reward", "gold", "best_gold")]
        beyond = str(sum(each.is_beyond for each in matched))
        equal = f"{sum(each.n for each in matched) / max(len(matched), 1):.1f}"
        rows += [(arm, str(len(matched)), *map(_plus_minus, sides, digits), equal, beyond)] if matched else []
    header = ("", "Seeds", f"{reward.label} gained", f"{gold.label} gained")
    return table((*header, f"{gold.label} of best of n there", "n there", "Seeds beyond every n"), rows)


# What it cost


def cost(records: Records, studies: Iterable[Study], loaded: Sequence) -> list[str]:
    """Time of the units that were run, runs that were there before, and failures."""
    runs = {f"{arm}-s{seed}" for study in studies for arm in study.arms for seed in study.seeds(arm)}
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, record in records.units.items():
        kind = " ".join(dict.fromkeys((name.split()[0], record.pays)))
        kinds.setdefault(kind, []).append((record.cpu_sec, record.wall_sec))
    rows = [
        (kind, str(len(times)), *(f"{sum(side) / 3600:.2f}" for side in zip(*times, strict=True)))
        for kind, times in sorted(kinds.items())
    ]
    total = sum(record.cpu_sec for record in records.units.values())
    trained = {name.removeprefix("train ") for name in records.units if name.startswith("train ")}
    before = {
        result.head.model: result.head.cost.get("train_cpu_sec") or 0 for result in loaded if not result.is_checkpoint
    }
    reused = sorted(run for run in runs & before.keys() if run not in trained)
    parts = [table(("Units", "Number", "CPU, h", "Wall, h"), rows)] if rows else []
    parts.append(
        f"{total / 3600:.1f} h of CPU in {len(records.units)} units. {len(reused)} of {len(runs)} runs were there "
        f"before (training: {sum(before[run] for run in reused) / 3600:.1f} h of CPU)."
    )
    wrong = [
        f"- {name}: {record.status}. {record.error}"
        for name, record in records.units.items()
        if record.status != "finished"
    ]
    parts.append("Failed units:\n\n" + "\n".join(wrong) if wrong else "No unit failed.")
    return parts


# Cells


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plus_minus(found: Point | None, decimals: int) -> str:
    if found is None:
        return "—"
    half = (found[2] - found[1]) / 2
    return _number(found[0], decimals) + (f" ± {half:.{decimals}f}" if half else "")


def _interval(found: Point, decimals: int, *, signed: bool = True) -> str:
    value, low, high = (_number(each, decimals, signed) for each in found)
    return f"{value} [{low}, {high}]"


def _number(value: float, decimals: int, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
