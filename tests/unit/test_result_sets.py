"""Models, seeds, budgets and baselines of a results folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgbench.core.errors import UsageError
from rgbench.judge.models import Model, ResultSet, load_result_sets, result_set
from tests.results_maker import REWARD, make_result, seeds_and_students

ROOT = Path(__file__).parents[2]


def load(root: Path) -> ResultSet:
    (found,) = load_result_sets(root)
    return found


def only(found: ResultSet, name: str) -> Model:
    (model,) = found.find(name)
    return model


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> ResultSet:
    return load(seeds_and_students(tmp_path_factory.mktemp("students")))


def test_seeds_of_one_method_are_one_model(students):
    assert [(m.method, m.name, list(m.results)) for m in students.models] == [
        ("teacher", "teacher", [None]),
        ("lcd", "lcd", list(range(7))),
        ("rg_lcd", "rg_lcd", list(range(6))),
        ("lrm", "lrm", list(range(6))),
    ]
    assert students.models[1].label == "lcd, 7 seeds" and students.teacher.label == "teacher"


def test_several_seeds_have_a_mean_with_a_t_interval(students):
    column, lcd = students.column("kd_efflite0"), only(students, "lcd")
    value = lcd.value(column)
    assert value.value == pytest.approx(sum(r.by_key[column.key].value for r in lcd.results.values()) / 7)
    assert value.interval.method == "t over 7 training seeds" and value.extra == {"seeds": 7}
    assert students.teacher.value(column).interval.method == "made up"


def test_a_recipe_says_what_seeds_of_one_method_are():
    made = [
        make_result(None, name, "lcd", seed, values={"hps": 1.0}, recipe_sha256=recipe)
        for name, seed, recipe in (("a", 0, "x"), ("b", 1, "x"), ("b-s2", 2, "y"), ("c-s4", 4, "y"), ("d-s3", 3, None))
    ]
    found = result_set(made)
    assert sorted((m.recipe_sha256, m.names) for m in found.models if m.recipe_sha256) == [
        ("x", ("a", "b")),
        ("y", ("b-s2",)),
        ("y", ("c-s4",)),
    ], "other names keep runs of one recipe apart: seeds that chose a setting, and seeds that test it"
    assert ("d-s3",) in [m.names for m in found.models], "an unknown recipe is never averaged with a known one"


def test_a_seed_run_twice_is_two_models():
    twice = [
        make_result(None, "rg_lcd-s0", values={"hps": 1.0}, weights="first"),
        make_result(None, "rg_lcd-s0", values={"hps": 2.0}, weights="second"),
    ]
    names = [model.label for model in result_set(twice).models]
    assert len(set(names)) == 2 and all(name.startswith("rg_lcd-s0 (lcm4-") for name in names)
    other = [make_result(None, "rg_lcd_1thread-s0", "rg_lcd", 0, values={"hps": 1.0}, recipe_sha256="x")]
    other += [make_result(None, f"rg_lcd-s{s}", values={"hps": 1.0}, recipe_sha256="x") for s in range(3)]
    assert sorted(model.label for model in result_set(other).models) == ["rg_lcd, 3 seeds", "rg_lcd_1thread-s0"]


def test_other_steps_sampler_or_method_are_other_models(tmp_path):
    make_result(tmp_path, "lcd-s0", values={"hps": 1.0})
    make_result(tmp_path, "lcd-s1", values={"hps": 1.0}, steps=50, step=50)
    make_result(tmp_path, "lcd-s2", values={"hps": 1.0}, sampling={"steps": 2})
    make_result(tmp_path, "lcd-s3", "lrm", 3, values={"hps": 1.0})
    assert len(load(tmp_path).models) == 4


def test_how_a_library_wrote_the_configurations_parts_no_seeds_of_a_known_recipe():
    for recipe, num in (("x", 1), (None, 2)):
        made = [
            make_result(
                None, f"lcd-s{s}", values={"hps": 1.0}, recipe_sha256=recipe, sampling={"config_sha256": f"by {s}"}
            )
            for s in range(2)
        ]
        assert len(result_set(made).models) == num


def test_checkpoints_belong_to_no_model(tmp_path):
    make_result(tmp_path, "lrm-s0", values={"hps": 1.0}, step=50)
    make_result(tmp_path, "lrm-s0", values={"hps": 2.0})
    found = load(tmp_path)
    assert len(found.models) == len(found.checkpoints) == 1
    assert found.models[0].value(found.column("hps")).value == 2.0


def test_the_end_of_a_curve_is_no_column_of_models(tmp_path):
    """Checkpoints and the end of their run on fewer prompts, beside what was measured of the model."""
    few = {"prompts": {"num": 4}}
    for step in (50, 100):
        make_result(tmp_path, "lcd-s0", values={"hps": 1.0}, step=step, protocol=few)
    (alone,) = load(tmp_path).columns
    assert load(tmp_path).num_models(alone) == 1, "nothing else was measured of it"
    make_result(tmp_path, "lcd-s0", values={"hps": 3.0})
    make_result(tmp_path, "lcd-s1", values={"hps": 3.0})
    found = load(tmp_path)
    shown = {column.protocol.fields["prompts"]["num"]: found.num_models(column) for column in found.columns}
    assert shown == {4: 0, 8: 1}
    assert [column.label for column in found.columns if found.num_models(column)] == ["HPS"]


def test_the_baseline_has_the_same_sampler_and_budget(tmp_path, students):
    assert students.baseline(only(students, "lrm")) is only(students, "lcd")
    assert students.baseline(only(students, "lcd")) is None
    make_result(tmp_path, "lrm-s0", values={"hps": 1.0})
    make_result(tmp_path, "lcd-s0", values={"hps": 1.0}, steps=50, step=50)
    make_result(tmp_path, "other-s0", "lcd", 0, values={"hps": 1.0}, sampling={"steps": 2})
    found = load(tmp_path)
    lrm = only(found, "lrm")
    assert found.baseline(lrm) is None
    reason = found.why_no_baseline(lrm)
    assert "lcd: trained for 50 steps, not 100" in reason and "other: sampled with LCM, 2 steps" in reason
    make_result(tmp_path, "other-s0", "lcd", 0, values={"hps": 1.0})
    found = load(tmp_path)
    assert found.baseline(only(found, "lrm")).name == "other"


def test_a_baseline_by_name_may_be_one_run_or_the_teacher(students):
    lrm = only(students, "lrm")
    assert list(students.baseline(lrm, "lcd-s3").results) == [3]
    assert students.baseline(lrm, "teacher") is students.teacher
    assert students.baseline(lrm, "lcf") is None and "did you mean 'lcd'" in students.why_no_baseline(lrm, "lcf")


def test_the_trained_reward_is_the_one_with_the_same_fingerprint(students):
    lrm = only(students, "lrm")
    assert students.trained_column(lrm).metric == "hps" == students.trained_reward().metric
    assert students.trained_column(only(students, "lcd")) is None
    exact = make_result(None, "lrm-s0", values={"hps": 1.0, "hps_no_antialias": 1.0})
    found = result_set([exact])
    assert found.trained_column(found.models[0]).metric == "hps_no_antialias", REWARD
    assert {c.metric for c in found.same_reward(found.column("hps"))} == {"hps", "hps_no_antialias"}


def test_models_trained_elsewhere_have_the_seed_of_their_name():
    made = [make_result(None, f"mine-s{i}", "external", values={"hps": 1.0}) for i in (3, 5)]
    (model,) = result_set(made).models
    assert list(model.results) == [3, 5] and model.name == "mine"


def test_no_results_and_unknown_names_are_errors(tmp_path, students):
    with pytest.raises(UsageError, match="rgbench eval"):
        load_result_sets(tmp_path / "none")
    with pytest.raises(UsageError, match="did you mean 'lrm"):
        students.find("lmr")


@pytest.mark.parametrize(
    ("metric", "reference", "value", "oriented"),
    [
        ("hps", None, 2.0, 2.0),
        ("fd_efflite0", None, 2.0, -2.0),
        ("band_db", {"kind": "real"}, -2.0, -2.0),
        ("band_db", {"kind": "real"}, 2.0, -2.0),
        ("band_db", None, 2.0, None),
        ("band_db", {"kind": "photos", "lossy": True}, 2.0, None),
        ("fd_efflite0", {"kind": "photos", "lossy": True}, 2.0, -2.0),
    ],
)
def test_orientation(metric, reference, value, oriented):
    (column,) = result_set([make_result(None, "lcd-s0", values={metric: value}, reference=reference)]).columns
    assert column.oriented(value) == oriented
    assert column.label.endswith(" gap") == (column.reference is not None)


def test_the_trained_reward_is_that_of_most_seeds_then_of_most_images(tmp_path):
    """One seed's checkpoints, and the end of its run, were measured on fewer prompts."""
    few = {"prompts": {"num": 4}}
    for step in (50, 100):
        make_result(tmp_path, "lrm-s0", values={"hps": 1.0}, step=step, protocol=few)
    for seed in (0, 1):
        make_result(tmp_path, f"lrm-s{seed}", values={"hps": 3.0})
    found = load(tmp_path)
    column = found.trained_column(only(found, "lrm"))
    assert column.protocol.fields["prompts"]["num"] == 8 and len(only(found, "lrm").seeds(column)) == 2
    make_result(tmp_path, "lrm-s1", values={"hps": 1.0}, protocol=few)
    found = load(tmp_path)
    assert found.trained_column(only(found, "lrm")).protocol.fields["prompts"]["num"] == 8


def test_the_committed_results_are_read():
    found = load(ROOT / "results")
    lrm = only(found, "lrm")
    assert len(lrm.results) == 6 and found.baseline(lrm).results.keys() >= lrm.results.keys()
    assert found.trained_column(lrm).metric.startswith("hps")
    assert found.teacher.sampling["steps"] == 50 and sum(bool(lrm.seeds(c)) for c in found.columns) == 38
