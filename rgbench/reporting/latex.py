"""Tables as one LaTeX document that compiles alone (booktabs), or as tables to copy out of it."""

from __future__ import annotations

import re

import pandas as pd

from rgbench.reporting.protocols import protocol_notes
from rgbench.reporting.sections import Section
from rgbench.reporting.tables import Cell, Table

SPECIALS = {
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
MAX_CHARS = 200
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


def escape(text: str, limit: int | None = MAX_CHARS) -> str:
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
        parts.append(f"\\section*{{{escape(section.comparison.title)}}}\n{escape(section.note, None)}\n")
        parts += [_table(table) for table in section.tables]
        notes = protocol_notes(section.comparison)
        lines = "\\par\n".join(escape(note, None) for note in notes)
        parts.append(
            f"\\clearpage\n\\subsection*{{Protocols}}\n{{\\footnotesize\\raggedright\n{lines}\\par}}\n\\clearpage\n"
        )
    return PREAMBLE + "\n".join(parts) + "\\end{document}\n"


def _table(table: Table) -> str:
    heads = [escape(label) for label in table.labels]
    heads += [escape(h.text) + (f"\\textsuperscript{{{h.note}}}" if h.note else "") for h in table.headings]
    body = [[*map(escape, labels), *(escape(c.text + c.marks) for c in cells)] for labels, cells in table.rows]
    frame = pd.DataFrame(body, columns=pd.RangeIndex(len(heads)))
    ranks = pd.DataFrame(
        [[""] * len(labels) + [_emphasis(cell) for cell in cells] for labels, cells in table.rows],
        columns=frame.columns,
    )
    style = frame.style.apply(lambda _: ranks, axis=None).hide(axis="index")
    style = style.format_index(heads.__getitem__, axis="columns")
    layout = "l" * len(table.labels) + "r" * len(table.headings)
    tabular = style.to_latex(hrules=True, column_format=layout)
    notes = "\\\\\n".join(escape(note, None) for note in table.notes)
    below = f"\n\\medskip\n{{\\footnotesize\\raggedright\n{notes}\\par}}\n" if notes else ""
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{escape(table.caption)}}}\n"
        f"\\sbox{{\\rgtable}}{{%\n{tabular}}}\\fittable\n{below}\\end{{table}}\n"
    )


def _emphasis(cell: Cell) -> str:
    return {1: "textbf: --rwrap", 2: "underline: --rwrap"}.get(cell.rank, "")


def _character(char: str) -> str:
    if char in SPECIALS:
        return SPECIALS[char]
    if char in SYMBOLS:
        return SYMBOLS[char]
    return (
        char
        if char.isprintable() and ord(char) < 0x180 and (char.isascii() or char.isalpha())
        else f"{{[U+{ord(char):04X}]}}"
    )
