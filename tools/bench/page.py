"""``docs/performance.md`` from the result files: no figure in it stands anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench import document
from tools.bench.document import DOES_NOT_FIT, fitting
from tools.bench.growth import growth
from tools.bench.growth_tables import NONE, Results, metrics
from tools.bench.growth_tables import table as rows
from tools.bench.reasons import reasons
from tools.bench.targets import targets

INTRO = """# Performance

Written by `python -m tools.bench table` from the files in [`results/bench/`](../results/bench); the command
that made each file is in it, and at the head of each section here; how often each was timed is its `--rounds`, written in the file. Times
are medians, in brackets the 95 % bootstrap interval of the median. Repeat a command on an idle machine: other processes
cost what the table beside a busy one says.

**How it is measured.** A step is timed beside the plain reference step
([`rgbench/bench/plain.py`](../rgbench/bench/plain.py)): the textbook implementation, with separate teacher passes, an
EMA and AdamW that go through the parameters one at a time, and encoding, decoding and text towers run at every use.
Both run in one process with the same threads and allocator, in turn, and a ratio is taken pair by pair. The tests
compare the gradients of both (relative difference at most 1e-5 in float32, 1e-10 in float64).

FLOPs are torch's own count of the step as it runs: two per multiply-add of matrix products, convolutions and attention,
forward and backward; nothing else is in it. Bytes are the inputs and outputs of every operator, each once, as if no
cache lay between two operators. The floor is the larger of FLOPs over the rate of a large square product and bytes over
the rate of a large copy, both measured between the steps. Bytes are what an eager step moves at most: a small model
whose tensors stay in the processor's cache can be faster than its traffic floor.

