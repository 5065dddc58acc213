"""The report as Markdown, LaTeX and CSV, from sections that are made once and used by every format.

The CSV has a line for each number, unrounded, with where it comes from. Its `kind` is "value" (of a model, the mean
over its training seeds), "seed" (of one of several), "checkpoint" (of a run before its last step; `step` says which),
"delta_lcd", "delta_teacher" or "delta_base" (model minus LCD, the teacher, or a base that was named), "detail" (beside
a value) or "cost". `shown` is the text that tables print, "—" where a value is missing; the numeric fields are empty
there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure

from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import Column, Model, ResultSet
from rgbench.judge.paired import delta
from rgbench.judge.verdict import Verdict
from rgbench.metrics.values import MetricValue, metric_info
from rgbench.models.presets import BENCHTOPS
from rgbench.report import plots
from rgbench.report.grids import Grid, Kept, choose_grids, kept_images
from rgbench.report.plots import Plot
from rgbench.report.tables import (
    COSTS,
    LABELS,
    Entry,
    Field,
    Table,
    all_tables,
    cost_field,
    details,
    place_of,
    protocol_notes,
)
from rgbench.report.words import Reading, ends, format_value, names, readings, samplers, shown

BENCHTOP_NOTE = (
    "Benchtop: a 1/8-scale testbed of rendered scenes, shipped inside the package. Its numbers compare methods with "
    "each other; none of them is comparable with a full-size model's."
)
MAX_CHARS = 200  # of one text from outside (a model's name, a prompt), so that no table is unreadable


@dataclass(frozen=True, eq=False)
class Section:
    """What one world contributes to a report.

    Attributes:
        results: everything that was measured in it.
        title: of the report; "" for the usual one.
        note: what kind of world it is; "" for full size.
        metrics: names of those to show; all by default.
        readings: each model against its baseline, in words.
        tables: in the order of the report.
        kept: the stored images.
        grids: the random one, its further views, and those of the worst prompts; or nothing.
    """

    results: ResultSet
    title: str
    note: str
    metrics: tuple[str, ...]
    readings: tuple[Reading, ...]
    tables: tuple[Table, ...]
    kept: Kept
    grids: tuple[Grid, ...]

    @cached_property
    def plots(self) -> dict[Plot, Figure]:
        """The plots that have data, drawn."""
        return self._drawn[0]

    @cached_property
    def missing_plots(self) -> list[str]:
        """What is missing for the others."""
        return self._drawn[1]

    @cached_property
    def _drawn(self) -> tuple[dict[Plot, Figure], list[str]]:
        return plots.draw(self.results)

    @property
    def slug(self) -> str:
        """The world's name in file names; with its hash where the name has other characters than these."""
        world = self.results.world
        slug = re.sub(r"[^a-z0-9]+", "-", world.lower()).strip("-")
        return slug if slug == world else f"{slug or 'world'}-{hashlib.sha256(world.encode()).hexdigest()[:6]}"

    def file_name(self, stem: str, suffix: str) -> str:
        return f"{stem}-{self.slug}.{suffix}"


def section(results: ResultSet, verdicts: Sequence[Verdict], metrics: tuple[str, ...] = (), title: str = "") -> Section:
    """Words, tables and images of one world; its plots are drawn when they are asked for."""
    kept = kept_images(results)
    return Section(
        results=results,
        title=title,
        metrics=metrics,
        note=BENCHTOP_NOTE if results.world in BENCHTOPS else "",
        readings=tuple(readings(results, verdicts)),
        tables=tuple(all_tables(results, verdicts, metrics)),
        kept=kept,
        grids=choose_grids(results, kept),
    )


def commands(results: ResultSet) -> list[str]:
    """Every command that measured, once, in the order of the models."""
    every = [*(result for model in results.models for result in model.results.values()), *results.checkpoints]
    return list(dict.fromkeys(run.command for result in every for run in result.runs if run.command))


# Markdown

