"""Text of ``docs/performance.md``, from the result files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.processes import GPU_SETTINGS, LOW_MEMORY
from tools.bench.timing import DOES_NOT_FIT, read_all

Results = Sequence[dict[str, Any]]
Row = dict[str, Any]

OURS, CACHED, PLAIN = "rgbench", "rgbench, latents cached", "plain"
INTRO = """# Performance

Written by `python -m tools.bench page` from the files in `results/bench`. Each file holds the command that made it, the
revision, the machine and the library versions. Times are medians, in brackets the 95 % bootstrap interval of the
median. Repeat a command on an idle machine:

```bash
python -m tools.bench step                  # optimiser steps beside plain ones
python -m tools.bench methods               # steps of the other methods beside LCD's
python -m tools.bench script COPY           # COPY: diffusers' train_lcm_distill_sd_wds.py
python -m tools.bench students lrm
python -m tools.bench students demo
python -m tools.bench generate
python -m tools.bench eval
python -m tools.bench gpu                   # all rows that need a CUDA GPU
python -m tools.bench page
```

A step is timed beside the plain reference step ([`tools/bench/plain.py`](../tools/bench/plain.py)): the textbook
implementation, with separate teacher passes, an EMA and AdamW that go through the parameters one at a time, and
encoders, decoder and text towers run at every use. Both run in one process with the same networks, threads and
allocator, in turn, and ratios are taken pair by pair. Tests compare the gradients of both (relative difference at most
1e-5 in float32, 1e-10 in float64). FLOPs are torch's count of the step as it runs: two per multiply-add of matrix
products, convolutions and attention, forward and backward. The matmul rate is that of one large square product, timed
between the steps. The plain step's share of it bounds what another step can gain: at 80 %, a step of equal FLOPs is at
most 1.25 times as fast.
"""
ON_GPU = """Rows that need a GPU take networks of SD2.1-base's shape with random weights, nothing to download. RG-LCD
takes a batch of 4, for it and the plain step beside it keep the decoder's graph of every image. 30,000 images are
extrapolated from two measured sizes.
"""

SCRIPT = (
    "On a CPU the script computes its teacher in bfloat16, the default of torch's autocast there. The copy left out "
    "options and branches that do not run here."
)


def page(folder: Path) -> str:
    """Write the page's text.

    Args:
        folder: of the result files; targets without a file are listed as not measured.

    Raises:
        UsageError: a damaged file, or one of another schema version.
    """
    found = read_all(folder)
    lines = table(("", "target", "measured", ""), _targets(found))
    sections = [INTRO, "## Targets\n", lines, ON_GPU]
    for what, render in (
        ("step", _step),
        ("methods", _methods),
        ("script", _script),
        ("students", _students),
        ("generate", _generate),
        ("eval", _evaluation),
    ):
        sections += [render(content) for content in found if content["what"] == what]
    return "\n".join(sections)


def _targets(found: Results) -> list[Sequence[str]]:
    """Aims of the project: name, limit, measured value, whether it holds."""
    cpu = partial(_row, found, preset="benchtop", device="cpu")
    gpu = partial(_row, found, preset="sd21-base", device="cuda")
    gains = {"lcd": 1.3, "rg_lcd": 1.5, "lrm": 1.5}
    lines = [
        _line(f"{name} step on the CPU, benchtop, × plain", f"≥ {gain}", cpu("step", method=name), _gain)
        for name, gain in gains.items()
    ]
    lines += [
        _line("LCD step, benchtop, share of the matmul rate", "≥ 50 %", cpu("step", method="lcd"), _share),
        _line("`rgbench train lcd`, whole process, × diffusers' script", "≥ 2", cpu("script"), _ratio),
        _line("`rgbench train lrm`, command to last file", "≤ 300 s", cpu("students", preset="lrm"), _train),
        _line("`make demo` after install", "≤ 600 s", cpu("students", preset="demo"), _whole),
        _line("evaluation with all metrics, benchtop, × generation", "≤ 2.5", cpu("eval"), _times),
        _line("generated values within 2/255 of diffusers', benchtop", "≥ 99.9 %", cpu("generate"), _pixels),
    ]
    for name, own in GPU_SETTINGS.items():
        batch = "".join(f", batch {setting.partition('=')[2]}" for setting in own)
        row = gpu("step", settings=own, method=name)
        lines.append(_line(f"{name} step on a GPU, SD2.1-base shape, bfloat16{batch}, × plain", "≥ 1.5", row, _gain))
        row = gpu("step", settings=(LOW_MEMORY, *own), method=name)
        lines.append(_line(f"{name} step{batch}, low-memory settings, peak memory × plain", "≤ 0.65", row, _memory))
    bfloat16, float32 = (gpu("generate", dtype=dtype) for dtype in ("bfloat16", "float32"))
    lines += [
        _line("LCD step on a GPU, share of the matmul rate", "≥ 35 %", gpu("step", method="lcd"), _share),
        _line("evaluation of 30,000 images on one GPU, outside generation", "≤ 15 %", gpu("eval"), _outside),
        _line("generation on a GPU, 4 steps, 512 px, bfloat16, × diffusers", "≥ 1.3", bfloat16, _ratio),
        _line("generated values within 2/255 of diffusers', 512 px, float32", "≥ 99.9 %", float32, _pixels),
        _line("generated images, 512 px, bfloat16, PSNR to diffusers'", "≥ 35 dB", bfloat16, _psnr),
    ]
    return lines


def _row(
    found: Results, what: str, preset: str, device: str, settings: Sequence[str] = (), **values: Any
) -> Row | None:
    """The first row with these values among the results of these settings and no others."""
    wanted = (what, preset, device, sorted(settings))
    for content in found:
        own = sorted(content.get("overrides") or ())
        if (content["what"], content["preset"], content["machine"]["device_type"], own) == wanted:
            for row in content["rows"]:
                if all(row.get(key) == value for key, value in values.items()):
                    return row
    return None


def _line(name: str, limit: str, row: Row | None, read: Callable[[Row], float | tuple[float, str]]) -> Sequence[str]:
    """Hold a row to a limit such as ``≤ 300 s``.

    ``read`` gives the row's value; and the words that show it, where these are not the value with its unit.
    """
    if row is None:
        return name, limit, "not measured", ""
    if DOES_NOT_FIT in row:
        return name, limit, "does not fit", "**misses**"
    sign, number, *unit = limit.split()
    found = read(row)
    value, words = found if isinstance(found, tuple) else (found, " ".join([f"{found:.2f}", *unit]))
    holds = value >= float(number) if sign == "≥" else value <= float(number)
    return name, limit, words, "holds" if holds else "**misses**"


def _gain(row: Row) -> tuple[float, str]:
    """The better of the steps that a user can choose."""
    images, cached = (row["ratio_to_plain"][name]["median"] for name in (OURS, CACHED))
    return max(images, cached), f"{images:.2f} from images, {cached:.2f} from cached latents"


def _share(row: Row) -> tuple[float, str]:
    """The step from images decides, which every recipe can take."""
    images, cached = (100 * row["steps"][name]["share_of_matmul_rate"] for name in (OURS, CACHED))
    return images, f"{images:.0f} % from images, {cached:.0f} % from cached latents"


def _memory(row: Row) -> float:
    return row["steps"][OURS]["peak_bytes"] / row["steps"][PLAIN]["peak_bytes"]


def _ratio(row: Row) -> float:
    return row["ratio"]["median"]


def _train(row: Row) -> tuple[float, str]:
    seconds = row["stages"]["train"]["seconds"]
    return seconds, f"{seconds:.0f} s"


def _whole(row: Row) -> tuple[float, str]:
    return row["seconds"], f"{row['seconds']:.0f} s"


def _times(row: Row) -> tuple[float, str]:
    """With the number of images: what is done once weighs less the more there are."""
    return row["times_generation"], f"{row['times_generation']:.2f} of {row['images']:,} images"


def _outside(row: Row) -> tuple[float, str]:
    share = 100 * (1 - 1 / row["estimated"]["times_generation"])
    half, whole = (each["images"] for each in row["rounds"])
    return share, f"{share:.0f} %, extrapolated from {half:,} and {whole:,} images"


def _pixels(row: Row) -> float:
    return 100 * row["difference"]["share_within_2_of_255"]


def _psnr(row: Row) -> float:
    return row["difference"]["psnr_db"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned.

    Raises:
        ValueError: a row with another number of cells than heads.
    """
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"{len(row)} cells under {len(heads)} heads: {row}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _spread(value: dict[str, Any], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _head(title: str, content: dict[str, Any]) -> str:
    machine, settings = content["machine"], " ".join(content.get("overrides") or ())
    threads = "" if machine["device_type"] == "cuda" else f", {machine['threads']} threads on {machine['cores']} cores"
    about = f"{machine['device']}{threads}, torch {machine['versions']['torch']}. `{content['command']}`"
    return f"## {title}{', ' if settings else ''}{settings}\n\n{about}\n"


