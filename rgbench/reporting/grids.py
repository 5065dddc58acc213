"""The image grid: rows are prompts, columns are models, each row from one prompt and one seed.

Which prompts are shown is drawn by a stated seed from those that every shown model
kept, so that nobody picks them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rgbench.errors import UsageError
from rgbench.files import open_image, read_json
from rgbench.reporting.gather import Comparison, Row

NUM_PROMPTS = 8
CHOICE_SEED = 0
CELL = 192  # pixels of one image's side in the PNG
CAPTION = 250  # pixels of the prompt column
GAP = 8
FONT_SIZE = 17
MAX_CAPTION_LINES = 7
MAX_HEAD_LINES = 4
INK, QUIET, PAPER = "#1f2328", "#59636e", "#ffffff"

Key = tuple[str, str, int]  # prompt id, prompt, seed


@dataclass(frozen=True)
class Shown:
    """One line of the grid: a prompt, a seed, and one image per column."""

    prompt_id: str
    prompt: str
    seed: int
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Grid:
    """The chosen images; `note` says how they were chosen and what is left out."""

    world: str
    columns: tuple[Row, ...]
    lines: tuple[Shown, ...]
    note: str


def choose(comparison: Comparison, results: Path) -> Grid | None:
    """Draws the prompts to show; None where no images were kept, or no (prompt, seed) is common to all models.

    Of a row with several training seeds the first seed's images stand for it.

    Raises:
        UsageError: an index or an image that it names cannot be read.
    """
    kept, common = _kept(comparison, results)
    if not common:
        return None
    ordered = sorted(common)
    picked = np.random.default_rng(CHOICE_SEED).permutation(len(ordered))[:NUM_PROMPTS]
    lines = []
    for key in (ordered[int(i)] for i in picked):
        images = tuple(open_image(path[key]) for path in kept.values())
        lines.append(Shown(*key, images))
    return Grid(comparison.world, tuple(kept), tuple(lines), _note(comparison, kept, len(lines), len(common)))


def _kept(comparison: Comparison, results: Path) -> tuple[dict[Row, dict[Key, Path]], set[Key]]:
    """The rows that kept images of common prompts, in order, and what is common to them."""
    kept: dict[Row, dict[Key, Path]] = {}
    common: set[Key] = set()
    for row in comparison.rows:
        index = _index(_folder(row, results))
        shared = common & set(index) if kept else set(index)
        if shared:
            kept[row], common = index, shared
    return kept, common


def _note(comparison: Comparison, kept: dict[Row, dict[Key, Path]], num_shown: int, num_common: int) -> str:
    note = (
        f"World: {comparison.world}. {num_shown} of the {num_common} prompts whose images every shown model kept, "
        f"drawn with numpy's default_rng({CHOICE_SEED}), not picked; one prompt and one noise seed per row."
    )
    if any(len(row.members) > 1 for row in kept):
        note += " Of several training seeds the first is shown."
    missing = [row.name for row in comparison.rows if row not in kept]
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
    height = top + len(grid.lines) * (CELL + GAP) + GAP + len(note) * line_height
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (row, head) in enumerate(zip(grid.columns, heads, strict=True)):
        left = CAPTION + i * (CELL + GAP)
        _write(draw, (left, GAP), wrap(row.method_label, bold, CELL, 1), bold, INK)
        _write(draw, (left, GAP + line_height), head, small, QUIET)
    for j, line in enumerate(grid.lines):
        upper = top + j * (CELL + GAP)
        _write(draw, (GAP, upper), wrap(line.prompt, font, CAPTION - 3 * GAP, MAX_CAPTION_LINES), font, INK)
        _write(draw, (GAP, upper + CELL - line_height), [f"seed {line.seed}"], small, QUIET)
        for i, image in enumerate(line.images):
            sheet.paste(enlarge(image, CELL), (CAPTION + i * (CELL + GAP), upper))
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


def _folder(row: Row, results: Path) -> Path:
    first = row.results[0]
    return results / first.world / first.model / first.generation.id / "images"


def _index(folder: Path) -> dict[Key, Path]:
    """The kept images of one model; empty where none were kept."""
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
