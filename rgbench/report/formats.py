"""What one world contributes to a report, made once and used by every format.

The Markdown report: what was compared, the reading in words, tables, pictures, protocols, commands.

Tables and prose as GitHub Markdown.

Tables as one LaTeX document that compiles alone (booktabs), or as tables to copy out of it.

Every figure of the report as one long CSV: a line per figure, unrounded, with where it comes from.

`kind` is "figure" (a row of the tables), "seed" (one training seed of a row of several),
"checkpoint" (a run before its last step; `step` says which), "delta_lcd" or
"delta_teacher" (row minus baseline), "detail" (a part of a figure), or "cost". `shown` is
the text that the tables print, "—" where there is no figure; the numeric fields are empty
there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rgbench.evaluate.results import Result
from rgbench.judge.models import Column, Comparison, Figure, Row, column_of, contrast, file_of, sampling_of
from rgbench.judge.verdict import load_verdicts
from rgbench.report.grids import Grid, Kept, kept_images, random_grid, view_grids, worst_grids
from rgbench.report.plots import PLOTS, Plot
from rgbench.report.tables import (
    COSTS,
    MISSING,
    Cell,
    Detail,
    Table,
    all_details,
    cost,
    cost_tables,
    detail_tables,
    format_figure,
    format_number,
    protocol_notes,
    spectral_tables,
    tables,
)
from rgbench.report.words import Reading, readings, verdict_table

BENCHTOP = "benchtop"
BENCHTOP_NOTE = (
    "Benchtop: a 1/8-scale world of rendered scenes, shipped inside the package. "
    "These figures compare methods with each other; none of them is comparable with a full-size model's."
)


@dataclass(frozen=True)
class Section:
    """A world's comparison with its tables, drawable plots and image grids.

    `undrawn` says why other plots are not there. `grids` are the random one, its further
    views, and those of the worst prompts, or nothing.
    """

    comparison: Comparison
    note: str
    readings: tuple[Reading, ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    undrawn: tuple[str, ...]
    grids: tuple[Grid, ...]
    kept: Kept
    results: Path

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.comparison.world.lower()).strip("-") or "world"

    def plot_name(self, plot: Plot, suffix: str) -> str:
        return f"{plot.stem}-{self.slug}.{suffix}"

    def grid_name(self, grid: Grid) -> str:
        return f"{grid.key}-{self.slug}.png"


def section(comparison: Comparison, results: Path) -> Section:
    """Tables, the plots that have data, and the chosen images of one world."""
    note = BENCHTOP_NOTE if comparison.world == BENCHTOP else ""
    verdicts = [verdict for verdict in load_verdicts(results) if verdict.world == comparison.world]
    lacking = {plot: plot.lacking(comparison) for plot in PLOTS}
    kept = kept_images(comparison, results)
    grid = random_grid(comparison, kept)
    grids = (grid, *view_grids(grid), *worst_grids(comparison, kept)) if grid else ()
    return Section(
        comparison,
        note,
        tuple(readings(comparison, verdicts)),
        (
            *filter(None, [verdict_table(comparison, verdicts)]),
            *tables(comparison),
            *spectral_tables(comparison),
            *detail_tables(comparison),
            *cost_tables(comparison),
        ),
        tuple(plot for plot, reason in lacking.items() if not reason),
        tuple(f"{plot.title}: {reason}" for plot, reason in lacking.items() if reason),
        grids,
        kept,
        results,
    )


SPECIALS = re.compile(r"([\\`*|~#]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")  # a link needs "](", "][" or "]:"
MAX_CHARS = 200  # of one text from outside (a model's name, a prompt), so that no table is unreadable


def escape(text: str) -> str:
    r"""`text` with no effect as Markdown or HTML, in one line.

    >>> print(escape("a|b <script>"))
    a\|b &lt;script&gt;
    """
    line = " ".join(text.split())
    return escape_note(line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…")


def markdown_table(table: Table) -> str:
    """Caption, pipe table with figures right-aligned, notes as a list."""
    heads = [escape(label) for label in table.labels]
    heads += [escape(h.text) + (f"<sup>{h.note}</sup>" if h.note else "") for h in table.headings]
    rules = ["---"] * len(table.labels) + ["---:"] * len(table.headings)
    body = [[*map(escape, labels), *map(_cell, cells)] for labels, cells in table.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, rules, *body)]
    notes = [f"- {escape_note(note)}" for note in table.notes]
    return "\n".join([f"**{escape(table.caption)}**", "", *lines, "", *notes, ""])


def escape_note(note: str) -> str:
    """As :func:`escape`, at full length."""
    return SPECIALS.sub(r"\\\1", " ".join(note.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _cell(cell: Cell) -> str:
    text = escape(cell.text + cell.marks)
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(cell.rank, text)


HEAD = """<!-- Made by `rgbench report` from result files alone; do not edit. -->
# Comparison
"""


def markdown_document(sections: list[Section]) -> str:
    """All worlds, one after another."""
    return "\n".join([HEAD, *(_section(section) for section in sections)])


def _section(section: Section) -> str:
    comparison = section.comparison
    parts = [f"## {escape(comparison.title)}", ""]
    if section.note:
        parts += [f"*{section.note}*", ""]
    parts += [_reading(section), *(markdown_table(table) for table in section.tables)]
    for plot in section.plots:
        title = f"{plot.title}, {comparison.world}"
        parts += [f"![{escape(title)}]({section.plot_name(plot, 'png')})", ""]
    if section.undrawn:
        parts += ["Not drawn:", "", *(f"- {escape_note(reason)}" for reason in section.undrawn), ""]
    for grid in section.grids:
        title = f"{grid.title}, {comparison.world}"
        parts += [f"![{escape(title)}]({section.grid_name(grid)})", "", escape_note(grid.note), ""]
    parts += ["### Protocols", "", *(f"- {escape_note(note)}" for note in protocol_notes(comparison)), ""]
    parts += ["### Commands", "", *_commands(comparison), ""]
    return "\n".join(parts)


def _reading(section: Section) -> str:
    found = section.readings
    if not found:
        return ""
    lines = ["### In words", ""]
    for reading in found:
        words = f"{reading.verdict} {reading.weighing}".strip()
        lines += [f"**{escape(reading.title)}.** {escape_note(words)}", ""]
        lines += [*(f"- {escape_note(fact)}" for fact in reading.facts), ""]
    return "\n".join([*lines, "### Figures", ""])


def _commands(comparison: Comparison) -> list[str]:
    commands = dict.fromkeys(result.command for _, result in comparison.all_results)
    return [f"    {' '.join(command.split())}" for command in commands if command]


LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    '"': r"{\ttfamily\char34}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}
SYMBOLS = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "§": r"\S{}",
    "¶": r"\P{}",
    "·": r"$\cdot$",
    "δ": r"$\delta$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "−": "$-$",
    "—": "---",
    "–": "--",
    "…": r"\dots{}",
}

PREAMBLE = r"""% Made by `rgbench report` from result files alone; do not edit.
\documentclass[a4paper,10pt]{article}
\usepackage[utf8]{inputenc}
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


