"""Verdicts in the report: the file's own words and figures, in every format, and none where there is no file."""

import json
import re
from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.evaluate.results import load_results
from rgbench.judge.models import gather
from rgbench.judge.verdict import FILE, HELD_OUT, Family, FigureChange, Verdict
from rgbench.report.formats import Section, latex_document, markdown_document, section
from rgbench.report.page import page
from tests.history.plausible import METRICS, write_model

FEW = ("hps_aa1", "oracle_all")
WORDS = "HPS aa1 rose by 2.60; the spectrum and the oracle got worse <b>beyond</b> what LCD seeds differ by."


def change(metric: str, value: float, delta: float | None, *, clear: bool) -> FigureChange:
    return FigureChange(
        metric=METRICS[metric], protocol="p", model=1.0, base=0.5, teacher=None, deterioration=value,
        low=value - 0.1, high=value + 0.1, basis="images", delta=delta, clear=clear,
        detectable=delta and delta + 0.3,
    )  # fmt: skip


def judge(root: Path, model: str, verdict: str, words: str = WORDS) -> None:
    result = next(found for found in load_results(root) if found.model == model)
    spectrum = (change("hfer_gap_db", 6.1, 0.4, clear=True), change("band_gap_db", 0.3, 0.4, clear=False))
    improved = (change("hps_aa0", 0.1, 0.2, clear=False), change("oracle_all", -3.0, 0.2, clear=False))
    found = Verdict(
        world="benchtop", model=model, generation=result.generation, base="lcd-s0", verdict=verdict, words=words,
        rewards=(change("hps_aa1", 2.6, 0.2, clear=True),),
        families=(
            Family(name="spectrum", worse=True, figures=spectrum),
            Family(name="set distance", worse=False, figures=(change("fd_efflite0", 1.0, 1.2, clear=False),)),
            Family(name=HELD_OUT, worse=False, better=True, figures=improved),
        ),
        delta_seeds=("lcd-s1",), false_positives={"pairs": 42, "over_optimised": 1, "two_worse": 3},
        false_positive_interval=(0.001, 0.62),
    )  # fmt: skip
    (result.path.parent / FILE).write_text(found.model_dump_json(), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for method in ("lcd", "rg_lcd"):
        write_model(tmp_path, method, 0, metrics=FEW, num=8)
    return tmp_path


def world(root: Path) -> Section:
    return section(gather(root)[0], root)


def test_a_verdict_is_told_in_its_own_words_and_sets_the_tone(root):
    (unjudged,) = world(root).readings
    assert unjudged.verdict == "" and "The trained reward rose" in unjudged.weighing
    judge(root, "rg_lcd-s0", "no gain")
    (reading,) = world(root).readings
    assert reading.weighing.startswith("One training seed each"), "weighed once, by the verdict"
    assert reading.verdict == f"Verdict: no gain. {WORDS}"
    assert (reading.tone, reading.label) == ("flat", "verdict: no gain")
    judge(root, "rg_lcd-s0", "over-optimised")
    assert world(root).readings[0].tone == "worse"


def test_the_table_shows_of_each_family_what_is_furthest_beyond_its_delta(root):
    judge(root, "rg_lcd-s0", "over-optimised")
    table = world(root).tables[0]
    assert [h.label for h in table.headings] == [
        "Verdict", "Trained reward", "Spectrum", "Pixel and colour", "Set distance", "Diversity",
        "Held-out rewards or oracle", "Fragility", "False positives",
    ]  # fmt: skip
    ((labels, cells),) = table.rows
    assert labels == ("RG-LCD", "LCM, 4 steps, g 5", "rg_lcd-s0")
    assert [cell.text for cell in cells] == [
        "over-optimised",
        "up: HPS aa1 +2.60 ± 0.10 (δ 0.20)",
        "worse: HFER gap +6.10 ± 0.10 dB (δ 0.40)",
        "—",
        "not worse: FD-EffLite0 +1.00 ± 0.10 (δ 1.20, found from 1.50)",
        "—",
        "better: Oracle, all right -3.0 ± 0.1 points (δ 0.2)",
        "—",
        "1 of 42 LCD pairs (0 to 62 %)",
    ]
    assert "δ is from 1 LCD students: lcd-s1. Compared: rg_lcd-s0 with lcd-s0." in table.notes
    assert any(note.startswith("False positives: the same rule on pairs of LCD students") for note in table.notes)


def test_every_format_has_it_escaped(root):
    judge(root, "rg_lcd-s0", "over-optimised")
    sections = [world(root)]
    text, tex, html = markdown_document(sections), latex_document(sections), page(sections)
    for shown in (text, html):
        assert "Verdict: over-optimised." in shown and "&lt;b&gt;beyond&lt;/b&gt;" in shown and "<b>beyond" not in shown
    assert r"($\delta$ 0.40)" in tex and "Verdicts, benchtop" in tex


def test_of_several_seeds_the_verdicts_are_counted(root):
    write_model(root, "rg_lcd", 1, metrics=FEW, num=8)
    write_model(root, "lcd", 1, metrics=FEW, num=8)
    judge(root, "rg_lcd-s0", "over-optimised")
    judge(root, "rg_lcd-s1", "over-optimised")
    found = world(root)
    assert found.readings[0].verdict == (
        "Verdicts over 2 training seeds: over-optimised 2 of 2 times. Worse beyond δ: spectrum 2 of 2. "
        "False positives of the rule: 1 of 42 LCD pairs (0 to 62 %)."
    )
    assert len(found.tables[0].rows) == 2 and found.readings[0].label == "verdict: over-optimised"
    shown = page([found])
    for model in ("rg_lcd-s0", "rg_lcd-s1"):
        assert re.search(rf'm-rg_lcd">RG-LCD</span>.{{0,80}}<span class="sub id">{model}</span>', shown), model
    write_model(root, "rg_lcd", 2, metrics=FEW, num=8)
    judge(root, "rg_lcd-s2", "not over-optimised")
    (reading,) = world(root).readings
    assert reading.label == "verdict: over-optimised (2 of 3 seeds)"
    assert "over-optimised 2 of 3 times; not shown to be over-optimised 1 of 3 times." in reading.verdict


def test_of_several_seeds_what_got_better_in_a_worse_family_is_counted(root):
    write_model(root, "rg_lcd", 1, metrics=FEW, num=8)
    for seed in range(2):
        judge(root, f"rg_lcd-s{seed}", "over-optimised")
        path = next(root.rglob(f"rg_lcd-s{seed}/*/{FILE}"))
        content = json.loads(path.read_text())
        first = content["families"][0]["figures"]
        first[1] |= {"deterioration": -1.0, "low": -1.1, "high": -0.9}
        first.append(first[1] | {"deterioration": -0.3, "low": -0.4, "high": -0.2})  # not beyond δ
        path.write_text(json.dumps(content))
    assert (
        "Worse beyond δ: spectrum 2 of 2 (though 2 of the 6 figures there are better)."
        in world(root).readings[0].verdict
    )


def test_what_was_not_found_is_not_shown_to_be_absent(root):
    judge(root, "rg_lcd-s0", "not over-optimised")
    found = world(root)
    assert found.readings[0].label == "verdict: not shown to be over-optimised"
    judge(root, "rg_lcd-s0", "not over-optimised", "Not shown to be over-optimised. The rest.")
    assert world(root).readings[0].verdict == "Verdict: not shown to be over-optimised. The rest.", "said once"
    assert found.tables[0].rows[0][1][0].text == "not shown to be over-optimised"
    old = json.loads((path := next(root.rglob(FILE))).read_text())
    del old["false_positive_interval"]
    path.write_text(json.dumps(old | {"false_positives": None, "delta_seeds": []}))
    table = world(root).tables[0]
    assert table.rows[0][1][-1].text == "—" and len(table.notes) == 2
    assert table.notes[1] == "Too few LCD students for a δ. Compared: rg_lcd-s0 with lcd-s0."


def test_a_verdict_that_could_not_be_given_says_why_and_sets_no_tone(root):
    judge(root, "rg_lcd-s0", "none", "One LCD seed is too few.")
    (reading,) = world(root).readings
    assert reading.verdict == "Verdict: none is possible. One LCD seed is too few." and reading.tone == "mixed"


def test_a_verdict_on_other_weights_is_not_this_models(root):
    judge(root, "rg_lcd-s0", "over-optimised")
    path = next(root.rglob(FILE))
    content = json.loads(path.read_text())
    content["generation"]["id"] = "lcm4-00000000"
    path.write_text(json.dumps(content))
    assert world(root).readings[0].verdict == "" and world(root).tables[0].key == "comparison"


def test_a_broken_verdict_is_named(root):
    judge(root, "rg_lcd-s0", "over-optimised")
    path = next(root.rglob(FILE))
    path.write_text(re.sub(r'"over-optimised"', '"splendid"', path.read_text(), count=1))
    with pytest.raises(UsageError, match=r"verdict\.json: not a verdict"):
        world(root)
