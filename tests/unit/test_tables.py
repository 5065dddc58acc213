"""Tables: what is printed is what the results hold, and what may not be compared is kept apart."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import load_results
from rgbench.judge.models import ResultSet, load_result_sets
from rgbench.judge.paired import delta
from rgbench.judge.verdict import judge_set
from rgbench.metrics.values import metric_info
from rgbench.report.formats import escape, latex_escape
from rgbench.report.tables import Entry, Head, Table, all_tables
from rgbench.report.words import format_number, format_value, names, samplers
from tests.history.plausible import write_model
from tests.results_maker import HACKED, make_result, make_students

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
FEW = ("hps", "oracle_all", "fd_efflite0", "hfer_db")


def read(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def table(results: ResultSet, key: str) -> Table:
    return next(table for table in all_tables(results, judge_set(results)) if table.key == key)


def entries(found: Table) -> dict[str, dict[str, Entry]]:
    """By model name and the head's label."""
    heads = [head.label for head in found.heads]
    return {labels[0]: dict(zip(heads, row, strict=True)) for labels, row in found.rows}


@pytest.fixture(scope="module")
def old() -> ResultSet:
    return read(HISTORY)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> ResultSet:
    """Seven training seeds of three methods, two of another, and the teacher."""
    root = tmp_path_factory.mktemp("seeds")
    write_model(root, "teacher", None, metrics=FEW, num=8)
    for method in ("lcd", "rg_lcd", "lrm"):
        for seed in range(7):
            write_model(root, method, seed, metrics=FEW, num=8)
    for seed in range(2):
        write_model(root, "lrm", seed, model=f"lrm-twice-s{seed}", metrics=FEW, num=8)
    return read(root)


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
def test_values_have_the_digits_that_their_interval_is_worth(value, low, high, decimals, shown):
    assert format_value(value, low, high, decimals) == shown


def test_signed_numbers_never_show_a_signed_zero():
    assert [format_number(v, 1, signed=True) for v in (1.25, -1.25, 0.04, -0.04)] == ["+1.2", "−1.2", "0.0", "0.0"]


def test_every_value_is_printed_to_its_digits(old):
    heads: list[Head] = []
    rows: dict[str, list[Entry]] = {}
    for found in (table(old, "declared"), table(old, "more-spectrum")):
        heads += found.heads
        for labels, row in found.rows:
            rows.setdefault(labels[1], []).extend(row)
    values = [(result.head.model, value) for result in load_results(HISTORY) for value in result.values]
    assert len(values) == 16
    for model, value in values:
        info = metric_info(value.metric)
        label = f"{info.label} gap" if value.reference else info.label
        texts = [rows[model][i].text for i, head in enumerate(heads) if head.label.split(", n =")[0] == label]
        if value.value is None:
            assert texts == ["—"] * len(texts)
        else:
            printed = [text.split()[0] for text in texts if text != "—"]
            places = [len(text.partition(".")[2]) for text in printed]
            assert places and all(1 <= place <= info.decimals for place in places)
            assert any(format_number(value.value, place) == text for text, place in zip(printed, places, strict=True))


def test_models_are_ordered_teacher_lcd_rg_lcd_lrm(old):
    assert [labels[0] for labels, _ in table(old, "declared").rows] == ["Teacher", "LCD", "RG-LCD", "LRM"]


def test_names_say_what_differs_and_the_sampler_is_said_once(tmp_path):
    for name in ("lcd-b0-s0", "rg_lcd-s0", "rg_lcd-b10-s0", "rg_lcd-b10-s1"):
        write_model(tmp_path, name.split("-")[0], int(name[-1]), model=name, metrics=("hps",), num=4)
    write_model(tmp_path, "external", None, model="mine", metrics=("hps",), num=4)
    write_model(tmp_path, "teacher", None, metrics=("hps",), num=4)
    results = read(tmp_path)
    assert list(names(results).values()) == ["Teacher", "LCD", "RG-LCD", "RG-LCD, b10", "mine"]
    assert samplers(results) == "Students: LCM, 4 steps, g 5. Teacher: DDIM, 50 steps, g 3."
    write_model(tmp_path, "rg_lcd", 0, model="rg_lcd-s0", metrics=("hps",), num=4, steps=2)
    results = read(tmp_path)
    assert list(names(results).values()) == [
        *("Teacher", "LCD", "RG-LCD, LCM, 2 steps, g 5", "RG-LCD, LCM, 4 steps, g 5", "RG-LCD, b10", "mine")
    ]
    assert samplers(results) == "Students: LCM, 4 steps, g 5. Teacher: DDIM, 50 steps, g 3.", "but for those named"


