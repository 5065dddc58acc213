"""The targets of the page: what was aimed at and what the result files say, or that it was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tools.bench.document import DOES_NOT_FIT

Results = dict[str, dict[str, Any]]
Found = tuple[str, bool] | None

OURS, CACHED = "rgbench", "rgbench, latents cached"
STEP_GAINS = {"lcd": 1.3, "rg_lcd": 1.5, "lrm": 1.5}
GPU_GAIN, GPU_SHARE, GENERATION_GAIN = 1.5, 0.35, 1.3
SHARE_OF_RATE, BUSY_COST, START_SEC, HELP_SEC = 0.5, 2.0, 15.0, 0.4
DATA_SHARE, EVAL_TIMES, FID_TIMES = 0.9, 2.5, 1.0
LOW_MEMORY = 0.65
MEMORY_BYTES = 24e9
SMALL_BATCH = 4
# RG-LCD keeps the decoder's graph of every image: the recipe's 16 and the plain step beside them fit no card of 80 GB.
GPU_SETTINGS = {"lcd": [], "rg_lcd": [f"train.batch_size={SMALL_BATCH}"], "lrm": []}
LOW_MEMORY_SETTINGS = {method: ["train.gradient_checkpointing=true", *own] for method, own in GPU_SETTINGS.items()}
OUTSIDE = 0.15
SAME_VALUES, SAME_DB = 0.999, 35.0
WHOLE_SEC = {"lrm": 300.0, "demo": 720.0}
WHOLE_NAMES = {"lrm": "`recipes/lrm.yaml` whole", "demo": "`make demo` after install"}

ON_GPU = """Rows that need a GPU are measured by one command, `python -m tools.bench gpu`: networks of SD2.1-base's shape
with random weights, so nothing is downloaded; `python -m tools.bench table` then writes this page. They take the
recipes' batch of 16, but RG-LCD one of 4: with 16 its decoder's graph and the plain step beside it fit no card of 80 GB. A row that does
not fit the GPU says so. What 30,000 images cost is drawn on from the two sizes named beside the figure. Until then they
say not measured; the tests run the same code at tiny width on the CPU.
"""


def _rows(found: Results, what: str, preset: str, device: str, settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of the recipes' own settings, or of those with ``settings`` and no others."""
    return [
        row
        for content in found.values()
        if content.get("what") == what
        and content["preset"] == preset
        and content["machine"]["device_type"] == device
        and sorted(content.get("overrides") or ()) == sorted(settings)
        for row in content["rows"]
    ]


def _step(
    preset: str, device: str, method: str, read: Callable[[dict[str, Any]], Found], settings: Sequence[str] = ()
) -> Callable[[Results], Found]:
    """What ``read`` finds in the row of a method's step; one that does not fit the memory misses its target."""

    def find(found: Results) -> Found:
        for row in _rows(found, "train-step", preset, device, settings):
            if row["method"] == method:
                return ("does not fit", False) if DOES_NOT_FIT in row else read(row)
        return None

    return find


def _gain(
    preset: str, device: str, method: str, least: float, settings: Sequence[str] = ()
) -> Callable[[Results], Found]:
    """The best of our steps that a user can choose: from images, or from a latents cache."""

    def read(row: dict[str, Any]) -> Found:
        image, cached = (row["ratio_to_plain"][name]["median"] for name in (OURS, CACHED))
        return f"{image:.2f} from images, {cached:.2f} from a latents cache", max(image, cached) >= least

    return _step(preset, device, method, read, settings)


def _share(preset: str, device: str, least: float) -> Callable[[Results], Found]:
    """The step from images decides, which every recipe takes; the one from a latents cache is shown beside it."""

    def read(row: dict[str, Any]) -> Found:
        image, cached = (row["steps"][name]["share_of_matmul_rate"] for name in (OURS, CACHED))
        return f"{100 * image:.0f} % from images, {100 * cached:.0f} % from a latents cache", image >= least

    return _step(preset, device, "lcd", read)