def _step(content: dict[str, Any]) -> str:
    body: list[Sequence[str]] = []
    for row in content["rows"]:
        method = f"{row['method']}, batch {row['batch_size']}, {row['dtype']}"
        if DOES_NOT_FIT in row:
            body.append((method, "does not fit", *("–",) * 7))
            continue
        plain = row["steps"][PLAIN]["flops"]
        for name, step in row["steps"].items():
            gain = row["ratio_to_plain"].get(name)
            peak = "–" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 2**30:.2f}"
            body.append((
                method, name, _spread(step["seconds"], 3), "1" if gain is None else _spread(gain),
                f"{step['images_per_sec']:.1f}", f"{step['flops'] / 1e9:.1f}", f"{step['flops'] / plain:.2f}",
                f"{100 * step['share_of_matmul_rate']:.0f} %", peak,
            ))  # fmt: skip
    heads = (
        "method",
        "step",
        "seconds",
        "× plain",
        "images/s",
        "GFLOP",
        "FLOPs, × plain",
        "of matmul rate",
        "peak GiB",
    )
    return "\n".join([_head(f"A training step: {content['preset']}", content), table(heads, body)])


def _methods(content: dict[str, Any]) -> str:
    *steps, proxy = content["rows"]
    body = [
        (row["method"], f"{row['flops'] / 1e9:.1f}", f"{row['flops_to_lcd']:.2f}", _spread(row["seconds_to_lcd"]))
        for row in steps
    ]
    return "\n".join([
        _head("Steps of the methods: benchtop, from encoded images", content),
        table(("method", "GFLOP", "FLOPs, × LCD", "seconds, × LCD"), body),
        f"DOLLAR's proxy takes {100 * proxy['flops_to_lrm']:.1f} % of the FLOPs of an LRM step.\n",
    ])  # fmt: skip


