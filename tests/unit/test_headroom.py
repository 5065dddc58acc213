"""Headroom: picks, agreement within a prompt and words, worked out by hand; the verdict reads it from its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from rgbench.cli.main import app
from rgbench.core.errors import UsageError
from rgbench.evaluate.config import EvalConfig
from rgbench.judge.headroom import (
    FILE,
    RANDOM,
    Group,
    Headroom,
    explain,
    link,
    pick_weights,
    picks,
    read_headroom,
    within_auc,
    within_correlation,
)
from rgbench.judge.measure_headroom import HeadroomOptions, measure_headroom
from rgbench.rewards.latent_proxy import LatentCLIP
from tests.tiny_models import BENCHTOP, run_eval, save_run

REWARD = np.array([[1.0, 2.0, 3.0, 6.0], [4.0, 4.0, 0.0, 0.0]])
GOLD = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])


def headroom(reward=REWARD, gold=GOLD, real_gain=None, **fields) -> Headroom:
    scores = {"hps": reward, "gold_utility": gold}
    found = picks(scores, ["hps", "gold_utility"])
    group = Group(name="", num_prompts=len(reward), picks=found, links=(link("hps", reward, gold),))
    given = {"world": "benchtop", "model": "lcd-s0", "generation": "lcm4-0", "prompts": "0", "num_prompts": len(reward)}
    given |= {"samples": reward.shape[1], "reward": "hps", "reward_fields": None, "gold": "gold_utility"}
    return Headroom(**given, groups=(group,), real_gain=real_gain, **fields)


def test_equal_images_share_a_pick():
    assert pick_weights(REWARD).tolist() == [[0, 0, 0, 1], [0.5, 0.5, 0, 0]]


def test_what_each_picker_reaches():
    random, ours, best = picks({"hps": REWARD, "gold_utility": GOLD}, ["hps", "gold_utility"])
    assert [each.by for each in (random, ours, best)] == [RANDOM, "hps", "gold_utility"]
    assert random.reaches["hps"].value == (3 + 2) / 2 and random.reaches["gold_utility"].value == 0.5
    assert ours.reaches["hps"].value == (6 + 4) / 2 and ours.reaches["gold_utility"].value == (1 + 0.5) / 2
    assert ours.gains["gold_utility"].value == 0.25 and ours.gains["hps"].value == 2.5
    assert best.reaches["gold_utility"].value == 1 and best.reaches["hps"].value == ((2 + 6) / 2 + (4 + 0) / 2) / 2
    assert random.gains["hps"].value == random.gains["hps"].low == random.gains["hps"].high == 0
    assert ours.gains["hps"].low == 2 and ours.gains["hps"].high == 3, "two prompts: every resample is one of three"


def test_agreement_within_a_prompt():
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(REWARD, GOLD, strict=True)]
    assert within_correlation(REWARD, GOLD) == pytest.approx(expected)
    # prompt 1: right 2, 6 against wrong 1, 3: 3 of 4 pairs; prompt 2: 4, 0 against 4, 0: a tie, a win, a loss, a tie
    assert within_auc(REWARD, GOLD).tolist() == [0.75, 0.5]
    assert within_auc(REWARD, REWARD)[0] == 1 and within_auc(-REWARD, REWARD).tolist() == [0, 0]


def test_prompts_without_spread_do_not_count():
    gold = np.vstack([GOLD, np.ones((1, 4))])
    reward = np.vstack([REWARD, np.arange(4.0)])
    found = link("hps", reward, gold)
    assert found.num_prompts == 2 and found.correlation == link("hps", REWARD, GOLD).correlation
    flat = headroom(reward=np.full((2, 4), 0.1) + 1e-17)
    assert flat.groups[0].links[0] == link("hps", np.full((2, 4), 0.1), GOLD)
    assert flat.groups[0].links[0].correlation is None and flat.groups[0].links[0].auc is None
    assert "do not both differ" in explain(flat) and "NaN" not in flat.model_dump_json()


def test_words_name_both_gains():
    words = explain(headroom(real_gain=2.0))
    assert "raises HPS of lcd-s0 by at most 2.50" in words and "Gold utility by about +0.250" in words
    assert "would reach +0.500" in words and "best of 4" in words
    assert "at most 4.00" in explain(headroom(real_gain=4.0)), "real images score higher than the best of four"
    against = np.array([[3.0, 1.0, 3.5, 1.0]] * 2)
    assert "likely to be hacked" in explain(headroom(reward=against)) and "hacked" not in explain(headroom(reward=GOLD))


WHOSE = ("benchtop", "lcd-s0", "lcm4-0")


def test_the_file_is_checked(tmp_path):
    assert read_headroom(tmp_path, WHOSE) is None
    whole = headroom().model_dump(mode="json")
    (tmp_path / FILE).write_text(json.dumps(whole))
    assert read_headroom(tmp_path, WHOSE) == headroom()
    for other in (("coco", *WHOSE[1:]), ("benchtop", "lcd-s1", "lcm4-0"), (*WHOSE[:2], "lcm8-0")):
        with pytest.raises(UsageError, match=r"headroom.json: of benchtop/lcd-s0/lcm4-0, not of .*; remove it"):
            read_headroom(tmp_path, other)
    (group,) = whole["groups"]
    random, ours, best = group["picks"]
    for spoilt in (
        {"schema_version": 9},
        whole | {"groups": []},
        whole | {"groups": [group | {"picks": [ours, best]}]},
        whole | {"groups": [group | {"picks": [random, ours]}]},
        whole | {"groups": [group | {"picks": [random, ours | {"gains": {}}, best]}]},
        whole | {"reward": "pickscore"},
    ):
        (tmp_path / FILE).write_text(json.dumps(spoilt))
        with pytest.raises(UsageError, match="run rgbench headroom"):
            read_headroom(tmp_path, WHOSE)


# The measurement


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with one random student."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "rg_lcd-s0")
    return tmp_path


def test_the_command_measures_and_stores(place):
    """Its values are those of an evaluation of the same images."""
    words = ["headroom", "rg_lcd-s0", "--num", "5", "--samples", "2", "--ranges", "2", "--device", "cpu", "--json"]
    proxy = LatentCLIP.load(BENCHTOP.latent_proxy_folder(), "cpu")
    proxy.config["latent_scale"] = 0.18215  # of the random student's decoder
    proxy.save(place / "proxy")
    words += ["--proxy", "proxy"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    (found,) = [Headroom.model_validate(each) for each in json.loads(shown.stdout)]
    (file,) = place.glob(f"results/benchtop/rg_lcd-s0/*/{FILE}")
    whose = (found.world, found.model, found.generation)
    assert read_headroom(file.parent, whose) == found and found.gold == "gold_utility"
    (result,) = run_eval(["rg_lcd-s0"], ["hps", "oracle"], num=5, seeds="0-1", batch_size=10)
    for metric in ("hps", "oracle_all", "oracle_mean"):
        (value,) = [value for value in result.values if value.metric == metric]
        assert found.pick(RANDOM).reaches[metric].value == pytest.approx(value.value, abs=1e-3)
    hps = result.rows(*next(value.key for value in result.values if value.metric == "hps")).values.reshape(2, 5)
    assert found.pick("hps").reaches["hps"].value == pytest.approx(hps.max(0).mean(), abs=1e-3)
    assert [pick.by for pick in found.groups[0].picks] == [RANDOM, "hps", "latent_proxy", "gold_utility"]
    names = {group.name for group in found.groups}
    assert {"", "test", "heldout"} <= names and all(pick.set_distance for pick in found.groups[0].picks)
    assert [(at.low, at.high, at.timestep) for at in found.ranges] == [(0, 500, 250), (500, 1000, 750)]
    assert [each.by for each in found.ranges[0].links] == ["hps", "latent_proxy"]
    assert found.real_gain is not None and found.words and "NaN" not in shown.stdout


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--samples", "1"], "at least 2"),
        (["--reward", "no_such"], "unknown metric"),
        (["--prompts", "mine.txt"], "nothing stands for gold"),
    ],
)
def test_wrong_usage_ends_with_2(place, words, fault):
    (place / "mine.txt").write_text("a cat\na dog\n")
    few = ["headroom", "rg_lcd-s0", "--num", "2", "--samples", "2", "--device", "cpu"]
    found = CliRunner().invoke(app, [*few, *words])
    assert found.exit_code == 2 and fault in found.output and "Traceback" not in found.output


def test_a_proxy_of_other_latents_is_refused(place):
    given = HeadroomOptions(2, proxy=BENCHTOP.latent_proxy_folder())
    with pytest.raises(UsageError, match="scaling factor"):
        measure_headroom(EvalConfig(targets=("rg_lcd-s0",), num=2, device="cpu"), given)