def test_names_say_what_recipes_set_otherwise(tmp_path):
    plain = {"guidance.share": 0.3, "guidance.scale": None, "train.steps": 250}
    for name, recipe in {
        "rg_lcd-s0": plain,
        "rg_lcd-s1": plain,
        "rg_lcd-half-s0": plain | {"guidance.share": 0.5},
        "rg_lcd-b10-s0": plain | {"guidance.share": None, "guidance.scale": 10.0},
        "lrm-s0": plain,
    }.items():
        digest = str(sorted(recipe.items(), key=str))
        make_result(
            tmp_path, name, name.split("-")[0], values={"hps": 1.0}, recipe_sha256=digest, head={"recipe": recipe}
        )
    found = set(names(read(tmp_path)).values())
    assert found == {"RG-LCD, share .3", "RG-LCD, share .5", "RG-LCD, scale 10", "LRM"}


def test_quick_runs_of_other_sizes_are_headings_that_say_so(tmp_path):
    for num in (4, 8, 24):
        write_model(tmp_path, "lcd", 0, metrics=("hps", "oracle_all"), num=num, protocol_num=num)
    write_model(tmp_path, "lcd", 0, metrics=("hfer_db",), num=8, protocol_num=8)
    found = table(read(tmp_path), "declared")
    assert [head.label for head in found.heads] == [
        *(f"Oracle, all right, n = {num}" for num in (4, 8, 24)),
        *(f"HPS, n = {num}" for num in (4, 8, 24)),
    ]


def test_only_models_trained_on_the_reward_are_marked(old):
    found = table(old, "declared")
    assert {name: row["HPS"].marks for name, row in entries(found).items()} == {
        "Teacher": "", "LCD": "", "RG-LCD": "†", "LRM": "†",
    }  # fmt: skip
    at = [head.label for head in found.heads].index("HPS")
    assert [found.is_trained_on(i) for i in range(len(found.heads))] == [i == at for i in range(len(found.heads))]
    assert any(note.startswith("† trained on") for note in found.notes)


def test_two_protocols_are_two_columns_and_the_footnote_names_the_field(old):
    found = table(old, "declared")
    at = [i for i, head in enumerate(found.heads) if head.label in ("FD-EffLite0, n = 512", "FD-EffLite0, n = 2048")]
    assert len(at) == 2 and len({found.heads[i].note for i in at}) == 2
    for _, row in found.rows:
        assert sorted(row[i].number is not None for i in at) == [False, True]
    assert any("prompts.num (512 against 2048)" in note for note in found.notes)


def test_flags_are_marked_and_explained(old):
    found = table(old, "declared")
    assert [entry.number for _, row in found.rows for entry in row if "‡" in entry.marks] == [26.5]
    assert any(note.startswith("‡ flagged") and "n<=d" in note for note in found.notes)


def test_single_seeds_bold_nothing(old):
    assert not any(entry.best for table in all_tables(old, []) for _, row in table.rows for entry in row)
    assert not any(note.startswith("Bold") for note in table(old, "declared").notes)


