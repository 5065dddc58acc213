"""Image grids: rows are prompts, columns are models, each row from one prompt and one seed.

Which prompts the first grid shows is drawn by a stated seed from those that every shown
model kept, so that nobody picks them; its further views are the same images' differences
to a baseline and their spectra. Grids of the worst prompts by each probe stand apart.

The images that evaluations kept: which prompts every model has, and where their files lie.

Views that show what the eye misses: the difference to another image, and the log power spectrum.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rgbench.core.errors import UsageError
from rgbench.core.io import open_image, read_json
from rgbench.evaluate.results import Result
from rgbench.judge.models import Column, Comparison, Row
from rgbench.report.tables import format_number, headlines

Key = tuple[str, str, int]  # prompt id, prompt, seed


@dataclass(frozen=True)
class Kept:
    """Files by row and (prompt id, prompt, seed); `common` are those of all rows here, in order."""

    files: dict[Row, dict[Key, Path]]
    common: tuple[Key, ...]


def kept_images(comparison: Comparison, results: Path) -> Kept:
    """The rows that kept images of common prompts, in the order of the table, and what is common to them.

    Of a row with several training seeds the first seed's images stand for it.

    Raises:
        UsageError: an index that cannot be read, or that names files elsewhere.
    """
    files: dict[Row, dict[Key, Path]] = {}
    common: set[Key] = set()
    for row in comparison.rows:
        index = image_index(row.results[0], results)
        shared = common & set(index) if files else set(index)
        if shared:
            files[row], common = index, shared
    return Kept(files, tuple(sorted(common)))


def image_index(result: Result, results: Path) -> dict[Key, Path]:
    """The kept images of one generation; empty where none were kept.

    Raises:
        UsageError: an index that cannot be read, or that names files elsewhere.
    """
    folder = results / result.world / result.model / result.generation.id / "images"
    path = folder / "index.json"
    if not path.is_file():
        return {}
    index = {}
    for entry in read_json(path):
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{path}: each entry needs a plain file name, not {name!r}; run `rgbench eval` again")
        index[(str(entry["prompt_id"]), str(entry["prompt"]), int(entry["seed"]))] = folder / name
    return index


GAIN = 2.0  # of the difference view: half the range of 8 bits fills it
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
RANGE = (1.0, 99.8)  # percentiles of all pixels' decibels that are black and white


def difference(image: Image.Image, base: Image.Image) -> Image.Image:
    """128 + 2 (image − base) per channel, clipped to 8 bits: grey where they are equal.

    `base` is resized where the sizes differ.
    """
    other = base if base.size == image.size else base.resize(image.size, Image.Resampling.LANCZOS)
    change = np.asarray(image, np.float32) - np.asarray(other, np.float32)
    return Image.fromarray((128 + GAIN * change).round().clip(0, 255).astype(np.uint8))


def log_spectra(images: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[float, float]]:
    """Log power spectra of luma, frequency zero in the middle, all on one scale.

    The mean is removed and a Hann window laid over the image, as the spectrum metric does.

    Returns:
        Grey images, and the decibels that are black and white.
    """
    spectra = [_decibels(image) for image in images]
    low, high = np.percentile(np.concatenate([spectrum.ravel() for spectrum in spectra]), RANGE)
    scale = 255 / max(high - low, 1e-9)
    grey = [((spectrum - low) * scale).round().clip(0, 255).astype(np.uint8) for spectrum in spectra]
    return [Image.fromarray(pixels) for pixels in grey], (float(low), float(high))


def _decibels(image: Image.Image) -> NDArray:
    luma = np.asarray(image, np.float64) @ LUMA / 255
    height, width = luma.shape
    window = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side) for side in (height, width)))
    power = np.abs(np.fft.fftshift(np.fft.fft2((luma - luma.mean()) * window))) ** 2
    return 10 * np.log10(power / (height * width) + 1e-12)


NUM_PROMPTS = 8
NUM_WORST = 4
CHOICE_SEED = 0
CELL = 192  # pixels of one image's side in the PNG
CAPTION = 250  # pixels of the prompt column
GAP = 8
FONT_SIZE = 17
MAX_CAPTION_LINES = 7
MAX_HEAD_LINES = 4
INK, QUIET, PAPER = "#1f2328", "#59636e", "#ffffff"


@dataclass(frozen=True)
class Shown:
    """One line of a grid: a prompt, a seed, one image per column, and what is written under each."""

    prompt_id: str
    prompt: str
    seed: int
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Chosen images; `key` is part of its file's name, `note` says how they were chosen and what is left out.

    `is_view`: the random grid or a view of it; `computed`: its images are not the kept ones themselves.
    """

    key: str
    title: str
    world: str
    columns: tuple[Row, ...]
    lines: tuple[Shown, ...]
    note: str
    is_view: bool = False
    computed: bool = False