def _busy(method: str) -> Callable[[Results], Found]:
    def read(row: dict[str, Any]) -> Found:
        if not row["beside_busy_process"]:
            return None
        times = row["beside_busy_process"]["times_idle"]["median"]
        return f"{times:.2f}", times <= BUSY_COST

    return _step("benchtop", "cpu", method, read)


def _figure(what: str, preset: str, device: str, read: Callable[[dict[str, Any]], Any], limit: float, least: bool,
            unit: str = "") -> Callable[[Results], Found]:  # fmt: skip
    """One number of the first row of a kind; ``least`` where it must be at least the limit."""

    def find(found: Results) -> Found:
        for row in _rows(found, what, preset, device):
            value = float(read(row))
            return f"{value:.2f}{unit}", value >= limit if least else value <= limit
        return None

    return find


def _low_memory(method: str) -> Callable[[Results], Found]:
    def read(row: dict[str, Any]) -> Found:
        share = row["peak_memory"][OURS]["bytes"] / row["peak_memory"]["plain"]["bytes"]
        return f"{share:.2f}", share <= LOW_MEMORY

    return _step("sd21-base", "cuda", method, read, LOW_MEMORY_SETTINGS[method])


def _same(preset: str, device: str, dtype: str) -> Callable[[Results], Found]:
    """How far our images lie from diffusers' with the same noise: in float32 by values, else by PSNR."""

    def find(found: Results) -> Found:
        for row in _rows(found, "generate", preset, device):
            apart = row["difference"]
            share, ratio = apart["share_within_2_of_255"], apart["psnr_db"]
            if row["dtype"] == dtype == "float32":
                return f"{100 * share:.2f} %", share >= SAME_VALUES
            if row["dtype"] == dtype:
                return f"{ratio:.1f} dB", ratio >= SAME_DB
        return None

    return find


def _fits() -> Callable[[Results], Found]:
    """RG-LCD at batch 4: what torch allocates at most; the rest of a card's memory is the driver's and what is lost."""

    def read(row: dict[str, Any]) -> Found:
        peak = row["peak_memory"][OURS]["bytes"]
        return f"{peak / 1e9:.1f} GB", peak <= MEMORY_BYTES

    return _step("sd21-base", "cuda", "rg_lcd", read, LOW_MEMORY_SETTINGS["rg_lcd"])


def _whole(name: str, limit: float) -> Callable[[Results], Found]:
    def find(found: Results) -> Found:
        for row in _rows(found, "whole", name, "cpu"):
            return f"{row['seconds']:.0f} s", row["seconds"] <= limit
        return None

    return find


def _times_generation(found: Results) -> Found:
    """What is done once weighs less the more images there are, so their number is said."""
    for row in _rows(found, "eval", "benchtop", "cpu"):
        return f"{row['times_generation']:.2f} of {row['images']:,} images", row["times_generation"] <= EVAL_TIMES
    return None


def _outside(found: Results) -> Found:
    for row in _rows(found, "eval", "sd21-base", "cuda"):
        share, measured = row["estimated"]["share_outside_generation"], row["images"]
        text = f"{100 * share:.0f} %, drawn on from {measured // 2:,} and {measured:,} images"
        return text, share <= OUTSIDE
    return None


def _batch(method: str) -> str:
    """The batch where it is not the recipe's."""
    return f", batch {SMALL_BATCH}" if GPU_SETTINGS[method] else ""


