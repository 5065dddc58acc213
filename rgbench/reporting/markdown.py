"""Tables and prose as GitHub Markdown."""

from __future__ import annotations

import re

from rgbench.reporting.tables import Cell, Table

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
