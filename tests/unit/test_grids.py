"""Grids: the same prompts and seeds in all columns, drawn and not picked, readable captions."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import SHEET, SheetImage, write_sheet
from rgbench.judge.models import ResultSet, load_result_sets
from rgbench.report.grids import (
    CAPTION,
    GAP,
    TILE,
    Grid,
    difference,
    enlarge,
    first_scores,
    grid_png,
    kept_images,
    log_spectra,
    random_grid,
    strip,
    view_grids,
    worst_grids,
    wrap,
)
from tests.history.plausible import write_model
from tests.results_maker import make_result

ONE = ("hps",)
V1 = Path(__file__).parents[1] / "history" / "results_v1"


def world(root: Path, images: int = 12, **how) -> Path:
    write_model(root, "teacher", None, metrics=ONE, num=4, images=images, **how)
    write_model(root, "lcd", 0, metrics=ONE, num=4, images=images, **how)
    return root


def read(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def choose(root: Path) -> Grid | None:
    results = read(root)
    return random_grid(results, kept_images(results))


def test_the_choice_is_random_by_a_stated_seed_and_the_same_each_time(tmp_path):
    root = world(tmp_path)
    one, two = (choose(root) for _ in range(2))
    shown = [line.prompt_id for line in one.lines]
    assert shown == [line.prompt_id for line in two.lines] and len(set(shown)) == 8
    assert shown != sorted(shown), "not simply the first"
    assert "8 prompts drawn at random" in one.note and "from the 12 stored" in one.note and "default_rng(0)" in one.note


def test_each_line_shows_one_prompt_and_seed_of_every_model(tmp_path):
    root = world(tmp_path, images=3)
    grid = choose(root)
    assert list(grid.columns.values()) == ["Teacher", "LCD"]
    for line in grid.lines:
        for model, image in zip(grid.columns, line.images, strict=True):
            stored = {about.prompt_id: pixels for about, pixels in model.first.images.items()}
            np.testing.assert_array_equal(np.asarray(image), np.asarray(stored[line.prompt_id]))


def test_only_prompts_common_to_all_are_shown_and_other_models_named(tmp_path):
    root = world(tmp_path, images=3)
    write_model(root, "lrm", 0, metrics=ONE, num=4, images=2)
    write_model(root, "lrm", 0, model="other-s0", metrics=ONE, num=4, images=1, prompts=["another prompt"])
    write_model(root, "external", None, model="bare", metrics=ONE, num=4)
    grid = choose(root)
    assert len(grid.lines) == 2 and len(grid.columns) == 3
    assert grid.note.endswith("No stored images of these prompts: LRM, other; bare.")


def test_no_images_no_grid(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=ONE, num=4)
    results = read(tmp_path)
    assert worst_grids(results, kept_images(results)) == [] and choose(tmp_path) is None


def test_of_several_training_seeds_the_first_stands(tmp_path):
    for seed in (2, 1):
        write_model(tmp_path, "lcd", seed, metrics=ONE, num=4, images=1)
    grid = choose(tmp_path)
    (model,) = grid.columns
    assert model.names == ("lcd-s1", "lcd-s2") and "First training seed shown" in grid.note
    first = next(iter(model.results[1].images.values()))
    np.testing.assert_array_equal(np.asarray(grid.lines[0].images[0]), np.asarray(first))


def test_png_holds_the_images_pixel_by_pixel(tmp_path):
    root = world(tmp_path, images=1)
    grid = choose(root)
    sheet = np.asarray(Image.open(io.BytesIO(grid_png(grid, "benchtop"))))
    assert sheet.shape[1] == CAPTION + 2 * (TILE + GAP) + GAP
    cell = np.asarray(enlarge(grid.lines[0].images[1], TILE))
    rows = sheet[:, CAPTION + TILE + GAP : CAPTION + 2 * TILE + GAP]
    top = next(y for y in range(len(rows) - TILE) if np.array_equal(rows[y : y + TILE], cell))
    assert (cell[::3, ::3] == np.asarray(grid.lines[0].images[1])).all() and top > 0


def test_long_prompts_and_emoji_are_wrapped_and_cut(tmp_path):
    prompts = ["<script>alert(1)</script> 🙂 " + "long " * 500, "x" * 2000, ""]
    root = world(tmp_path, images=3, prompts=prompts)
    sheet = Image.open(io.BytesIO(grid_png(choose(root), "benchtop")))
    assert sheet.height < 3 * (TILE + GAP) + 250


def test_wrap_respects_width_and_line_count():
    from rgbench.report.grids import _font

    font = _font("", 17)
    lines = wrap("a large red circle " * 20, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 220 for line in lines)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A result of schema 1, of which images are files of their own."""
    root = tmp_path / "results"
    shutil.copytree(V1, root)
    for folder in {path.parent for path in root.glob("*/*/*/*.json")}:
        images = folder / "images"
        images.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(images / "one.png")
        entry = {"file": "one.png", "prompt_id": "p/0", "prompt": "red", "seed": 0}
        (images / "index.json").write_text(json.dumps([entry]))
    return root