def latex_escape(text: str, limit: int | None = MAX_CHARS) -> str:
    r"""`text` with no effect as LaTeX; characters that Computer Modern lacks become their code point.

    >>> print(escape("50% & a_b é 🙂"))
    50\% \& a\_b é {[U+1F642]}
    """
    line = " ".join(text.split())
    line = line if limit is None or len(line) <= limit else line[: limit - 1] + "…"
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", "".join(map(_character, line)))


def latex_document(sections: list[Section]) -> str:
    """Every world's tables under its heading, then its protocols."""
    parts = []
    for section in sections:
        parts.append(f"\\section*{{{latex_escape(section.comparison.title)}}}\n{latex_escape(section.note, None)}\n")
        parts += [_table(table) for table in section.tables]
        notes = protocol_notes(section.comparison)
        lines = "\\par\n".join(latex_escape(note, None) for note in notes)
        parts.append(
            f"\\clearpage\n\\subsection*{{Protocols}}\n{{\\footnotesize\\raggedright\n{lines}\\par}}\n\\clearpage\n"
        )
    return PREAMBLE + "\n".join(parts) + "\\end{document}\n"


def _table(table: Table) -> str:
    heads = [latex_escape(label) for label in table.labels]
    heads += [latex_escape(h.text) + (f"\\textsuperscript{{{h.note}}}" if h.note else "") for h in table.headings]
    body = [
        [*map(latex_escape, labels), *(latex_escape(c.text + c.marks) for c in cells)] for labels, cells in table.rows
    ]
    frame = pd.DataFrame(body, columns=pd.RangeIndex(len(heads)))
    ranks = pd.DataFrame(
        [[""] * len(labels) + [_emphasis(cell) for cell in cells] for labels, cells in table.rows],
        columns=frame.columns,
    )
    style = frame.style.apply(lambda _: ranks, axis=None).hide(axis="index")
    style = style.format_index(heads.__getitem__, axis="columns")
    layout = "l" * len(table.labels) + "r" * len(table.headings)
    tabular = style.to_latex(hrules=True, column_format=layout)
    notes = "\\\\\n".join(latex_escape(note, None) for note in table.notes)
    below = f"\n\\medskip\n{{\\footnotesize\\raggedright\n{notes}\\par}}\n" if notes else ""
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{latex_escape(table.caption)}}}\n"
        f"\\sbox{{\\rgtable}}{{%\n{tabular}}}\\fittable\n{below}\\end{{table}}\n"
    )


