"""Grids: the same prompts and seeds in all columns, drawn and not picked, readable captions."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.judge.models import gather
from rgbench.report.grids import (
    CAPTION,
    CELL,
    GAP,
    Grid,
    difference,
    enlarge,
    grid_png,
    kept_images,
    log_spectra,
    random_grid,
    view_grids,
    worst_grids,
    wrap,
)
from tests.history.plausible import write_model

ONE = ("hps_aa1",)


def world(root: Path, images: int = 12, **how) -> Path:
    write_model(root, "teacher", None, metrics=ONE, num=4, images=images, **how)
    write_model(root, "lcd", 0, metrics=ONE, num=4, images=images, **how)
    return root


def choose(comparison, root: Path) -> Grid | None:
    return random_grid(comparison, kept_images(comparison, root))


def test_the_choice_is_random_by_a_stated_seed_and_the_same_each_time(tmp_path):
    root = world(tmp_path)
    one, two = (choose(gather(root)[0], root) for _ in range(2))
    shown = [line.prompt_id for line in one.lines]
    assert shown == [line.prompt_id for line in two.lines] and len(set(shown)) == 8
    assert shown != sorted(shown), "not simply the first"
    assert "8 of the 12 prompts" in one.note and "default_rng(0)" in one.note and "benchtop" in one.note


def test_each_line_shows_one_prompt_and_seed_of_every_model(tmp_path):
    root = world(tmp_path, images=3)
    grid = choose(gather(root)[0], root)
    assert [row.method for row in grid.columns] == ["teacher", "lcd"]
    for line in grid.lines:
        name = f"{line.prompt_id.replace('/', '_')}-{line.seed}.png"
        for row, image in zip(grid.columns, line.images, strict=True):
            first = row.results[0]
            file = root / first.world / first.model / first.generation.id / "images" / name
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(file)))


def test_only_prompts_common_to_all_are_shown_and_other_models_named(tmp_path):
    root = world(tmp_path, images=3)
    write_model(root, "lrm", 0, metrics=ONE, num=4, images=2)
    write_model(root, "lrm", 0, model="other-s0", metrics=ONE, num=4, images=1, prompts=["another prompt"])
    write_model(root, "external", None, model="bare", metrics=ONE, num=4)
    grid = choose(gather(root)[0], root)
    assert len(grid.lines) == 2 and len(grid.columns) == 3
    assert "other-s0" in grid.note and "bare" in grid.note


def test_no_images_no_grid(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=ONE, num=4)
    assert worst_grids(gather(tmp_path)[0], kept_images(gather(tmp_path)[0], tmp_path)) == []
    assert choose(gather(tmp_path)[0], tmp_path) is None


def test_of_several_training_seeds_the_first_stands(tmp_path):
    for seed in (2, 1):
        write_model(tmp_path, "lcd", seed, metrics=ONE, num=4, images=1)
    grid = choose(gather(tmp_path)[0], tmp_path)
    assert len(grid.columns) == 1 and grid.columns[0].results[0].model == "lcd-s1"
    assert "the first is shown" in grid.note


def test_png_holds_the_images_pixel_by_pixel(tmp_path):
    root = world(tmp_path, images=1)
    grid = choose(gather(root)[0], root)
    sheet = np.asarray(Image.open(io.BytesIO(grid_png(grid))))
    assert sheet.shape[1] == CAPTION + 2 * (CELL + GAP) + GAP
    cell = np.asarray(enlarge(grid.lines[0].images[1], CELL))
    rows = sheet[:, CAPTION + CELL + GAP : CAPTION + 2 * CELL + GAP]
    top = next(y for y in range(len(rows) - CELL) if np.array_equal(rows[y : y + CELL], cell))
    assert (cell[::3, ::3] == np.asarray(grid.lines[0].images[1])).all() and top > 0


def test_long_prompts_and_emoji_are_wrapped_and_cut(tmp_path):
    prompts = ["<script>alert(1)</script> 🙂 " + "long " * 500, "x" * 2000, ""]
    root = world(tmp_path, images=3, prompts=prompts)
    sheet = Image.open(io.BytesIO(grid_png(choose(gather(root)[0], root))))
    assert sheet.height < 3 * (CELL + GAP) + 250


def test_wrap_respects_width_and_line_count():
    from rgbench.report.grids import _font

    font = _font("DejaVuSans.ttf", 17)
    lines = wrap("a large red circle " * 20, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 220 for line in lines)


@pytest.mark.parametrize("entry", [{"file": "../../secret.png"}, {"file": "/etc/passwd"}, "text", {}])
def test_an_index_cannot_name_files_elsewhere(tmp_path, entry):
    root = world(tmp_path, images=1)
    index = next(root.rglob("index.json"))
    index.write_text(json.dumps([entry]))
    with pytest.raises(UsageError, match="index.json"):
        choose(gather(root)[0], root)


def test_a_broken_image_is_named(tmp_path):
    root = world(tmp_path, images=1)
    next(root.rglob("*.png")).write_bytes(b"not an image")
    with pytest.raises(UsageError, match="png"):
        choose(gather(root)[0], root)


def test_the_worst_prompts_are_those_of_the_guided_students_and_say_so(tmp_path):
    metrics = ("hps_aa1", "oracle_all", "oracle_mean", "fd_efflite0")
    for method in ("lcd", "rg_lcd", "lrm"):
        write_model(tmp_path, method, 0, metrics=metrics, num=12, images=10)
    comparison = gather(tmp_path)[0]
    grids = worst_grids(comparison, kept_images(comparison, tmp_path))
    assert [grid.title for grid in grids] == ["Worst by HPS aa1", "Worst by Oracle, all right"]
    column = comparison.column("hps_aa1")
    scores = [row.scores(row.result(column, 0)) for row in comparison.rows]
    lowest = {key: min(scores[1][key], scores[2][key]) for key in ((f"test/{i}", 0) for i in range(10))}
    assert [(line.prompt_id, line.seed) for line in grids[0].lines] == sorted(lowest, key=lowest.__getitem__)[:4]
    line = grids[0].lines[0]
    assert list(line.captions) == [f"{found[line.prompt_id, 0]:.2f}" for found in scores]
    assert "RG-LCD (rg_lcd-s0), LRM (lrm-s0)" in grids[0].note and "LCD (lcd-s0)," not in grids[0].note
    assert "Picked to be bad" in grids[0].note and "4 of 10" in grids[0].note


def test_a_graded_metric_finds_the_worst_before_a_yes_or_no(tmp_path):
    write_model(tmp_path, "lrm", 0, metrics=("oracle_all", "oracle_mean"), num=12, images=4)
    comparison = gather(tmp_path)[0]
    row, column = comparison.rows[0], comparison.column("oracle_all")
    scores = row.scores(row.result(column, 0))
    scores.update({key: float(i % 2) for i, key in enumerate(scores)})
    (grid,) = worst_grids(comparison, kept_images(comparison, tmp_path))
    assert grid.title == "Worst by Oracle, mean"


def test_views_show_the_difference_to_lcd_and_the_spectrum_of_the_same_lines(tmp_path):
    root = world(tmp_path, images=3)
    grid = choose(gather(root)[0], root)
    changed, spectra = view_grids(grid)
    assert [line.prompt_id for line in changed.lines] == [line.prompt_id for line in grid.lines]
    assert changed.title == "Difference to LCD (lcd-s0)" and "dB" in spectra.note
    teacher, lcd = changed.lines[0].images
    assert (np.asarray(lcd) == 128).all() and np.asarray(teacher).std() > 1
    assert {grid.key, changed.key, spectra.key} == {"grid", "grid-difference", "grid-spectrum"}


def test_difference_doubles_and_clips():
    one, two = (Image.new("RGB", (4, 4), colour) for colour in ((10, 100, 255), (20, 100, 0)))
    assert difference(one, two).getpixel((0, 0)) == (108, 128, 255)
    assert difference(one, two.resize((8, 8))).getpixel((3, 3)) == (108, 128, 255)


def test_log_spectrum_of_a_grating_has_its_two_peaks():
    x = np.arange(64)
    pixels = np.broadcast_to((128 + 100 * np.sin(2 * np.pi * 8 * x / 64))[None, :, None], (64, 64, 3))
    (picture,), (low, high) = log_spectra([Image.fromarray(pixels.astype(np.uint8))])
    seen = np.asarray(picture)
    assert high > low and seen[32, 32 - 8] == seen[32, 32 + 8] == 255
    assert seen[32, 32] < 128 and seen[0, 0] < 128
