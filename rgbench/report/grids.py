"""Image grids: rows are prompts, columns are models, each row from one prompt and one noise seed.

Which prompts the first grid shows is drawn by a stated seed from those that every shown model has, so that nobody picks
them; its further views are the same images' differences to a baseline and their spectra. Grids of the worst prompts by
one metric of each family stand apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rgbench.evaluate.results import ModelResult
from rgbench.judge.models import LCD, TEACHER, Column, Model, ResultSet
from rgbench.metrics.values import Family
from rgbench.report.tables import headlines
from rgbench.report.words import format_number, names, plural

Key = tuple[str, str, int]  # prompt id, prompt, noise seed
GAIN = 2.0  # of the difference view: half the range of 8 bits fills it
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
RANGE = (1.0, 99.8)  # percentiles of all pixels' decibels that are black and white
NUM_PROMPTS = 8
NUM_WORST = 3
NUM_STRIP, NUM_STRIP_LINES = 4, 2  # columns and lines of the page's first screen
CHOICE_SEED = 0
TILE = 192  # pixels of one image's side in the PNG
CAPTION = 250  # pixels of the prompt column
GAP = 8
FONT_SIZE = 17
MAX_CAPTION_LINES = 7
MAX_HEAD_LINES = 4
INK, QUIET, PAPER = "#1f2328", "#59636e", "#ffffff"


@dataclass(frozen=True)
class Kept:
    """Stored images by model and key; `common` are the keys of all models here, in order."""

    images: dict[Model, dict[Key, Image.Image]]
    common: tuple[Key, ...]


@dataclass(frozen=True)
class Line:
    """One line of a grid: a prompt, a seed, one image per column, and what is written under each."""

    prompt_id: str
    prompt: str
    seed: int
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Chosen images.

    Attributes:
        key: part of its file's name.
        title: above it.
        columns: models and their names.
        lines: top to bottom.
        note: how they were chosen and what is left out.
        is_view: the random grid, or a view of it.
        computed: the images are not the stored ones themselves.
    """

    key: str
    title: str
    columns: dict[Model, str]
    lines: tuple[Line, ...]
    note: str
    is_view: bool = False
    computed: bool = False


def images_of(result: ModelResult) -> dict[Key, Image.Image]:
    """Stored images of one result, by prompt and noise seed."""
    return {(about.prompt_id, about.prompt, about.seed): image for about, image in result.images.items()}


def kept_images(results: ResultSet) -> Kept:
    """The models that have images of common prompts, in the order of the tables; of several seeds the first one's.

    Raises:
        UsageError: images that cannot be read.
    """
    images: dict[Model, dict[Key, Image.Image]] = {}
    common: set[Key] = set()
    for model in results.models:
        found = images_of(model.first)
        shared = common & set(found) if images else set(found)
        if shared:
            images[model], common = found, shared
    return Kept(images, tuple(sorted(common)))


def choose_grids(results: ResultSet, kept: Kept) -> tuple[Grid, ...]:
    """The random grid, its views, and the worst prompts; none where no (prompt, seed) is common to all models."""
    grid = random_grid(results, kept)
    return (grid, *view_grids(grid), *worst_grids(results, kept)) if grid else ()


def random_grid(results: ResultSet, kept: Kept) -> Grid | None:
    """Prompts drawn by the stated seed; None where no (prompt, seed) is common to all models."""
    if not kept.common:
        return None
    picked = np.random.default_rng(CHOICE_SEED).permutation(len(kept.common))[:NUM_PROMPTS]
    lines = tuple(_line(results, kept, kept.common[int(i)]) for i in picked)
    note = (
        f"{plural(len(lines), 'prompt')} drawn at random (numpy default_rng({CHOICE_SEED})) from the "
        f"{len(kept.common)} stored for every model. Same prompt and noise across a row."
        f"{_about_marks(results)}{_left_out(results, kept)}"
    )
    columns = {model: names(results)[model] for model in kept.images}
    return Grid("grid", "The same prompts and seeds from every model", columns, lines, note, is_view=True)