def test_changes_keep_their_sign_and_arrows_say_what_is_better(old):
    """HFER went from -1.9 to -0.004 dB of real with LRM, and to +4.2 dB with RG-LCD."""
    found = entries(table(old, "delta-lcd"))
    for name, row in entries(table(old, "delta-lcd-spectrum")).items():
        found[name] |= row
    assert found["LRM"]["HFER gap"].text == "▲ +1.90 ± 0.14" and found["LRM"]["HFER gap"].trend == "better"
    assert found["RG-LCD"]["HFER gap"].text.startswith("▼ +6.1") and found["RG-LCD"]["HFER gap"].trend == "worse"
    assert found["RG-LCD"]["Oracle, all right"].text.startswith("▼ −")
    reward = found["RG-LCD"]["HPS"]
    assert (reward.text, reward.marks, reward.trend) == ("▲ +2.60 ± 0.10", "†¶", "higher"), "not called better"


def test_the_undefined_is_a_dash_and_never_compared(old):
    assert entries(table(old, "declared"))["LRM"]["Oracle, all right"] == Entry("—")
    assert entries(table(old, "delta-lcd"))["LRM"]["Oracle, all right"] == Entry("—")


def test_seeds_aggregate_to_mean_and_t_interval(seeds):
    entry = entries(table(seeds, "declared"))["LCD"]["FD-EffLite0"]
    lcd = next(model for model in seeds.models if model.method == "lcd")
    values = [lcd.result(seeds.column("fd_efflite0"), seed).value for seed in range(7)]
    assert entry.number == pytest.approx(np.mean(values))
    assert entry.high - entry.number == pytest.approx(2.446911851 * np.std(values, ddof=1) / 7**0.5)
    assert len(entry.sources) == 7 and lcd.label == "lcd, 7 seeds"


@pytest.mark.parametrize(("one_run", "bold"), [(10.0, True), (15.2, False), (None, True)])
def test_bold_only_where_no_other_interval_overlaps(tmp_path, one_run, bold):
    for seed in range(6):
        for method, value in (("lcd", 20.0), ("rg_lcd", 15.0)):
            values = {"recall_efflite0": value + 0.1 * seed}
            make_result(tmp_path, f"{method}-s{seed}", values=values, half=1.0)
    if one_run is not None:
        make_result(tmp_path, "lrm-s0", values={"recall_efflite0": one_run + 5}, half=1.0)
    best = {name: row["Recall"].best for name, row in entries(table(read(tmp_path), "declared")).items()}
    assert best.pop("LCD") == bold and not any(best.values())
    assert any(note.startswith("Bold") for note in table(read(tmp_path), "declared").notes) == bold


def test_a_reward_is_never_bold_where_it_was_trained_on(seeds):
    found = entries(table(seeds, "declared"))
    assert found["RG-LCD"]["HPS"].number == max(row["HPS"].number for row in found.values())
    assert not any(row["HPS"].best for row in found.values())


def test_ties_bold_nothing(tmp_path):
    for seed in range(6):
        for method in ("lcd", "rg_lcd"):
            make_result(tmp_path, f"{method}-s{seed}", values={"fd_efflite0": 20.0}, half=1.0)
    assert not any(entry.best for _, row in table(read(tmp_path), "declared").rows for entry in row)


@pytest.mark.parametrize("reference", [None, {"lossy": True}])
def test_without_a_known_good_end_nothing_is_better(tmp_path, reference):
    """A HFER of -9 dB is nearer to 0 than one of -12, and not the better for it."""
    for seed in range(6):
        for method, value in (("lcd", -12.0), ("rg_lcd", -9.0)):
            values = {"hfer_db": value + 0.01 * seed}
            make_result(tmp_path, f"{method}-s{seed}", values=values, half=0.1, reference=reference)
    results = read(tmp_path)
    assert [head.arrow for head in table(results, "declared").heads] == [""]
    assert not any(entry.best for _, row in table(results, "declared").rows for entry in row)
    ((_, (entry,)),) = table(results, "delta-lcd").rows
    assert (entry.text, entry.trend) == ("+3.00 ± 0.00", "")


def test_one_seed_with_two_sets_of_weights_is_two_rows(tmp_path):
    for weights in ("one", "other"):
        make_result(tmp_path, "lcd-s0", values={"fd_efflite0": 20.0}, weights=weights)
    labels = [labels for labels, _ in table(read(tmp_path), "declared").rows]
    assert len(set(labels)) == 2 and all("lcm4-" in name for name, _ in labels)