def random_grid(comparison: Comparison, kept: Kept) -> Grid | None:
    """Prompts drawn by the stated seed; None where no images were kept, or no (prompt, seed) is common to all models.

    Raises:
        UsageError: an image cannot be read.
    """
    if not kept.common:
        return None
    picked = np.random.default_rng(CHOICE_SEED).permutation(len(kept.common))[:NUM_PROMPTS]
    lines = [_line(kept, kept.common[int(i)]) for i in picked]
    note = (
        f"World: {comparison.world}. {len(lines)} of the {len(kept.common)} prompts whose images every shown model "
        f"kept, drawn with numpy's default_rng({CHOICE_SEED}), not picked; one prompt and one noise seed per row."
    )
    title, note = "The same prompts and seeds from every model", note + _left_out(comparison, kept)
    return Grid("grid", title, comparison.world, tuple(kept.files), tuple(lines), note, is_view=True)


def view_grids(grid: Grid) -> list[Grid]:
    """The same lines as differences to the LCD student (else the teacher), and as log power spectra."""
    methods = [row.method for row in grid.columns]
    base = next((methods.index(method) for method in ("lcd", "teacher") if method in methods), 0)
    differences = [
        replace(line, images=tuple(difference(image, line.images[base]) for image in line.images))
        for line in grid.lines
    ]
    spectra, (low, high) = log_spectra([image for line in grid.lines for image in line.images])
    width = len(grid.columns)
    lines = [replace(line, images=tuple(spectra[i * width :][:width])) for i, line in enumerate(grid.lines)]
    name = grid.columns[base].short_name
    views = [
        (
            "difference", f"Difference to {name}", differences,
            f"The images above minus {name}'s: grey is no difference, contrast doubled.",
        ),
        (
            "spectrum", "Log power spectrum", lines,
            f"Of the images above: luma, Hann window, frequency zero in the middle; black is {low:.0f} dB, "
            f"white {high:.0f} dB, in all of them alike.",
        ),
    ]  # fmt: skip
    return [
        replace(grid, key=f"grid-{key}", title=title, lines=tuple(to), note=note, computed=True)
        for key, title, to, note in views
    ]


def worst_grids(comparison: Comparison, kept: Kept) -> list[Grid]:
    """For one metric of each family with per-image scores, the kept prompts on which guided students do worst.

    Raises:
        UsageError: an image cannot be read.
    """
    return [grid for column in _probes(comparison, kept) if (grid := _worst(comparison, kept, column)) is not None]


def _worst(comparison: Comparison, kept: Kept, column: Column) -> Grid | None:
    scores = {row: _scores(row, column) for row in kept.files}
    guided = [row for row in kept.files if scores[row] and any(result.trained_rewards for result in row.results)]
    judged = guided or [row for row in kept.files if scores[row] and row.method != "teacher"]
    able = [key for key in kept.common if all((key[0], key[2]) in scores[row] for row in judged)]
    if not judged or not able:
        return None
    ranked = sorted(able, key=lambda key: min(column.goodness(scores[row][key[0], key[2]]) for row in judged))
    lines = []
    for key in ranked[:NUM_WORST]:
        values = (scores[row].get((key[0], key[2])) for row in kept.files)
        captions = tuple("" if value is None else _caption(column, value) for value in values)
        lines.append(replace(_line(kept, key), captions=captions))
    whom = ", ".join(row.short_name for row in judged)
    note = (
        f"World: {comparison.world}. The {len(lines)} of {len(able)} kept prompts on which {column.metric.label} is "
        f"worst in any of: {whom}. Picked to be bad: they show how these models fail, not how often."
    )
    title = f"Worst by {column.metric.label}"
    name = f"worst-{column.metric.name.replace('_', '-')}"
    return Grid(name, title, comparison.world, tuple(kept.files), tuple(lines), note + _left_out(comparison, kept))