def strip(grid: Grid) -> Grid:
    """The first lines for one model of each of four methods: that of most training seeds."""
    best: dict[str, Model] = {}
    for model in grid.columns:
        if model.method not in best or len(model.results) > len(best[model.method].results):
            best[model.method] = model
    chosen = list(best.values())[:NUM_STRIP]
    places = [list(grid.columns).index(model) for model in chosen]
    lines = tuple(
        replace(
            line,
            images=tuple(line.images[i] for i in places),
            captions=tuple(line.captions[i] for i in places) if line.captions else (),
        )
        for line in grid.lines[:NUM_STRIP_LINES]
    )
    columns = {model: grid.columns[model] for model in chosen}
    return replace(grid, key="strip", title="One model of each method", columns=columns, lines=lines)


def view_grids(grid: Grid) -> list[Grid]:
    """The same lines as differences to the LCD student (else the teacher), and as log power spectra."""
    methods = [model.method for model in grid.columns]
    base = next((methods.index(method) for method in (LCD, TEACHER) if method in methods), 0)
    name, width = list(grid.columns.values())[base], len(grid.columns)
    changes = tuple(
        replace(line, images=tuple(difference(image, line.images[base]) for image in line.images))
        for line in grid.lines
    )
    grey, (low, high) = log_spectra([image for line in grid.lines for image in line.images])
    spectra = tuple(replace(line, images=tuple(grey[i * width :][:width])) for i, line in enumerate(grid.lines))
    how = f"Each image minus {name}'s: grey is no difference, contrast doubled."
    scale = (
        "Log power spectrum of each image (luma, Hann window, DC centred; common scale "
        f"{low:.0f} to {high:.0f} dB, black to white)."
    )
    changed = replace(
        grid, key="grid-difference", title=f"Difference to {name}", lines=changes, note=how, computed=True
    )
    return [changed, replace(changed, key="grid-spectrum", title="Log power spectrum", lines=spectra, note=scale)]


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


def worst_grids(results: ResultSet, kept: Kept) -> list[Grid]:
    """For one metric of each family, the stored prompts on which models trained on a reward do worst."""
    return [grid for column in _probes(results, kept) if (grid := _worst(results, kept, column)) is not None]


def _probes(results: ResultSet, kept: Kept) -> Iterable[Column]:
    """Per family the first metric of the main table with per-image values, a graded one before a yes or no."""
    found: dict[Family, list[tuple[bool, Column]]] = {}
    for column in headlines(results):
        values = {value for model in kept.images for value in first_scores(model, column).values()}
        if values and column.has_good_end:
            found.setdefault(column.family, []).append((len(values) <= 2, column))
    for columns in found.values():
        yield min(columns, key=lambda item: item[0])[1]


@lru_cache(maxsize=512)
def first_scores(model: Model, column: Column) -> dict[tuple[str, int], float]:
    """Per-image values of the model's first training seed, by (prompt id, seed)."""
    rows = model.first.rows(*column.key) if column.key in model.first.by_key else None
    return rows.by_image() if rows is not None else {}


def _worst(results: ResultSet, kept: Kept, column: Column) -> Grid | None:
    scores = {model: first_scores(model, column) for model in kept.images}
    guided = [model for model, found in scores.items() if found and model.trained_rewards]
    judged = guided or [model for model, found in scores.items() if found and model.method != TEACHER]
    able = [key for key in kept.common if all((key[0], key[2]) in scores[model] for model in judged)]
    if not judged or not able:
        return None

    def goodness(key: Key) -> float:
        return min(column.oriented(scores[model][key[0], key[2]]) or 0.0 for model in judged)

    lines = []
    for key in sorted(able, key=goodness)[:NUM_WORST]:
        values = (found.get((key[0], key[2])) for found in scores.values())
        texts = ["" if v is None else f"{format_number(v, column.decimals)} {column.unit}".strip() for v in values]
        line = _line(results, kept, key)
        captions = zip(line.captions or [""] * len(texts), texts, strict=True)
        lines.append(replace(line, captions=tuple(" ".join(filter(None, each)) for each in captions)))
    whom = "; ".join(names(results)[model] for model in judged)
    note = (
        f"The {len(lines)} of {plural(len(able), 'stored prompt')} on which {column.label} is worst in any of {whom}. "
        f"Picked to be bad: they show how these models fail, not how often.{_left_out(results, kept)}"
    )
    columns = {model: names(results)[model] for model in kept.images}
    return Grid(f"worst-{column.metric.replace('_', '-')}", f"Worst by {column.label}", columns, tuple(lines), note)