Time by part comes from one timeline that hooks switch on entry to a network, on leaving it, and in the backward pass
when a gradient arrives at its output.
"""


def page(folder: Path) -> str:
    """The page's text.

    Args:
        folder: of the result files; what is not in it is called not measured.

    Raises:
        UsageError: a damaged file, or one of another version.
    """
    found = document.read_all(folder)
    sections = [INTRO, "## Targets\n", targets(found), reasons(found)]
    for what, render in (
        ("train-step", _train_step),
        ("levers", _levers),
        ("compile", _compile),
        ("process-tuning", _process),
        ("generate", _generate),
        ("eval", _evaluation),
        ("metrics", _metrics),
        ("fid", _fid),
        ("data", _data),
        ("start", _start),
        ("whole", _whole),
    ):
        for content in _of(found, what):
            sections += [render(content)]
    return "\n".join([*sections, growth(found)]).rstrip() + "\n"


def _of(found: Results, what: str) -> list[dict[str, Any]]:
    """Results of one kind; the script of process tuning writes no kind, but its name."""
    return [content for name, content in found.items() if content.get("what", name) == what]


def spread(value: dict[str, Any], digits: int = 2) -> str:
    """Median and interval."""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _head(title: str, content: dict[str, Any]) -> str:
    machine = content["machine"]
    threads = "" if machine["device_type"] == "cuda" else f", {machine['threads']} threads on {machine['cores']} cores"
    versions = f"torch {machine['versions']['torch']}"
    return f"## {title}\n\n{machine['device']}{threads}, {versions}. `{content['command']}`\n"


def _train_step(content: dict[str, Any]) -> str:
    first = content["rows"][0]
    title = f"A training step: {content['preset']}, batch {first['batch_size']}, {first['dtype']}"
    if content["overrides"]:
        title += f", {' '.join(content['overrides'])}"
    body, parts = [], []
    for row in content["rows"]:
        if DOES_NOT_FIT in row:
            body.append((row["method"], f"batch {row['batch_size']}", "does not fit", *NONE * 8))
            continue
        for name, step in row["steps"].items():
            gain = row["ratio_to_plain"].get(name)
            memory = row["peak_memory"][name]["bytes"] / 2**30
            body.append((
                row["method"], name, spread(step["seconds"], 3), "1" if gain is None else spread(gain),
                f"{step['images_per_sec']:.1f}", f"{step['flops'] / 1e9:.1f}", f"{step['bytes'] / 1e9:.2f}",
                f"{step['floor_arithmetic_sec']:.3f}", f"{step['floor_traffic_sec']:.3f}",
                f"{100 * step['share_of_matmul_rate']:.0f} %", f"{memory:.2f}",
            ))  # fmt: skip
        rate, own = row["matmul_flop_per_sec"], row["shapes"]
        parts.append(
            f"{row['method']}: large product {rate['median'] / 1e9:.1f} GFLOP/s, the step's own "
            f"{own['num']} heaviest shapes together {own['flop_per_sec'] / 1e9:.1f} GFLOP/s, copy "
            f"{row['copy_bytes_per_sec']['median'] / 1e9:.1f} GB/s."
        )
    heads = ("method", "step", "seconds", "× plain", "images/s", "GFLOP", "GB moved", "floor, arithmetic (s)",
             "floor, traffic (s)", "of matmul rate", "peak GiB")  # fmt: skip
    text, measured = [_head(title, content), rows(heads, body)], fitting(content["rows"])
    if measured:
        text.append(f"Peak memory: {measured[0]['peak_memory']['plain']['what']}. {' '.join(parts)}\n")
    return "\n".join([*text, _parts(measured), _beside(measured)])


def _parts(measured: list[dict[str, Any]]) -> str:
    """Time by part, of each method, heaviest first."""
    timed = [row for row in measured if row["parts"]]
    if not timed:
        return ""
    names = sorted(
        {name for row in timed for name in row["parts"]}, key=lambda n: -max(r["parts"].get(n, 0) for r in timed)
    )
    body = []
    for name in names:
        cells = []
        for row in timed:
            value, total = row["parts"].get(name), sum(row["parts"].values())
            cells.append("–" if value is None else f"{value:.3f} s, {100 * value / total:.1f} %")
        body.append((name, *cells))
    return "Where the time of our step goes:\n\n" + rows(("part", *(row["method"] for row in timed)), body)


def _beside(measured: list[dict[str, Any]]) -> str:
    timed = [row for row in measured if row["beside_busy_process"]]
    if not timed:
        return ""
    body = []
    for row in timed:
        found = row["beside_busy_process"]
        body.append((row["method"], *(spread(found[key]) for key in ("idle_sec", "busy_sec", "times_idle"))))
    return "Beside one busy process:\n\n" + rows(("method", "alone (s)", "beside it (s)", "times"), body)


def _levers(content: dict[str, Any]) -> str:
    body = []
    for row in content["rows"]:
        kept = "kept" if row["kept"] else "dropped"
        if DOES_NOT_FIT in row:
            body.append((row["lever"], kept, "does not fit", *NONE * 3))
            continue
        times = [spread(row[key], 4) for key in ("without_sec", "with_sec")]
        body.append((row["lever"], kept, *times, spread(row["gain"]), f"{100 * row['step_share']:+.1f} %"))
    heads = ("lever", "", "without (s)", "with (s)", "gain", "saved of a plain step")
    about = "Each lever alone, with and without in turn. `bfloat16` changes the numbers, the others their rounding.\n"
    return "\n".join([_head(f"Levers: {content['preset']}", content), about, rows(heads, body)])


def _compile(content: dict[str, Any]) -> str:
    body = []
    for row in content["rows"]:
        if DOES_NOT_FIT in row:
            body.append((row["method"], f"batch {row['batch_size']}", "does not fit", *NONE * 6))
            continue
        for choice, found in row["compiled"].items():
            pays = found["steps_to_pay"]
            body.append((
                row["method"], choice, spread(row["eager_sec"], 3), spread(found["seconds"], 3), spread(found["gain"]),
                f"{found['compile_sec']:.0f}", "never" if pays is None else f"{pays:.0f}",
                f"{max(found['gradient_difference'].values()):.0e}", f"{max(row['rounding_difference'].values()):.0e}",
            ))  # fmt: skip
    heads = ("method", "compiled", "without (s)", "with (s)", "gain", "compiling (s)", "steps until it pays",
             "gradients apart", "by order alone")  # fmt: skip
    about = (
        "Whole steps, with and without in turn. `recipe` is what `train.compile: true` compiles: teacher, student and "
        "target; `all` adds the autoencoder's halves, the text encoder and the image towers of reward and proxy. "
        "Compiling begins with an empty cache. Gradients apart: |a − b| / |b| of one batch; by order alone: the "
        "same without compilation, its UNets in NHWC, which changes nothing but the order of sums.\n"
    )
    return "\n".join([_head(f"Compilation: {content['preset']}", content), about, rows(heads, body)])


def _process(content: dict[str, Any]) -> str:
    body = [
        (r["setting"], f"{r['idle_sec']:.3f}", f"{r['idle_gain']:.2f}", f"{r['busy_sec']:.3f}", f"{r['busy_cost']:.2f}")
        for r in content["rows"]
    ]
    heads = ("setting", "idle (s)", "gain over default", "beside a busy process (s)", "times idle")
    command = "`python docs/measure/process_tuning.py`"
    return f"## Allocator and threads\n\n{content['unit']}. {command}\n\n" + rows(heads, body)


def _generate(content: dict[str, Any]) -> str:
    body = []
    for row in content["rows"]:
        apart, rate = row["difference"], row["images_per_sec"]
        body.append((
            f"{row['steps']} steps, {row['resolution']} px, batch {row['batch_size']}, {row['dtype']}",
            f"{rate['rgbench']:.2f}", f"{rate['plain']:.2f}", spread(row["ratio_to_plain"]),
            f"{100 * apart['share_within_2_of_255']:.2f} %", f"{apart['psnr_db']:.1f}",
        ))  # fmt: skip
    heads = ("", "rgbench (images/s)", "diffusers (images/s)", "ratio", "values within 2/255", "PSNR (dB)")
    return "\n".join([_head(f"Generation: {content['preset']}", content), rows(heads, body)])


def _evaluation(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    body = [_outside_cells(row, str(row["images"]))]
    if "estimated" in row:
        half = row["rounds"][0]
        body = [_outside_cells(half, str(half["images"])), *body]
        body.append(_outside_cells(row["estimated"], f"{row['estimated']['images']}, drawn on from both"))
    heads = ("images", "whole (s)", "generation (s)", "× generation", "outside generation")
    title = f"One evaluation: {content['preset']}"
    return "\n".join([_head(title, content), f"Metrics: {', '.join(row['metrics'])}.\n", rows(heads, body)])


def _outside_cells(row: dict[str, Any], images: str) -> tuple[str, ...]:
    return (images, f"{row['seconds']:.1f}", f"{row['generation_sec']:.1f}", f"{row['times_generation']:.2f}",
            f"{100 * row['share_outside_generation']:.0f} %")  # fmt: skip


def _metrics(content: dict[str, Any]) -> str:
    return "\n".join([_head(f"What each metric costs: {content['preset']}", content), metrics(content)])


def _fid(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    solve, ends = row["solve"], row["end_to_end"]
    body = [(name, spread(value)) for name, value in solve["seconds"].items()]
    peaks = ", ".join(f"{n} samples {b / 2**20:.0f} MiB" for n, b in row["moments_peak_bytes"].items())
    rates = ends["images_per_sec"]
    return "\n".join([
        _head(f"Fréchet distance at d = {solve['dim']}", content), rows(("solve", "seconds"), body),
        f"Times `numpy.linalg.eigvalsh` twice: {spread(solve['times_eigvalsh_twice'])}; gain over clean-fid "
        f"{spread(solve['gain_over_clean_fid'])}; relative difference {solve['relative_difference']:.1e}. "
        f"Peak memory of gathering moments: {peaks}.\n",
        f"From {ends['images']} images of {ends['side']} px to moments, Inception with random weights: "
        f"{rates['rgbench']:.2f} images/s, clean-fid's folder route {rates['clean-fid']:.2f}, ratio "
        f"{spread(ends['gain_over_clean_fid'])}.\n",
    ])  # fmt: skip


def _data(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    files, rate = row["files"], row["images_per_sec"]
    return "\n".join([
        _head("Data", content),
        f"JPEG of {files['width']}×{files['height']} px ({files['bytes_mean'] / 1e3:.0f} kB) to {row['resolution']} "
        f"px: webdataset {rate['rgbench']:.1f} images/s on {row['cores']} cores, plain PIL in one thread "
        f"{rate['plain']:.1f}; {100 * row['share_of_plain_times_cores']:.0f} % of plain × cores.\n",
    ])  # fmt: skip


def _start(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    return "\n".join([
        _head("Start-up", content),
        f"`rgbench train` to its first step: {spread(row['train_to_first_step_sec'], 1)} s. "
        f"`rgbench --help`: {spread(row['help_cpu_sec'])} s of CPU time.\n",
    ])  # fmt: skip


def _whole(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    title = "`make demo`" if row["subject"] == "demo" else f"`rgbench train {row['subject']}`"
    body = [(name, f"{seconds:.1f}") for name, seconds in row["stages"].items()]
    return "\n".join([
        _head(f"{title} from its command to its last file", content),
        "In an empty folder with empty caches, in fresh processes, after `make install`.\n",
        rows(("stage", "seconds"), [*body, ("**together**", f"{row['seconds']:.1f}")]),
        f"{row['cpu_sec']:.0f} s of CPU time; the largest process took {row['peak_rss_bytes'] / 2**30:.2f} GiB.\n",
    ])  # fmt: skip
