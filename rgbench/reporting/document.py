"""The Markdown report: what was compared, the reading in words, tables, pictures, protocols, commands."""

from __future__ import annotations

from rgbench.reporting.gather import Comparison
from rgbench.reporting.markdown import escape, escape_note, markdown_table
from rgbench.reporting.protocols import protocol_notes
from rgbench.reporting.sections import Section

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
