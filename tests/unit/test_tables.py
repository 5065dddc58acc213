"""Tables: what is printed is what the result files hold, and what may not be compared is kept apart."""

import re
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import load_results
from rgbench.judge.models import Comparison, contrast, gather, leaders
from rgbench.report.formats import escape as escape_markdown
from rgbench.report.formats import latex_escape as escape_latex
from rgbench.report.tables import Table, cost_tables, detail_tables, format_figure, format_number, tables
from tests.history.plausible import write_model
from tests.results_maker import put

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


def table(comparison: Comparison, key: str) -> Table:
    return next(table for table in tables(comparison) if table.key == key)


@pytest.fixture(scope="module")
def old() -> Comparison:
    return gather(HISTORY)[0]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Seven training seeds of three methods, two of another, and the teacher."""
    root = tmp_path_factory.mktemp("seeds")
    few = ("hps_aa1", "oracle_all", "fd_efflite0", "hfer_gap_db")
    write_model(root, "teacher", None, metrics=few, num=8)
    for method in ("lcd", "rg_lcd", "lrm"):
        for seed in range(7):
            write_model(root, method, seed, metrics=few, num=8)
    for seed in range(2):
        write_model(root, "lrm", seed, model=f"lrm-twice-s{seed}", metrics=few, num=8)
    return gather(root)[0]


@pytest.mark.parametrize(
    ("value", "low", "high", "decimals", "shown"),
    [
        (12.345678, 12.245678, 12.445678, 2, "12.35 ± 0.10"),
        (12.345678, 12.2, 13.0, 2, "12.35 [12.20, 13.00]"),
        (191.587, 181.469, 201.705, 2, "192 ± 10"),
        (127.94, 123.18, 132.7, 2, "127.9 ± 4.8"),
        (127.94, 120.0, 132.7, 2, "127.9 [120.0, 132.7]"),
        (12.345678, None, None, 1, "12.3"),
        (0.5, 0.4999, 0.5001, 2, "0.50 ± <0.01"),
        (0.5, 0.5, 0.5, 2, "0.50 ± 0.00"),
        (-0.004, -0.104, 0.096, 2, "0.00 ± 0.10"),
    ],
)
def test_figures_have_the_digits_that_their_interval_is_worth(value, low, high, decimals, shown):
    assert format_figure(value, low, high, decimals) == shown


def test_signed_numbers_never_show_a_signed_zero():
    assert [format_number(v, 1, signed=True) for v in (1.25, -1.25, 0.04, -0.04)] == ["+1.2", "-1.2", "0.0", "0.0"]


def test_every_result_with_a_value_is_printed_to_its_digits(old):
    shown = {heading.label: i for i, heading in enumerate(table(old, "comparison").headings)}
    rows = {labels[2]: cells for labels, cells in table(old, "comparison").rows}
    results = load_results(HISTORY)
    assert len(results) == 16
    for result in results:
        at = [i for i, h in enumerate(table(old, "comparison").headings) if h.label == result.metric.label]
        texts = [rows[result.model][i].text for i in at]
        if result.value is None:
            assert texts == ["—"] * len(texts)
        else:
            printed = [text.split()[0] for text in texts if text != "—"]
            places = [len(text.partition(".")[2]) for text in printed]
            assert places and all(1 <= place <= result.metric.decimals for place in places)
            assert any(format_number(result.value, place) == text for text, place in zip(printed, places, strict=True))
    assert set(shown) == {result.metric.label for result in results}


def test_rows_are_ordered_teacher_lcd_rg_lcd_lrm(old):
    assert [labels[0] for labels, _ in table(old, "comparison").rows] == ["Teacher", "LCD", "RG-LCD", "LRM"]


def test_only_models_trained_on_the_reward_are_marked_in_sample(old):
    rows = table(old, "comparison").rows
    assert [cells[0].marks for _, cells in rows] == ["", "", "†", "†"]
    assert not any("†" in cell.marks for _, cells in rows for cell in cells[1:])
    assert any(note.startswith("† in-sample") for note in table(old, "comparison").notes)


def test_two_protocols_are_two_columns_and_the_footnote_names_the_field(old):
    found = table(old, "comparison")
    at = [i for i, heading in enumerate(found.headings) if heading.label == "FD-EffLite0"]
    assert len(at) == 2 and len({found.headings[i].note for i in at}) == 2
    for _, cells in found.rows:
        assert sorted(cells[i].number is not None for i in at) == [False, True]
    assert any("prompts.num (2048 against 512)" in note for note in found.notes)


def test_flags_are_marked_and_explained(old):
    found = table(old, "comparison")
    marked = [cell for _, cells in found.rows for cell in cells if "‡" in cell.marks]
    assert [cell.number for cell in marked] == [26.5]
    assert any("n<=d" in note for note in found.notes)


def test_single_seeds_bold_nothing(old):
    assert not any(cell.rank for table in tables(old) for _, cells in table.rows for cell in cells)
    assert not any(note.startswith("Bold") for note in table(old, "comparison").notes)


def test_target_metrics_prefer_the_value_nearest_to_the_target(old):
    column = old.column("hfer_gap_db")
    lcd = next(row for row in old.rows if row.method == "lcd")
    gains = {row.method: contrast(row, lcd, column).gain for row in old.rows if row is not lcd}
    assert gains["lrm"] == pytest.approx(1.9 - 0.004) and gains["rg_lcd"] < 0 < gains["teacher"]


def test_differences_without_pairing_are_marked_and_add_intervals_in_quadrature(old):
    rows = {row.method: row for row in old.rows}
    found = contrast(rows["rg_lcd"], rows["lcd"], old.column("hps_aa1"))
    assert found.basis == "quadrature"
    assert (found.value, found.high - found.value) == (pytest.approx(2.6), pytest.approx(0.07 * 2**0.5))
    cells = dict(table(old, "delta-lcd").rows)[("RG-LCD", "LCM, 4 steps, g 5", "rg_lcd-s0")]
    assert (cells[0].text, cells[0].marks, cells[0].trend) == ("+2.60 ± 0.10", "†¶", "higher")


def test_the_undefined_is_a_dash_and_never_compared(old):
    oracle = old.column("oracle_all")
    rows = {row.method: row for row in old.rows}
    assert rows["lrm"].figure(oracle) is None
    assert contrast(rows["lrm"], rows["lcd"], oracle) is None


def test_seeds_aggregate_to_mean_and_t_interval(seeds):
    row = next(row for row in seeds.rows if row.method == "lcd")
    column = seeds.column("fd_efflite0")
    values = [row.result(column, seed).value for seed in range(7)]
    figure = row.figure(column)
    assert figure.value == pytest.approx(sum(values) / 7)
    deviation = (sum((v - figure.value) ** 2 for v in values) / 6) ** 0.5
    assert figure.high - figure.value == pytest.approx(2.446911851 * deviation / 7**0.5)
    assert row.model_label == "lcd, 7 seeds"


def test_bold_only_where_seeds_separate_and_never_in_sample(seeds):
    column = seeds.column("fd_efflite0")
    best, second = leaders(seeds.rows, column)
    assert (best.stem, second.stem) == ("lcd", "lrm")
    rows = {labels[2]: cells for labels, cells in table(seeds, "comparison").rows}
    ranks = {name: [cell.rank for cell in cells] for name, cells in rows.items()}
    assert ranks["lcd, 7 seeds"][2] == 1 and ranks["lrm, 7 seeds"][2] == 2
    assert ranks["lrm-twice, 2 seeds"] == [0] * 4, "two seeds carry no claim"
    assert any("fewer than 6 training seeds" in note for note in table(seeds, "comparison").notes)
    assert ranks["rg_lcd, 7 seeds"][0] == 0, "best, but trained on that reward"


def test_ties_bold_nothing(tmp_path):
    for seed in range(6):
        for method in ("lcd", "rg_lcd"):
            write_model(tmp_path, method, seed, metrics=("fd_efflite0",), rows=False)
    paths = list(tmp_path.rglob("*.json"))
    for path in paths:
        path.write_text(re.sub(r'"value": [\d.]+', '"value": 20.0', path.read_text()))
    comparison = gather(tmp_path)[0]
    assert leaders(comparison.rows, comparison.column("fd_efflite0")) == (None, None)


def test_a_level_without_real_images_has_no_good_end(tmp_path):
    """A HFER of -9 dB is nearer to 0 than one of -12, and not the better for it."""
    for seed in range(6):
        for method, value in (("lcd", -12.0), ("rg_lcd", -9.0)):
            put(tmp_path, f"{method}-s{seed}", "hfer_db", value + 0.01 * seed, half=0.1, level=True)
            put(tmp_path, f"{method}-s{seed}", "hfer_gap_db", value + 0.01 * seed, half=0.1)
    comparison = gather(tmp_path)[0]
    best = {column.metric.name: leaders(comparison.rows, column)[0] for column in comparison.columns}
    assert best["hfer_db"] is None and best["hfer_gap_db"].stem == "rg_lcd"
    arrows = {heading.label: heading.arrow for table in tables(comparison) for heading in table.headings}
    assert (arrows["HFER_DB"], arrows["HFER_GAP_DB"]) == ("", "→0")


def test_one_seed_with_two_sets_of_weights_is_two_rows(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=("fd_efflite0",))
    path = next(tmp_path.rglob("*.json"))
    again = path.parent.with_name("lcm4-again") / path.name
    again.parent.mkdir()
    text = path.read_text().replace(path.parent.name, "lcm4-again")
    again.write_text(re.sub(r'"weights_sha256": "\w+"', '"weights_sha256": "f00d"', text))
    labels = [row.model_label for row in gather(tmp_path)[0].rows]
    assert len(labels) == len(set(labels)) == 2 and any("lcm4-again" in label for label in labels)


def test_one_model_alone_gives_tables_without_differences(tmp_path):
    write_model(tmp_path, "external", None, metrics=("fd_efflite0",))
    found = tables(gather(tmp_path)[0])
    assert [table.key for table in found] == ["comparison"]


def test_per_image_scores_are_compared_paired(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=("oracle_all",), num=32)
    write_model(tmp_path, "lrm", 0, metrics=("oracle_all",), num=32)
    comparison = gather(tmp_path)[0]
    column = comparison.column("oracle_all")
    lcd, lrm = comparison.rows
    paired = contrast(lrm, lcd, column)
    assert paired.basis == "images"
    assert paired.high - paired.value < 0.2 < lrm.figure(column).high - lrm.figure(column).value
    assert paired.value == pytest.approx(lrm.figure(column).value - lcd.figure(column).value)


def test_costs_come_from_the_files(old):
    (found,) = cost_tables(old)
    labels = [heading.label for heading in found.headings]
    rows = {labels[2]: [cell.text for cell in cells] for labels, cells in found.rows}
    assert labels == ["Training time", "Training CPU time", "Reward calls", "NFE", "Generation"]
    assert rows["lrm-s0"] == ["210", "399", "8000", "4", "41.7"]
    assert rows["teacher"] == ["—", "—", "—", "100", "3.5"]


def test_groups_octaves_and_checks_are_shown_where_results_hold_them(tmp_path, old):
    assert detail_tables(old) == []
    write_model(tmp_path, "lcd", 0, metrics=("oracle_all", "fd_efflite0", "hfer_gap_db"))
    found = {table.key: table for table in detail_tables(gather(tmp_path)[0])}
    assert [h.label for h in found["groups"].headings] == ["Oracle, all right, test", "Oracle, all right, heldout"]
    assert [h.label for h in found["octave-gaps-db"].headings] == ["1/8 to 1/4", "1/4 to 1/2"]
    assert [cell.text for cell in found["octave-gaps-db"].rows[0][1]] == ["-0.50", "+1.25"]
    assert [h.label for h in found["checks"].headings] == ["Judges agree", "FD-EffLite0, split-half null"]


def test_tables_say_how_many_images_are_behind_their_figures(old, seeds):
    assert table(seeds, "comparison").notes[0] == "n = 2048 images behind each figure, of each training seed."
    first = table(old, "comparison").notes[0]
    assert (
        first
        == "Images behind each figure: 2048 in HPS aa1, Oracle, all right, FD-EffLite0, HFER gap; 512 in FD-EffLite0."
    )


def test_worlds_are_never_mixed(tmp_path):
    write_model(tmp_path, "lcd", 0, metrics=("hps_aa1",))
    write_model(tmp_path, "lcd", 0, metrics=("hps_aa1",), world="sd15")
    assert [(c.world, len(c.rows)) for c in gather(tmp_path)] == [("benchtop", 1), ("sd15", 1)]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_nothing_to_report_says_what_to_run(tmp_path, make):
    make(tmp_path / "results")
    with pytest.raises(UsageError, match="rgbench eval"):
        gather(tmp_path / "results")


def test_markdown_and_latex_specials_have_no_effect():
    hostile = 'a|b <script> \\input{x} $y$ 50% #1 ~^ "q" _it_ `c` 🙂\nnew'
    assert "<script>" not in escape_markdown(hostile) and "\n" not in escape_markdown(hostile)
    assert escape_markdown("![x](http://a) [0.1, 0.2]") == r"![x\](http://a) [0.1, 0.2]"
    assert r"\|" in escape_markdown(hostile) and r"\`c\`" in escape_markdown(hostile)
    latex = escape_latex(hostile)
    assert r"\textbackslash{}input\{x\}" in latex and r"\$y\$" in latex and "[U+1F642]" in latex and latex.isascii()
    assert len(escape_markdown("x" * 2000)) <= 200