def _targets() -> list[tuple[str, str, Callable[[Results], Found]]]:
    listed = [
        (f"{method} step on the CPU, benchtop, × plain", f"≥ {least}", _gain("benchtop", "cpu", method, least))
        for method, least in STEP_GAINS.items()
    ]
    listed += [(f"{method} step beside one busy process, × its idle time", f"≤ {BUSY_COST}", _busy(method))
               for method in STEP_GAINS]  # fmt: skip
    listed += [
        ("LCD step, benchtop, share of the matmul rate", "≥ 50 %", _share("benchtop", "cpu", SHARE_OF_RATE)),
        ("`rgbench train` to the first step", f"≤ {START_SEC:g} s", _figure(
            "start", "benchtop", "cpu", lambda r: r["train_to_first_step_sec"]["median"], START_SEC, False, " s")),
        ("`rgbench --help`, CPU time", f"≤ {HELP_SEC} s", _figure(
            "start", "benchtop", "cpu", lambda r: r["help_cpu_sec"]["median"], HELP_SEC, False, " s")),
        *((WHOLE_NAMES[name], f"≤ {limit:g} s", _whole(name, limit)) for name, limit in WHOLE_SEC.items()),
        ("webdataset decoding, × plain PIL × cores", f"≥ {DATA_SHARE}", _figure(
            "data", "webdataset", "cpu", lambda r: r["share_of_plain_times_cores"], DATA_SHARE, True)),
        ("benchtop evaluation with all metrics, × generation", f"≤ {EVAL_TIMES}", _times_generation),
        ("Fréchet solve at d = 2048, × `eigvalsh` twice", f"≤ {FID_TIMES}", _figure(
            "fid", "random", "cpu", lambda r: r["solve"]["times_eigvalsh_twice"]["median"], FID_TIMES, False)),
    ]  # fmt: skip
    listed += [
        (f"{method} step on a GPU, SD2.1-base shape, bf16{_batch(method)}, × plain", f"≥ {GPU_GAIN}",
         _gain("sd21-base", "cuda", method, GPU_GAIN, settings)) for method, settings in GPU_SETTINGS.items()
    ]  # fmt: skip
    listed += [(f"{method} step{_batch(method)}, low-memory settings, peak × plain", f"≤ {LOW_MEMORY}",
                _low_memory(method)) for method in LOW_MEMORY_SETTINGS]  # fmt: skip
    listed += [
        (f"RG-LCD step at batch {SMALL_BATCH}, low-memory settings, peak", f"≤ {MEMORY_BYTES / 1e9:g} GB", _fits()),
        ("evaluation of 30,000 images on one GPU, outside generation", f"≤ {100 * OUTSIDE:g} %", _outside),
        ("LCD step on a GPU, share of the matmul rate", "≥ 35 %", _share("sd21-base", "cuda", GPU_SHARE)),
        ("generation on a GPU, 4 steps, 512 px, × diffusers", f"≥ {GENERATION_GAIN}", _figure(
            "generate", "sd21-base", "cuda", lambda r: r["ratio_to_plain"]["median"], GENERATION_GAIN, True)),
    ]  # fmt: skip
    shares, ratio = f"≥ {100 * SAME_VALUES:g} %", f"≥ {SAME_DB:g} dB"
    listed += [
        ("generated values within 2/255 of diffusers', benchtop, float32", shares, _same("benchtop", "cpu", "float32")),
        ("the same on a GPU, 512 px, float32", shares, _same("sd21-base", "cuda", "float32")),
        ("the same on a GPU, 512 px, bfloat16: PSNR", ratio, _same("sd21-base", "cuda", "bfloat16")),
    ]
    return listed


def missed(found: Results) -> list[str]:
    """Names of the targets that were measured and are missed."""
    values = ((name, find(found)) for name, _, find in _targets())
    return [name for name, value in values if value is not None and not value[1]]


def targets(found: Results) -> str:
    """A Markdown table: target, what was measured, whether it holds."""
    lines = ["| | target | measured | |", "| --- | --- | --- | --- |"]
    for name, limit, find in _targets():
        value = find(found)
        shown, mark = ("not measured", "") if value is None else (value[0], "holds" if value[1] else "**misses**")
        lines.append(f"| {name} | {limit} | {shown} | {mark} |")
    return "\n".join(lines) + f"\n\n{ON_GPU}"