def test_one_model_alone_gives_tables_without_differences(tmp_path):
    write_model(tmp_path, "external", None, metrics=("hps",))
    assert [table.key for table in all_tables(read(tmp_path), [])] == ["declared", "cost"]


def test_per_image_scores_are_compared_paired(tmp_path):
    for method in ("lcd", "lrm"):
        write_model(tmp_path, method, 0, metrics=("oracle_all",), num=32)
    results = read(tmp_path)
    lcd, lrm = results.models
    found = delta(lrm, lcd, results.column("oracle_all"))
    entry = entries(table(results, "delta-lcd"))["LRM"]["Oracle, all right"]
    assert found.basis == "images" and (entry.number, entry.low, entry.high) == (found.value, found.low, found.high)
    assert entry.high - entry.number < 0.2 and "¶" not in entry.marks


def test_costs_come_from_the_results(old):
    found = table(old, "cost")
    rows = {name: [entry.text for entry in row.values()] for name, row in entries(found).items()}
    assert [head.label for head in found.heads] == [
        "Training time", "Training CPU time", "Reward calls", "NFE", "Generation",
    ]  # fmt: skip
    assert rows["LRM"] == ["210", "399", "8000", "4", "41.7"]
    assert rows["Teacher"] == ["—", "—", "—", "100", "3.5"]


def test_what_results_hold_beside_their_values_is_shown_where_they_do(tmp_path, old):
    keys = {"groups", "octave-gaps-db", "classifiers-agree", "split-half-null"}
    assert not keys & {table.key for table in all_tables(old, [])}
    write_model(tmp_path, "lcd", 0, metrics=("oracle_all", "fd_efflite0", "hfer_db"))
    found = {key: table(read(tmp_path), key) for key in keys}
    assert [head.label for head in found["groups"].heads] == ["Oracle, all right, test", "Oracle, all right, heldout"]
    assert [head.label for head in found["octave-gaps-db"].heads] == ["1/8 to 1/4", "1/4 to 1/2"]
    assert [entry.text for entry in found["octave-gaps-db"].rows[0][1]] == ["−0.50", "+1.25"]
    assert [head.label for head in found["classifiers-agree"].heads] == ["Classifiers agree"]
    assert [head.label for head in found["split-half-null"].heads] == ["FD-EffLite0"]


def test_tables_say_how_many_images_are_behind_their_values(old, seeds):
    assert table(seeds, "declared").notes[0] == "2048 images of each training seed."
    first = table(old, "declared").notes[0]
    assert first == "Images: 2048 for Oracle, all right, HPS, FD-EffLite0, n = 2048; 512 for FD-EffLite0, n = 512."


def test_verdicts_are_one_row_a_method_with_true_signs(tmp_path):
    make_students(tmp_path, "lcd", {}, range(7))
    make_students(tmp_path, "rg_lcd", HACKED)
    found = table(read(tmp_path), "verdict")
    ((labels, row),) = found.rows
    assert labels == ("RG-LCD", "rg_lcd, 6 seeds")
    shown = dict(zip([head.label for head in found.heads], row, strict=True))
    assert (shown["Verdict"].text, shown["Compared with"].text) == ("over-optimised", "lcd, 7 seeds; 6 in common")
    reward = shown["Trained reward"]
    assert re.match(r"▲ HPS \+(5\.9|6\.0)\d ± ", reward.text) and (reward.marks, reward.trend) == ("†", "")
    assert shown["Gold"].text.startswith("▼ Oracle, all right −") and shown["Gold"].text.endswith(" points")
    assert shown["Set distance"].text.startswith("▼ KD-EffLite0 ×1000 +") and shown["Set distance"].trend == "worse"
    assert shown["Saturation"].text.startswith("Saturation gap →0 ") and shown["Saturation"].trend == ""


RADIUS = ((np.arange(16) + 1) / 32).tolist()