SPECIALS = re.compile(r"([\\`*|~#]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")  # a link needs "](", "][" or "]:"
HEAD = "<!-- Made by `rgbench report` from results alone; do not edit. -->\n# {}\n"


def markdown(sections: Sequence[Section]) -> str:
    """What was compared, in words, tables and pictures; protocols and commands. World after world."""
    title = escape(sections[0].title or "Comparison")
    return "\n".join([HEAD.format(title), *map(_markdown_section, sections)])


def _markdown_section(section: Section) -> str:
    results = section.results
    parts = [f"## World: {escape(results.world)}", ""]
    parts += [f"*{section.note}*", ""] if section.note else []
    parts += [escape_note(samplers(results)), ""]
    if section.readings:
        parts += ["### In words", ""]
    for reading in section.readings:
        said = f"{reading.answer} {reading.words}".strip()
        parts += [f"**{escape(reading.title)}: {escape(reading.label)}.** {escape_note(said)}".rstrip(), ""]
        parts += [*(f"- {escape_note(fact)}" for fact in reading.facts), ""]
    parts += ["### Tables", "", *(markdown_table(table, results.world) for table in section.tables)]
    parts += ["### Plots and images", ""]
    for plot in section.plots:
        parts += [f"![{escape(f'{plot.title}, {results.world}')}]({section.file_name(plot.stem, 'png')})", ""]
        parts += [escape_note(note), ""] if (note := plot.note(results)) else []
    parts += [*(f"- Missing: {escape_note(reason)}." for reason in section.missing_plots), ""]
    for grid in section.grids:
        parts += [f"![{escape(f'{grid.title}, {results.world}')}]({section.file_name(grid.key, 'png')})", ""]
        parts += [escape_note(grid.note), ""]
    parts += ["### Protocols", "", *(f"- {escape_note(note)}" for note in protocol_notes(results)), ""]
    return "\n".join([*parts, "### Commands", "", *(f"    {' '.join(c.split())}" for c in commands(results)), "", ""])


def markdown_table(table: Table, world: str) -> str:
    """Caption, pipe table with numbers right-aligned, notes as a list."""
    heads = [escape(label) for label in LABELS]
    heads += [escape(h.text) + (f"<sup>{h.note}</sup>" if h.note else "") for h in table.heads]
    rules = ["---"] * len(LABELS) + ["---:"] * len(table.heads)
    body = [[*map(escape, labels), *map(_markdown_entry, entries)] for labels, entries in table.rows]
    lines = [f"| {' | '.join(texts)} |" for texts in (heads, rules, *body)]
    notes = [f"- {escape_note(note)}" for note in table.notes]
    return "\n".join([f"**{escape(table.caption)}, {escape(world)}**", "", *lines, "", *notes, ""])


def _markdown_entry(entry: Entry) -> str:
    text = escape(entry.text + entry.marks)
    return f"**{text}**" if entry.best else text


def escape(text: str) -> str:
    r"""`text` with no effect as Markdown or HTML, in one line of at most 200 characters.

    >>> print(escape("a|b <script>"))
    a\|b &lt;script&gt;
    """
    return escape_note(_cut(text))


def escape_note(note: str) -> str:
    """As :func:`escape`, at full length."""
    return SPECIALS.sub(r"\\\1", " ".join(note.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"


# LaTeX

LATEX = {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", '"': r"{\ttfamily\char34}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "§": r"\S{}", "¶": r"\P{}", "−": "$-$",
    "—": "---", "–": "--", "…": r"\dots{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{char: f"$\\{name}$" for char, name in {
        "↑": "uparrow", "↓": "downarrow", "→": "rightarrow", "▲": "blacktriangle", "▼": "blacktriangledown", "±": "pm",
        "≥": "geq", "≤": "leq", "†": "dagger", "‡": "ddagger", "·": "cdot", "×": "times", "β": "beta", "δ": "delta",
        "σ": "sigma", "τ": "tau",
    }.items()},
}  # fmt: skip
PREAMBLE = r"""% Made by `rgbench report` from results alone; do not edit.
\documentclass[a4paper,10pt]{article}
\usepackage[utf8]{inputenc}
\usepackage{amssymb}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage[landscape,margin=15mm]{geometry}
\newsavebox{\rgtable}
% A table wider or taller than the page is scaled down to it.
\newcommand{\fittable}{%
  \ifdim\wd\rgtable>\textwidth\sbox{\rgtable}{\resizebox{\textwidth}{!}{\usebox{\rgtable}}}\fi
  \ifdim\dimexpr\ht\rgtable+\dp\rgtable\relax>.8\textheight
    \resizebox*{!}{.8\textheight}{\usebox{\rgtable}}\else\usebox{\rgtable}\fi}
\begin{document}
"""


