"""The comparison in words: they follow the intervals, and call over-optimisation only what is."""

import json
import re
from pathlib import Path

import pytest

from rgbench.evaluate.results import load_results
from rgbench.judge.models import Comparison, gather
from rgbench.report.words import readings
from tests.history.plausible import write_model

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Seven training seeds of two methods."""
    root = tmp_path_factory.mktemp("seeds")
    for method in ("lcd", "rg_lcd"):
        for seed in range(7):
            write_model(root, method, seed, metrics=("hps_aa1", "oracle_all"), num=8)
    return gather(root)[0]


def test_words_follow_the_intervals(seeds):
    direct, latent = readings(gather(HISTORY)[0])
    assert (direct.tone, direct.label) == ("worse", "reads like over-optimisation")
    assert "the pattern of over-optimisation" in direct.weighing
    assert any(fact.startswith("HPS aa1 (trained on, †): rose from 26.80 to 29.40") for fact in direct.facts)
    assert "not yet the two methods" in direct.weighing
    assert latent.tone == "better" and not any("Oracle" in fact for fact in latent.facts)
    assert "7 training seeds each" in readings(seeds)[0].weighing


@pytest.mark.parametrize(
    ("reward", "oracle", "distance", "label", "verb"),
    [
        (-3.0, -9.0, 20.0, "no gain in reward, worse images", "fell, and the oracle and the set distance got worse"),
        (0.0, 0.0, 0.0, "no clear effect", "did not clearly rise, and nothing independent moved"),
        (0.0, -9.0, -20.0, "no gain in reward, mixed evidence", "the set distance got better and the oracle got worse"),
        (-3.0, 9.0, 0.0, "no gain in reward, better images", "fell, and the oracle got better"),
        (3.0, -9.0, 20.0, "reads like over-optimisation", "rose while the oracle and the set distance got worse"),
        (3.0, 9.0, 20.0, "mixed evidence", "rose; the oracle got better and the set distance got worse"),
        (3.0, -9.0, 0.0, "a warning, from one kind of evidence", "rose while the oracle got worse"),
    ],
)
def test_without_a_gain_in_reward_nothing_is_called_over_optimisation(tmp_path, reward, oracle, distance, label, verb):
    """LCD's figures, moved by the given amounts."""
    moves = {"hps_aa1": reward, "oracle_all": oracle, "fd_efflite0": distance}
    for method in ("lcd", "rg_lcd"):
        write_model(tmp_path, method, 0, metrics=tuple(moves), rows=False)
    files = {(r.method, r.metric.name): r for r in load_results(tmp_path)}
    for name, move in moves.items():
        value = files["lcd", name].value + move
        found = files["rg_lcd", name]
        edited = json.loads(found.path.read_text())
        edited |= {"value": value, "interval": edited["interval"] | {"low": value - 1, "high": value + 1}}
        found.path.write_text(json.dumps(edited))
    (reading,) = readings(gather(tmp_path)[0])
    assert reading.label == label and verb in reading.weighing
    assert ("over-optimisation" in reading.weighing + reading.label) == (label == "reads like over-optimisation")


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (1, 1, "One training seed each"),
        (1, 3, "1 against 3 training seeds: a single run on one side"),
        (3, 3, "3 training seeds each, fewer than the 6"),
        (2, 3, "2 against 3 training seeds, fewer than the 6"),
        (6, 7, "6 against 7 training seeds, paired by seed"),
    ],
)
def test_words_count_the_training_seeds_of_both_sides(tmp_path, own, others, said):
    for method, num in (("rg_lcd", own), ("lcd", others)):
        for seed in range(num):
            write_model(tmp_path, method, seed, metrics=("hps_aa1",), num=8)
    (reading,) = readings(gather(tmp_path)[0])
    assert said in reading.weighing


def test_a_reward_that_rose_says_on_how_many_images(seeds):
    fact = readings(seeds)[0].facts[0]
    assert re.search(r"^HPS aa1 \(trained on, †\): rose .*, higher on 100 % \[100, 100\] of the prompts\.$", fact), fact


def test_no_words_of_comparison_without_a_baseline(tmp_path):
    write_model(tmp_path, "lrm", 0, metrics=("hps_aa1",))
    (found,) = readings(gather(tmp_path)[0])
    assert found.tone == "none" and "no LCD student" in found.weighing
