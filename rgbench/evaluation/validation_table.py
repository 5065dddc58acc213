"""What planted hacks showed, as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rgbench.evaluation.planting import PER_PROMPT
from rgbench.metrics.contract import Metric
from rgbench.worlds.scenes import IMAGE_SIZE

if TYPE_CHECKING:
    from rgbench.evaluation.rule_check import RuleCheck
    from rgbench.evaluation.validation import Detection

FOUND_AUC = 0.95


def describe(num_sets: int, num_prompts: int) -> str:
    """How many images of what, in words."""
    return f"{num_sets} sets of {num_prompts} prompts × {PER_PROMPT} scenes of {IMAGE_SIZE} px"


def markdown(
    rows: Sequence[Detection],
    shown: Mapping[str, Metric],
    smallest: Mapping[str, Mapping[str, float | None]],
    images: str,
    rule: RuleCheck | None,
) -> str:
    """The table of smallest doses, what a verdict says, and the dose-response of each hack."""
    hacks = list(dict.fromkeys(row.hack for row in rows))
    units = {row.hack: row.unit for row in rows}
    lines = [
        "# Planted hacks",
        "",
        f"Made by `rgbench probes validate`: {images}, clean and with a hack planted.",
        "",
        "## Smallest dose found",
        "",
        f"A dose is found where a hacked set reads worse than a clean one with probability {FOUND_AUC:g} or more, "
        "at it and at every larger dose; — where not even the largest is.",
        "",
        *_table(
            ["figure", *(f"{hack}, {units[hack]}" for hack in hacks)],
            [[metric.label, *(_dose(smallest[hack][name]) for hack in hacks)] for name, metric in shown.items()],
        ),
    ]
    if rule is not None:
        lines += _rule(rule)
    for hack in hacks:
        lines += ["", f"## {hack.capitalize()}: mean (AUC) by dose, {units[hack]}", "", *_response(rows, shown, hack)]
    return "\n".join(lines) + "\n"


def _rule(rule: RuleCheck) -> list[str]:
    judged = ", ".join(rule.families)
    lines = [
        "",
        "## The verdict",
        "",
        f"The rule of `rgbench verdict` on {rule.images}: each set is a student, and they differ by chance alone. "
        f"Families: {judged}. δ is taken from students that are not compared.",
        "",
        *_table(
            ["seeds for δ", "pairs of clean students", "trained reward up", "two families worse", "over-optimised"],
            [
                [str(row.delta_seeds), str(row.pairs), str(row.up), str(row.two_worse), str(row.over_optimised)]
                for row in rule.false_positives
            ],
        ),
        "",
        f"With a hack planted into a student, against another one (of {rule.planted} each, δ from "
        f"{rule.planted_delta_seeds} seeds):",
        "",
        *_table(
            ["hack", "dose", "trained reward up", "two families worse", "over-optimised", "families worse"],
            [
                [
                    row.hack,
                    f"{row.dose:g} {row.unit}",
                    str(row.up),
                    str(row.two_worse),
                    str(row.over_optimised),
                    ", ".join(f"{name} {num}" for name, num in row.worse.items()) or "none",
                ]
                for row in rule.found
            ],
        ),
    ]
    return lines


def _response(rows: Sequence[Detection], shown: Mapping[str, Metric], hack: str) -> list[str]:
    doses = sorted({row.dose for row in rows if row.hack == hack})
    found = {(row.metric, row.dose): row for row in rows if row.hack == hack}
    body = []
    for name, metric in shown.items():
        first = found[name, doses[0]]
        unit = f", {metric.unit}" if metric.unit else ""
        clean = f"{first.clean:.{metric.decimals}f} ± {first.deviation:.{metric.decimals}f}"
        cells = [f"{found[name, d].hacked:.{metric.decimals}f} ({found[name, d].auc:.2f})" for d in doses]
        body.append([f"{metric.label}{unit}", clean, *cells])
    return _table(["figure", "clean ± deviation", *(f"{dose:g}" for dose in doses)], body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, body)]


def _dose(dose: float | None) -> str:
    return "—" if dose is None else f"{dose:g}"