def _line(results: ResultSet, kept: Kept, key: Key) -> Line:
    return Line(*key, tuple(images[key] for images in kept.images.values()), marks(results, tuple(kept.images), key))


def marks(results: ResultSet, models: Sequence[Model], key: Key) -> tuple[str, ...]:
    """✓ where the oracle finds all that the caption says, ✗ where it does not, for each model; empty without one."""
    column = right_or_wrong(results)
    found = (first_scores(model, column).get((key[0], key[2])) for model in models) if column else ()
    texts = tuple("" if value is None else "✓" if value else "✗" for value in found)
    return texts if any(texts) else ()


@lru_cache(maxsize=16)
def right_or_wrong(results: ResultSet) -> Column | None:
    """The oracle's column that is 100 for a right image and 0 for a wrong one."""
    for column in (column for column in results.columns if column.family is Family.ORACLE):
        values = {value for model in results.models for value in first_scores(model, column).values()}
        if values and values <= {0.0, 100.0}:
            return column
    return None


def _about_marks(results: ResultSet) -> str:
    return " ✓ or ✗: the oracle finds all that the caption says, or not." if right_or_wrong(results) else ""


def _left_out(results: ResultSet, kept: Kept) -> str:
    note = " First training seed shown." if any(len(model.results) > 1 for model in kept.images) else ""
    missing = [names(results)[model] for model in results.models if model not in kept.images]
    return note + (f" No stored images of these prompts: {'; '.join(missing)}." if missing else "")


# Files


def grid_png(grid: Grid, world: str) -> bytes:
    """The grid as one PNG: 192 px images, prompts on the left, models above, the note below."""
    font, bold, small = (_font(*of) for of in (("", FONT_SIZE), ("-Bold", FONT_SIZE), ("", FONT_SIZE - 3)))
    width = CAPTION + len(grid.columns) * (TILE + GAP) + GAP
    line_height = FONT_SIZE + 5
    heads = [wrap(name, bold, TILE, MAX_HEAD_LINES) for name in grid.columns.values()]
    top = max(map(len, heads)) * line_height + 2 * GAP
    note = wrap(f"World: {world}. {grid.note}", small, width - 2 * GAP, 12)
    step = TILE + GAP + (line_height if any(line.captions for line in grid.lines) else 0)
    height = top + len(grid.lines) * step + GAP + len(note) * line_height
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        _write(draw, (CAPTION + i * (TILE + GAP), GAP), head, bold, INK)
    for j, line in enumerate(grid.lines):
        upper = top + j * step
        _write(draw, (GAP, upper), wrap(line.prompt, font, CAPTION - 3 * GAP, MAX_CAPTION_LINES), font, INK)
        _write(draw, (GAP, upper + TILE - line_height), [f"seed {line.seed}"], small, QUIET)
        for i, image in enumerate(line.images):
            sheet.paste(enlarge(image, TILE), (CAPTION + i * (TILE + GAP), upper))
        for i, caption in enumerate(line.captions):
            _write(draw, (CAPTION + i * (TILE + GAP), upper + TILE + 2), [caption], small, QUIET)
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


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.FreeTypeFont, ink: str
) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * (FONT_SIZE + 5)), line, font=font, fill=ink)


def _font(weight: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{weight}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