def _probes(comparison: Comparison, kept: Kept) -> Iterable[Column]:
    """Per family the first metric of the main table with per-image scores, a graded one before a yes or no."""
    found: dict[str, list[tuple[bool, Column]]] = {}
    for column in headlines(comparison):
        values = {value for row in kept.files for value in _scores(row, column).values()}
        if values:
            found.setdefault(column.metric.family, []).append((len(values) <= 2, column))
    for columns in found.values():
        yield min(columns, key=lambda item: item[0])[1]


def _scores(row: Row, column: Column) -> dict[tuple[str, int], float]:
    """Per-image scores of the row's first training seed, whose images stand for it."""
    result = row.result(column, next(iter(row.members)))
    return (row.scores(result) if result is not None else None) or {}


def _caption(column: Column, value: float) -> str:
    return f"{format_number(value, column.metric.decimals)} {column.metric.unit}".strip()


def _line(kept: Kept, key: Key) -> Shown:
    return Shown(*key, tuple(open_image(files[key]) for files in kept.files.values()))


def _left_out(comparison: Comparison, kept: Kept) -> str:
    note = " Of several training seeds the first is shown." if any(len(row.members) > 1 for row in kept.files) else ""
    missing = [row.name for row in comparison.rows if row not in kept.files]
    return note + (f" No images of these prompts kept: {'; '.join(missing)}." if missing else "")


def grid_png(grid: Grid) -> bytes:
    """The grid as one PNG: 192 px images, prompts on the left, models above, the note below."""
    font = _font("DejaVuSans.ttf", FONT_SIZE)
    bold = _font("DejaVuSans-Bold.ttf", FONT_SIZE)
    small = _font("DejaVuSans.ttf", FONT_SIZE - 3)
    width = CAPTION + len(grid.columns) * (CELL + GAP) + GAP
    line_height = FONT_SIZE + 5
    heads = [wrap(_detail(row), small, CELL, MAX_HEAD_LINES) for row in grid.columns]
    top = (1 + max(map(len, heads))) * line_height + 2 * GAP
    note = wrap(grid.note, small, width - 2 * GAP, 12)
    step = CELL + GAP + (line_height if any(line.captions for line in grid.lines) else 0)
    height = top + len(grid.lines) * step + GAP + len(note) * line_height
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (row, head) in enumerate(zip(grid.columns, heads, strict=True)):
        left = CAPTION + i * (CELL + GAP)
        _write(draw, (left, GAP), wrap(row.method_label, bold, CELL, 1), bold, INK)
        _write(draw, (left, GAP + line_height), head, small, QUIET)
    for j, line in enumerate(grid.lines):
        upper = top + j * step
        _write(draw, (GAP, upper), wrap(line.prompt, font, CAPTION - 3 * GAP, MAX_CAPTION_LINES), font, INK)
        _write(draw, (GAP, upper + CELL - line_height), [f"seed {line.seed}"], small, QUIET)
        for i, image in enumerate(line.images):
            sheet.paste(enlarge(image, CELL), (CAPTION + i * (CELL + GAP), upper))
        for i, caption in enumerate(line.captions):
            _write(draw, (CAPTION + i * (CELL + GAP), upper + CELL + 2), [caption], small, QUIET)
    _write(draw, (GAP, height - len(note) * line_height), note, small, QUIET)
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """`image` within a `side`² square: pixels repeated for small images, Lanczos for larger ones."""
    longest = max(image.size)
    method = Image.Resampling.NEAREST if longest <= side else Image.Resampling.LANCZOS
    size = (max(1, round(n * side / longest)) for n in image.size)
    return image.resize(tuple(size), method)  # type: ignore[arg-type]


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of `text` no wider than `width` pixels; what goes beyond `max_lines` ends in "…"."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            candidate = f"{lines[-1]} {piece}".strip()
            if font.getlength(candidate) <= width:
                lines[-1] = candidate
            else:
                lines.append(piece)
            if len(lines) > max_lines:
                return [*lines[: max_lines - 1], f"{lines[max_lines - 1][:-1]}…"]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for char in word:
        if font.getlength(pieces[-1] + char) > width:
            pieces.append("")
        pieces[-1] += char
    return pieces


def _detail(row: Row) -> str:
    return f"{row.results[0].model}; {row.sampler_label}"


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], font: ImageFont.FreeTypeFont, ink: str
) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * (FONT_SIZE + 5)), line, font=font, fill=ink)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
