"""Why a target is missed, as far as a result file says it."""

from __future__ import annotations

from typing import Any

from tools.bench.document import fitting
from tools.bench.growth_tables import Results, of_kind
from tools.bench.targets import CACHED, OURS, STEP_GAINS, missed

PLAIN = "plain"
NUM_NAMED = 3


def reasons(found: Results) -> str:
    """A line for each group of missed targets on the CPU; "" where none is missed."""
    names = missed(found)
    lines = []
    for row in _cpu_steps(found):
        if any(name.startswith(f"{row['method']} step on the CPU") for name in names):
            lines.append(_gain(row))
        if row["method"] == "lcd" and any("share of the matmul rate" in name for name in names):
            lines.append(_rate(row))
    if any("all metrics" in name for name in names):
        lines.append(_evaluation(found))
    if any("webdataset" in name for name in names):
        lines.append(_data(found))
    lines += [_whole(content) for content in of_kind(found, "whole") if _is_named(content, names)]
    return "### What the misses come from\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else ""


def _cpu_steps(found: Results) -> list[dict[str, Any]]:
    return [
        row
        for content in of_kind(found, "train-step")
        if content["preset"] == "benchtop" and content["machine"]["device_type"] == "cpu" and not content["overrides"]
        for row in fitting(content["rows"])
    ]


def _gain(row: dict[str, Any]) -> str:
    """How much less arithmetic our steps need: a gain beyond that must come from a higher rate."""
    steps, most = row["steps"], STEP_GAINS[row["method"]]
    flops = {name: steps[name]["flops"] for name in (PLAIN, OURS, CACHED)}
    less = {name: flops[PLAIN] / flops[name] for name in (OURS, CACHED)}
    rate = {name: 100 * steps[name]["share_of_matmul_rate"] for name in (PLAIN, CACHED)}
    verdict = "less than" if less[CACHED] < most else "no less than"
    return (
        f"{row['method']} step: it needs {less[OURS]:.2f} times less arithmetic than the plain step from images and "
        f"{less[CACHED]:.2f} times less from a latents cache, {verdict} the {most} aimed at. The rest is rate: plain "
        f"{rate[PLAIN]:.0f} % of the matmul rate, ours {rate[CACHED]:.0f} %."
    )


def _rate(row: dict[str, Any]) -> str:
    """The rate of the step's own products bounds its share."""
    shapes, large = row["shapes"], row["matmul_flop_per_sec"]["median"]
    own = shapes["flop_per_sec"] / large
    share = row["steps"][OURS]["share_of_matmul_rate"]
    outside = [name for name in ("data", "draws", "text", "optimiser", "ema", "other") if name in (row["parts"] or {})]
    text = (
        f"Share of the matmul rate: the {shapes['num']} heaviest shapes of the LCD step, "
        f"{100 * shapes['share_covered']:.0f} % of its FLOPs, run at {100 * own:.0f} % of the large product's rate "
        f"when nothing else runs, which bounds the step; it reaches {100 * share:.0f} %."
    )
    if outside:
        seconds = sum(row["parts"][name] for name in outside)
        text += f" {', '.join(outside)} take {100 * seconds / sum(row['parts'].values()):.0f} % of its time."
    return text


def _evaluation(found: Results) -> str:
    for content in of_kind(found, "metrics"):
        row = content["rows"][0]
        if content["preset"] != "benchtop" or content["machine"]["device_type"] != "cpu":
            continue
        making = row["generation_per_1000_sec"]
        each = {name: costs["per_1000_sec"] for name, costs in row["alone"].items()}
        heavy = sorted(each, key=lambda name: -each[name])[:NUM_NAMED]
        named = ", ".join(f"{name} {each[name] / making:.2f}" for name in heavy)
        together = row["together"]
        at_end = together["finish_sec"] / (making * row["images"] / 1000)
        return (
            f"Evaluation: of generation's time, the pass takes {together['per_1000_sec'] / making:.2f} and the figures "
            f"at the end {at_end:.2f}; the heaviest metrics alone: {named}."
        )
    return "Evaluation: what each metric costs was not measured (`python -m tools.bench metrics`)."


def _data(found: Results) -> str:
    row = of_kind(found, "data")[0]["rows"][0]
    plain, ours = row["images_per_sec"]["plain"], row["images_per_sec"]["rgbench"]
    return (
        f"webdataset: {row['cores']} threads of one process decode {ours / plain:.2f} times what one plain thread "
        "does; how much of the gap is the interpreter's lock and how much the two cores' shared memory was not "
        "measured."
    )


def _is_named(content: dict[str, Any], names: list[str]) -> bool:
    subject = content["rows"][0]["subject"]
    return not content["overrides"] and any(subject in name and ("whole" in name or "after" in name) for name in names)


def _whole(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    name, seconds = max(row["stages"].items(), key=lambda item: item[1])
    return (
        f"{row['subject']}: its longest stage, {name}, takes {seconds:.0f} s of {row['seconds']:.0f}; the cores were "
        f"busy for {row['cpu_sec']:.0f} s of CPU time."
    )