def spectrum(shift: float, left: np.ndarray | None = None) -> dict:
    """``shift`` dB above 1/f²; chroma is a tenth of it."""
    power = np.array(RADIUS) ** -2.0 * 10 ** (shift / 10)
    extra = {"radius": RADIUS, "power": power.tolist(), "chroma_power": (power / 10).tolist()}
    return extra | ({} if left is None else {"power_left_out": (power * 10 ** (left / 10)).tolist()})


def test_spectra_are_compared_with_the_teachers_and_lcds(tmp_path):
    left = np.random.default_rng(1).normal(0, 0.1, (20, 16))
    made = {"teacher": 0.0, "lcd-s0": 0.5, "lcd-s1": 0.7, "rg_lcd-s0": 3.0, "rg_lcd-s1": 3.4, "lrm-s0": -1.0}
    for name, shift in made.items():
        kept = {"teacher": left, "lrm-s0": -left}.get(name)  # not what the same prompts would do: an interval
        sampling = {"sampler": "ddim", "steps": 50} if name == "teacher" else {}
        extra = {"hfer_db": spectrum(shift, kept)}
        make_result(tmp_path, name, values={"hfer_db": 1.0}, half=0.5, extra=extra, sampling=sampling)
    found = table(read(tmp_path), "spectral-distance")
    assert [head.text for head in found.heads] == [
        *(
            "Luma, to the teacher (dB) ↓",
            "Chroma, to the teacher (dB) ↓",
            "Luma, to LCD (dB) ↓",
            "Chroma, to LCD (dB) ↓",
        )
    ]
    rows = entries(found)
    luma, to_lcd = "Luma, to the teacher", "Luma, to LCD"
    assert rows["RG-LCD"][luma].number == pytest.approx(3.2) and rows["RG-LCD"][to_lcd].number == pytest.approx(2.6)
    assert rows["RG-LCD"][luma].high == pytest.approx(3.2 + 12.706 * 0.2, abs=1e-3), "t of two seeds"
    assert rows["LCD"][to_lcd].number == pytest.approx(0.2) and rows["LCD"][to_lcd].low is None, "seed against seed"
    assert 0.6 < rows["LRM"][luma].low < 1 < rows["LRM"][luma].high < 1.4
    assert rows["LRM"][to_lcd].number == pytest.approx(1.5) and rows["LRM"][to_lcd].low is None
    assert "Teacher" not in rows


def test_one_spectrum_alone_is_compared_with_nothing(tmp_path):
    make_result(tmp_path, "lcd-s0", values={"hps": 1.0})
    make_result(tmp_path, "rg_lcd-s0", values={"hfer_db": 1.0}, extra={"hfer_db": spectrum(0.5)})
    assert "spectral-distance" not in {table.key for table in all_tables(read(tmp_path), [])}


def test_worlds_are_never_mixed(tmp_path):
    for world in ("benchtop", "sd15"):
        write_model(tmp_path, "lcd", 0, metrics=("hps",), world=world)
    assert [(found.world, len(found.models)) for found in load_result_sets(tmp_path)] == [("benchtop", 1), ("sd15", 1)]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_nothing_to_report_says_what_to_run(tmp_path, make):
    make(tmp_path / "results")
    with pytest.raises(UsageError, match="rgbench eval"):
        load_result_sets(tmp_path / "results")


def test_markdown_and_latex_specials_have_no_effect():
    hostile = 'a|b <script> \\input{x} $y$ 50% #1 ~^ "q" _it_ `c` 🙂\nnew'
    assert "<script>" not in escape(hostile) and "\n" not in escape(hostile)
    assert escape("![x](http://a) [0.1, 0.2]") == r"![x\](http://a) [0.1, 0.2]"
    assert r"\|" in escape(hostile) and r"\`c\`" in escape(hostile)
    latex = latex_escape(hostile)
    assert r"\textbackslash{}input\{x\}" in latex and r"\$y\$" in latex and "[U+1F642]" in latex and latex.isascii()
    assert len(escape("x" * 2000)) <= 200