def _emphasis(cell: Cell) -> str:
    return {1: "textbf: --rwrap", 2: "underline: --rwrap"}.get(cell.rank, "")


def _character(char: str) -> str:
    if char in LATEX_SPECIALS:
        return LATEX_SPECIALS[char]
    if char in SYMBOLS:
        return SYMBOLS[char]
    return (
        char
        if char.isprintable() and ord(char) < 0x180 and (char.isascii() or char.isalpha())
        else f"{{[U+{ord(char):04X}]}}"
    )


FIELDS = (
    "world", "kind", "method", "model", "sampler", "training_seeds", "step", "metric", "label", "unit", "direction",
    "protocol", "shown", "value", "low", "high", "interval", "num_samples", "in_sample", "flags", "files", "commands",
)  # fmt: skip


def long_csv(comparisons: list[Comparison]) -> str:
    """The CSV text: header, then world by world, row by row; lines end in a newline alone."""
    lines: list[dict[str, Any]] = []
    for comparison in comparisons:
        for row in comparison.rows:
            for column in comparison.columns:
                lines += _figures(comparison, row, column)
                lines += _deltas(comparison, row, column)
            lines += [_detail(comparison, row, detail) for detail in all_details(comparison, comparison.columns)]
            lines += _costs(comparison, row)
        lines += [_checkpoint(comparison, result) for result in comparison.checkpoints]
    frame = pd.DataFrame(lines, columns=list(FIELDS), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _figures(comparison: Comparison, row: Row, column: Column) -> list[dict[str, Any]]:
    lines = [_line(comparison, row, column, "figure", row.figure(column))]
    if len(row.members) > 1:
        for seed in row.seeds(column):
            single = Row(row.method, row.stem, row.sampling, {seed: row.members[seed]})
            lines.append(_line(comparison, single, column, "seed", single.figure(column)))
    return lines


def _line(comparison: Comparison, row: Row, column: Column, kind: str, figure: Figure | None) -> dict[str, Any]:
    line = {**_place(comparison, row, kind), **_measured(column), "shown": MISSING}
    if figure is None:
        return line
    results = figure.results
    single = results[0].interval.method if len(results) == 1 and results[0].interval else ""
    return line | {
        "shown": format_figure(figure.value, figure.low, figure.high, column.metric.decimals),
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "interval": "t over training seeds" if len(results) > 1 else single,
        "num_samples": _joined(result.num_samples for result in results),
        "in_sample": str(figure.in_sample).lower(),
        "flags": "; ".join(figure.flags),
        "files": _joined(file_of(result) for result in results),
        "commands": _joined(result.command for result in results),
    }


def _checkpoint(comparison: Comparison, result: Result) -> dict[str, Any]:
    column = column_of(result)
    row = Row(result.method, result.model, sampling_of(result), {result.training_seed: {column.key: result}})
    figure = row.figure(column)
    return _line(comparison, row, column, "checkpoint", figure) | {"step": result.training["step"]}


def _deltas(comparison: Comparison, row: Row, column: Column) -> list[dict[str, Any]]:
    lines = []
    for kind, base in (("delta_lcd", comparison.lcd(row)), ("delta_teacher", comparison.teacher)):
        difference = None if base is None or base is row else contrast(row, base, column)
        if difference is not None:
            value, low, high = difference.value, difference.low, difference.high
            shown = format_figure(value, low, high, column.metric.decimals, signed=True)
            numbers = {"shown": shown, "value": value, "low": low, "high": high, "interval": difference.basis}
            lines.append({**_place(comparison, row, kind), **_measured(column), **numbers})
    return lines


def _detail(comparison: Comparison, row: Row, detail: Detail) -> dict[str, Any]:
    what = {"label": detail.heading.label, "unit": detail.heading.unit}
    figure = {"shown": detail.text(row), "value": detail.value(row)}
    return {**_place(comparison, row, "detail"), **_measured(detail.column), **what, **figure}


def _costs(comparison: Comparison, row: Row) -> list[dict[str, Any]]:
    lines = []
    for key, label, unit, decimals in COSTS:
        value = cost(row, key)
        shown = MISSING if value is None else format_number(value, decimals)
        what = {"metric": key, "label": label, "unit": unit, "shown": shown, "value": value}
        lines.append({**_place(comparison, row, "cost"), **what})
    return lines


def _place(comparison: Comparison, row: Row, kind: str) -> dict[str, Any]:
    seeds = "; ".join(str(seed) for seed in row.members if seed is not None)
    names = {"method": row.method, "model": row.model_label, "sampler": row.sampler_label, "training_seeds": seeds}
    return {"world": comparison.world, "kind": kind, **names}


def _measured(column: Column) -> dict[str, Any]:
    metric = column.metric
    names = {"metric": metric.name, "label": metric.label, "unit": metric.unit, "direction": metric.direction}
    return {**names, "protocol": column.protocol_id}


def _joined(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values))