def latex(sections: Sequence[Section]) -> str:
    """A document that compiles alone: every world's tables (booktabs) under its heading, then its protocols."""
    parts = []
    for section in sections:
        world, notes = section.results.world, protocol_notes(section.results)
        about = f"{section.note} {samplers(section.results)}".strip()
        parts.append(f"\\section*{{World: {latex_escape(world)}}}\n{latex_escape(about, None)}\n")
        parts += [latex_table(table, world) for table in section.tables]
        lines = "\\par\n".join(latex_escape(note, None) for note in notes)
        parts.append(
            f"\\clearpage\n\\subsection*{{Protocols}}\n{{\\footnotesize\\raggedright\n{lines}\\par}}\n\\clearpage\n"
        )
    return PREAMBLE + "\n".join(parts) + "\\end{document}\n"


def latex_table(table: Table, world: str) -> str:
    """A table to compile or to copy."""
    heads = [latex_escape(label) for label in LABELS]
    heads += [latex_escape(h.text) + (f"\\textsuperscript{{{h.note}}}" if h.note else "") for h in table.heads]
    body = [[*map(latex_escape, labels), *map(_latex_entry, entries)] for labels, entries in table.rows]
    layout = "l" * len(LABELS) + "r" * len(table.heads)
    lines = [f"{' & '.join(texts)} \\\\" for texts in (heads, *body)]
    tabular = "\n".join(
        [f"\\begin{{tabular}}{{{layout}}}", "\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"]
    )
    notes = "\\\\\n".join(latex_escape(note, None) for note in table.notes)
    below = f"\n\\medskip\n{{\\footnotesize\\raggedright\n{notes}\\par}}\n" if notes else ""
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{latex_escape(f'{table.caption}, {world}')}}}\n"
        f"\\sbox{{\\rgtable}}{{%\n{tabular}\n\\end{{tabular}}\n}}\\fittable\n{below}\\end{{table}}\n"
    )


def _latex_entry(entry: Entry) -> str:
    text = latex_escape(entry.text + entry.marks)
    return f"\\textbf{{{text}}}" if entry.best else text


def latex_escape(text: str, limit: int | None = MAX_CHARS) -> str:
    r"""`text` with no effect as LaTeX; characters that Computer Modern lacks become their code point.

    >>> print(latex_escape("50% & a_b é 🙂"))
    50\% \& a\_b é {[U+1F642]}
    """
    line = _cut(text) if limit else " ".join(text.split())
    return "".join(map(_latex_character, line))


def _latex_character(char: str) -> str:
    known = char.isprintable() and ord(char) < 0x180 and (char.isascii() or char.isalpha())
    return LATEX.get(char) or (char if known else f"{{[U+{ord(char):04X}]}}")


# CSV

FIELDS = (
    "world", "kind", "model", "method", "runs", "sampler", "training_seeds", "step", "metric", "label", "unit",
    "direction", "protocol", "shown", "value", "low", "high", "interval", "num_images", "in_sample", "flags", "sources",
    "commands",
)  # fmt: skip
FORMULA = re.compile(r"[=+\-@](?!\d[\d.]*( ±.*| \[.*)?$)")  # what a spreadsheet would compute, and is no number
Row = dict[str, Any]