def _script(content: dict[str, Any]) -> str:
    body = [
        (name, f"{row['steps']}", _spread(seconds, 1))
        for row in content["rows"]
        for name, seconds in row["seconds"].items()
    ]
    gain = _spread(content["rows"][0]["ratio"])
    title = "LCD as a whole process, beside diffusers' script"
    text = f"rgbench is {gain} × as fast. {SCRIPT}\n"
    return "\n".join([_head(title, content), table(("", "steps", "seconds"), body), text])


def _students(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    body = [(name, f"{stage['seconds']:.1f}", f"{stage['cpu_sec']:.0f}") for name, stage in row["stages"].items()]
    subject = "`make demo`" if row["subject"] == "demo" else row["subject"]
    text = f"{row['students_per_hour']:.1f} students trained and evaluated per hour.\n"
    head = _head(f"Students per hour: {subject}", content)
    return "\n".join([head, table(("command", "seconds", "CPU seconds"), body), text])


def _generate(content: dict[str, Any]) -> str:
    body: list[Sequence[str]] = []
    for row in content["rows"]:
        if DOES_NOT_FIT in row:
            body.append((f"batch {row['batch_size']}, {row['dtype']}", "does not fit", *("–",) * 4))
            continue
        apart, rate = row["difference"], row["images_per_sec"]
        body.append((
            f"{row['resolution']} px, batch {row['batch_size']}, {row['dtype']}", f"{rate['rgbench']:.2f}",
            f"{rate['diffusers']:.2f}", _spread(row["ratio"]), f"{100 * apart['share_within_2_of_255']:.2f} %",
            f"{apart['psnr_db']:.1f}",
        ))  # fmt: skip
    heads = ("4 steps", "rgbench (images/s)", "diffusers (images/s)", "ratio", "values within 2/255", "PSNR (dB)")
    return "\n".join([_head(f"Generation: {content['preset']}", content), table(heads, body)])


def _evaluation(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    if DOES_NOT_FIT in row:
        return "\n".join([_head(f"One evaluation: {content['preset']}", content), "Does not fit.\n"])
    timed = [(f"{row['images']:,}", row)]
    if "estimated" in row:
        timed = [(f"{each['images']:,}", each) for each in row["rounds"]]
        timed.append((f"{row['estimated']['images']:,}, extrapolated", row["estimated"]))
    body = [
        (images, f"{each['seconds']:.1f}", f"{each['generation_sec']:.1f}", f"{each['times_generation']:.2f}")
        for images, each in timed
    ]
    heads = ("images", "whole (s)", "generation (s)", "× generation")
    head = _head(f"One evaluation: {content['preset']}", content)
    return "\n".join([head, f"Metrics: {', '.join(row['metrics'])}.\n", table(heads, body)])
