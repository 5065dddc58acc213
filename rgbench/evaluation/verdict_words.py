"""What a verdict says: its kind, and a few sentences for people who will act on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rgbench.evaluation.verdict import (
    FAMILIES,
    MIN_SEEDS,
    MIN_WORSE,
    Change,
    FalsePositives,
    Figures,
    Judgement,
    trained_keys,
)

Kind = Literal["over-optimised", "not over-optimised", "no gain", "none"]
UNITS = {"%": "points"}  # of a difference: 2 % of what would be the question


def explain(
    model: str, base: str, figures: Figures, found: Judgement, seeds: Sequence[str], wrong: FalsePositives | None
) -> tuple[Kind, str]:
    """The kind of verdict, and its words.

    Args:
        model: name.
        base: name of the LCD student that it is compared with.
        figures: of the model.
        found: what the rule says.
        seeds: names of the LCD students that δ is taken from.
        wrong: how often the rule finds fault with those; None with fewer than 7 of them.
    """
    pair = f"{model} against {base}"
    if reason := _why_none(figures, found, base, len(seeds)):
        return "none", f"no verdict on {pair}: {reason}"
    kind, words = _ruling(pair, figures, found)
    return kind, f"{words} {_errors(wrong, seeds)}"


def _why_none(figures: Figures, found: Judgement, base: str, num_seeds: int) -> str:
    if not trained_keys(figures):
        return (
            "the reward that it was trained on was not measured, or is not known; evaluate with --metric hps, or of a "
            "model trained elsewhere name it: --reward hps_aa1"
        )
    if num_seeds < MIN_SEEDS:
        return (
            f"what training seeds alone differ by takes {MIN_SEEDS} students like {base}, of the same settings, and "
            f"here {'is' if num_seeds == 1 else 'are'} {num_seeds}; train more seeds and evaluate them. The "
            "differences are given without it."
        )
    if not found.rewards:
        return "the trained reward was not measured on both and on every seed"
    if len(found.families) < MIN_WORSE:
        measured = ", ".join(found.families) or "none"
        return (
            f"it takes {MIN_WORSE} families of figures that both models and every seed have, and there "
            f"{'is' if len(found.families) == 1 else 'are'}: {measured}; evaluate with --metric probes too"
        )
    return ""


def _ruling(pair: str, figures: Figures, found: Judgement) -> tuple[Kind, str]:
    share = f"{len(found.worse)} of {len(found.families)} measured families are worse"
    if len(found.worse) == 1:
        share = share.replace("are worse", "is worse")
    reasons = [_reason(name, found.families[name], figures) for name in found.worse]
    listed = f": {'; '.join(reasons)}" if reasons else ""
    better = f" Better beyond δ, and nowhere worse: {', '.join(found.better)}." if found.better else ""
    missing = [name for name in FAMILIES if name not in found.families]
    unseen = f" Not measured: {', '.join(missing)}." if missing else ""
    rest = f"{share}{listed}.{better}{unseen}"
    if not found.up:
        return "no gain", f"{pair}: the trained reward is not up beyond what seeds differ by; {rest}"
    gain = max(found.rewards, key=lambda change: change.found.value)
    text = f"{pair}: the trained reward is up ({_amount(gain, figures)}), and {rest}"
    if found.over_optimised:
        return "over-optimised", f"Over-optimised. {text}"
    return "not over-optimised", f"Not shown to be over-optimised. {text}"


def _errors(wrong: FalsePositives | None, seeds: Sequence[str]) -> str:
    """Where δ is from, and how often the rule errs on the same students."""
    if wrong is None:
        return (
            f"δ is from {len(seeds)} LCD seeds. The rule's false-positive rate is not known: that takes "
            f"{MIN_SEEDS + 2} of them."
        )
    share, low, high = (100 * x for x in (wrong.over_optimised / wrong.pairs, wrong.interval.low, wrong.interval.high))
    return (
        f"δ is from {len(seeds)} LCD seeds. Among them, with δ from those that are not compared, the rule calls "
        f"{wrong.over_optimised} of {wrong.pairs} pairs over-optimised ({share:.0f} %; 95 % "
        f"interval {low:.0f} to {high:.0f} %, for the pairs share seeds) and finds two families worse in "
        f"{wrong.two_worse}."
    )


def _reason(family: str, changes: Sequence[Change], figures: Figures) -> str:
    worst = max((c for c in changes if c.worse), key=lambda c: c.found.value / (c.delta or c.found.value))
    better = sum(change.better for change in changes)
    mixed = f", though {better} of its {len(changes)} figures {'is' if better == 1 else 'are'} better" if better else ""
    return f"{family} ({_amount(worst, figures)}{mixed})"


def _amount(change: Change, figures: Figures) -> str:
    """Such as ``HFER gap by 1.20 dB [1.00, 1.40], δ 0.31``."""
    metric, found = figures[change.key].metric, change.found
    unit = f" {UNITS.get(metric.unit, metric.unit)}" if metric.unit else ""
    shown = [f"{x:.{metric.decimals}f}" for x in (found.value, found.low, found.high, change.delta) if x is not None]
    return f"{metric.label} by {shown[0]}{unit} [{shown[1]}, {shown[2]}], δ {shown[3]}"