def test_images_of_old_results_are_shown(old):
    grid = choose(old)
    assert [line.prompt for line in grid.lines] == ["red"] and len(grid.columns) == 2


@pytest.mark.parametrize("entry", [{"file": "../../secret.png"}, {"file": "/etc/passwd"}, "text", {}])
def test_an_index_cannot_name_files_elsewhere(old, entry):
    next(old.rglob("index.json")).write_text(json.dumps([entry]))
    with pytest.raises(UsageError, match="index.json"):
        choose(old)


def test_a_broken_image_is_named(old, tmp_path):
    next(old.rglob("*.png")).write_bytes(b"not an image")
    with pytest.raises(UsageError, match="one.png"):
        choose(old)
    root = world(tmp_path / "new", images=1)
    next(root.rglob(SHEET)).write_bytes(b"not an image")
    with pytest.raises(UsageError, match=SHEET):
        choose(root)


def test_the_worst_prompts_are_those_of_the_guided_students_and_say_so(tmp_path):
    metrics = ("hps", "oracle_all", "oracle_mean", "fd_efflite0")
    for method in ("lcd", "rg_lcd", "lrm"):
        write_model(tmp_path, method, 0, metrics=metrics, num=12, images=10)
    results = read(tmp_path)
    grids = worst_grids(results, kept_images(results))
    assert [grid.title for grid in grids] == ["Worst by Oracle, all right", "Worst by HPS"]
    scores = [first_scores(model, results.column("hps")) for model in results.models]
    lowest = {key: min(scores[1][key], scores[2][key]) for key in ((f"test/{i}", 0) for i in range(10))}
    assert [(line.prompt_id, line.seed) for line in grids[1].lines] == sorted(lowest, key=lowest.__getitem__)[:3]
    line = grids[1].lines[0]
    assert list(line.captions) == [f"{found[line.prompt_id, 0]:.2f}" for found in scores]
    assert "in any of RG-LCD; LRM." in grids[1].note and "3 of 10 stored prompts" in grids[1].note
    assert "Picked to be bad" in grids[1].note


def test_a_graded_metric_finds_the_worst_before_a_yes_or_no(tmp_path):
    rows = {"oracle_all": [0.0, 100.0] * 6, "oracle_mean": np.linspace(50, 90, 12)}
    result = make_result(tmp_path, "lrm-s0", rows=rows)
    about = [SheetImage(prompt_id=f"p/{i}", prompt=f"{i}", seed=0) for i in range(4)]
    write_sheet(result.folder, result.head, result.runs[0], [(each, np.zeros((8, 8, 3), np.uint8)) for each in about])
    results = read(tmp_path)
    (grid,) = worst_grids(results, kept_images(results))
    assert grid.title == "Worst by Oracle, mean"
    assert {line.captions[0][0] for line in grid.lines} == {"✓", "✗"}, "right or wrong, beside the value"


def test_the_oracle_marks_each_image_right_or_wrong(tmp_path):
    for name, rows in {"teacher": [100.0, 100.0, 0.0], "lcd-s0": [100.0, 0.0, 0.0]}.items():
        result = make_result(tmp_path, name, rows={"oracle_all": rows, "hps": [1.0, 2.0, 3.0]})
        about = [SheetImage(prompt_id=f"p/{i}", prompt=f"{i}", seed=0) for i in range(3)]
        write_sheet(result.folder, result.head, result.runs[0], [(e, np.zeros((8, 8, 3), np.uint8)) for e in about])
    grid = choose(tmp_path)
    assert {line.prompt_id: line.captions for line in grid.lines} == {
        "p/0": ("✓", "✓"), "p/1": ("✓", "✗"), "p/2": ("✗", "✗"),
    }  # fmt: skip
    assert "✓ or ✗" in grid.note
    assert "✓" not in choose(world(tmp_path / "without")).note


def test_the_strip_shows_one_model_of_each_method_with_most_seeds(tmp_path):
    for name, method, seeds in (("lcd", "lcd", 1), ("rg_lcd", "rg_lcd", 1), ("rg_lcd-b10", "rg_lcd", 2)):
        for seed in range(seeds):
            write_model(tmp_path, method, seed, model=f"{name}-s{seed}", metrics=ONE, num=4, images=4)
    grid = choose(tmp_path)
    few = strip(grid)
    assert list(few.columns.values()) == ["LCD", "RG-LCD, b10"] and len(few.lines) == 2
    at = list(grid.columns.values()).index("RG-LCD, b10")
    assert all(a.images[1] is b.images[at] for a, b in zip(few.lines, grid.lines, strict=False))


def test_views_show_the_difference_to_lcd_and_the_spectrum_of_the_same_lines(tmp_path):
    root = world(tmp_path, images=3)
    grid = choose(root)
    changed, spectra = view_grids(grid)
    assert [line.prompt_id for line in changed.lines] == [line.prompt_id for line in grid.lines]
    assert changed.title == "Difference to LCD" and "dB" in spectra.note
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