def long_csv(sections: Sequence[Section]) -> str:
    """Header, then world by world, model by model; lines end in a newline alone.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        for row in _rows(section):
            plain = {"world": section.results.world, **row}
            writer.writerow({k: f"'{v}" if isinstance(v, str) and FORMULA.match(v) else v for k, v in plain.items()})
    return out.getvalue()


def _rows(section: Section) -> Iterator[Row]:
    results = section.results
    columns = [column for column in results.columns if not section.metrics or column.metric in section.metrics]
    for model in results.models:
        place = _place(results, model)
        for column in columns:
            yield place | _value_row(model, column, model.seeds(column), model.value(column))
            for seed in model.seeds(column) if len(model.results) > 1 else ():
                own = _value_row(model, column, [seed], model.result(column, seed))
                yield place | own | {"kind": "seed", "runs": model.results[seed].head.model, "training_seeds": seed}
            yield from (place | row for row in _delta_rows(results, model, column))
        for _, column, field in details(results, columns):
            yield place | _measured(column) | _field_row(model, field) | {"kind": "detail"}
        for key in COSTS:
            yield place | {"kind": "cost", "metric": key} | _field_row(model, cost_field(key))
    for result in results.checkpoints:
        yield from (row for row in _checkpoint_rows(result) if not section.metrics or row["metric"] in section.metrics)


def _field_row(model: Model, field: Field) -> Row:
    entry = field.entry(model)
    return {"label": field.head.label, "unit": field.head.unit, "shown": entry.text, "value": entry.number}


def _place(results: ResultSet, model: Model) -> Row:
    seeds = "; ".join(str(seed) for seed in model.results if seed is not None)
    what = {"model": names(results)[model], "method": model.method, "runs": model.label}
    return {**what, "sampler": model.sampler_label, "training_seeds": seeds}


def _measured(column: Column) -> Row:
    info = column.info
    names = {"metric": info.name, "label": column.label, "unit": info.unit, "direction": info.direction.value}
    return {**names, "protocol": column.protocol.id}


def _value_row(model: Model, column: Column, seeds: Sequence[int | None], value: MetricValue | None) -> Row:
    row = {"kind": "value", **_measured(column), "shown": shown(value, column)}
    if value is None:
        return row
    where = {
        "sources": "; ".join(place_of(model.results[seed]) for seed in seeds),
        "commands": "; ".join(dict.fromkeys(_command(model.results[seed], column.key) for seed in seeds)),
    }
    return row | _numbers(value) | where


def _numbers(value: MetricValue) -> Row:
    low, high = ends(value)
    return {
        "value": value.value,
        "low": low,
        "high": high,
        "interval": value.interval.method if value.interval else "",
        "num_images": value.num_images,
        "in_sample": str(value.in_sample).lower(),
        "flags": "; ".join(value.flags),
    }


def _command(result: ModelResult, key: tuple[str, str]) -> str:
    return result.runs[result.run_of[key]].command


def _delta_rows(results: ResultSet, model: Model, column: Column) -> Iterator[Row]:
    named = "delta_base" if results.base else "delta_lcd"
    for kind, base in ((named, results.baseline(model)), ("delta_teacher", results.teacher)):
        change = None if base is None or base is model else delta(model, base, column)
        if change is not None:
            ends = change.value, change.low, change.high
            text = format_value(*ends, column.decimals, signed=True)
            numbers = dict(zip(("value", "low", "high"), ends, strict=True))
            yield {"kind": kind, **_measured(column), "shown": text, **numbers, "interval": change.basis}


def _checkpoint_rows(result: ModelResult) -> Iterator[Row]:
    head = result.head
    where = {"model": head.model, "method": head.method, "runs": head.model, "training_seeds": head.training_seed}
    for value in result.values:
        column = Column(value.metric, value.protocol, metric_info(value.metric, head.metrics), value.reference)
        row = {**where, "kind": "checkpoint", "step": head.training["step"], **_measured(column), **_numbers(value)}
        yield row | {
            "shown": shown(value, column),
            "sources": place_of(result),
            "commands": _command(result, value.key),
        }
