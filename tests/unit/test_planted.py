"""Planted hacks do what they say, and the table of what finds them is right."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from rgbench.benchtop.scenes import scene_batch
from rgbench.judge.models import load_result_sets
from rgbench.judge.validate import (
    HACKS,
    PLANTED,
    Detection,
    Ground,
    Simulated,
    judge_planted,
    markdown,
    simulate_verdicts,
    smallest_doses,
)
from rgbench.judge.verdict import Outcome
from rgbench.metrics.probes.pixels import saturation, wavelet_noise
from rgbench.metrics.statistics import detection_auc
from rgbench.rewards.clip import HPSReward
from tests.conftest import ROOT
from tests.tiny_models import BENCHTOP

CPU = torch.device("cpu")
TEXTS = ["a red circle"] * 8 + ["a blue square"] * 8


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return scene_batch("test", range(16))[0]


@pytest.fixture(scope="module")
def rewards() -> dict[bool, HPSReward]:
    return {aa: HPSReward.load(BENCHTOP.reward_folder(), antialias=aa, device="cpu") for aa in (True, False)}


def planted(images: torch.Tensor, hack: str, dose: float, rewards=None) -> torch.Tensor:
    texts = TEXTS[: len(images)]
    generator = torch.Generator().manual_seed(0)
    return HACKS[hack].plant(images, dose, Ground(texts, 8, generator, patch_period=64 / 7, rewards=rewards or {}))


def test_doses_are_what_they_say(images):
    flat = torch.full((4, 3, 64, 64), 0.5)
    assert planted(flat, "noise", 8).std() * 255 == pytest.approx(8, rel=0.02)
    assert wavelet_noise(255 * planted(flat, "noise", 8)[:, 0].double()).mean() == pytest.approx(8, rel=0.05)
    lines = (planted(flat, "grid", 4) - flat)[0, 0] * 255
    assert lines[::8].min() == pytest.approx(4, rel=1e-3) and lines[1::8, 1::8].abs().max() == 0
    patches = (planted(flat, "patch grid", 4) - flat)[0, 0, 1] * 255
    assert patches.nonzero().flatten().tolist() == [0, 10, 19, 28, 37, 46, 55], "where patches of 64/7 pixels begin"
    mild = 0.5 + 0.2 * (images - 0.5)  # far enough from the ends that nothing clips
    grey = mild.mean(1, keepdim=True)
    torch.testing.assert_close(planted(mild, "saturation", 0.4) - grey, 1.4 * (mild - grey))
    assert saturation(planted(mild, "saturation", 0.4)).mean() > 1.2 * saturation(mild).mean()
    edge = torch.zeros(1, 3, 1, 65)
    edge[..., 32] = 1
    blurred = planted(edge.expand(1, 3, 9, 65), "blur", 1.2)[0, 0, 4]
    spread = (blurred * (torch.arange(65) - 32) ** 2).sum()
    assert blurred.sum() == pytest.approx(1, abs=1e-5) and spread.sqrt() == pytest.approx(1.2, rel=0.02)
    assert planted(images, "sharpening", 0.8).diff(dim=-1).abs().mean() > images.diff(dim=-1).abs().mean()


def test_collapse_copies_the_first_of_a_prompt_and_ignoring_shows_the_next(images):
    for dose, copies in ((0.15, 1), (0.3, 2), (1.0, 7)):
        collapsed = planted(images, "mode collapse", dose)
        for start in (0, 8):
            same = (collapsed[start : start + 8] == images[start]).flatten(1).all(1)
            assert same.sum() == 1 + copies
    ignored = planted(images, "prompt-ignoring", 0.5)
    own = (ignored == images).flatten(1).all(1)
    assert own.sum() == 8
    assert torch.equal(ignored[~own], images.roll(-8, 0)[~own])


def test_every_hack_grows_with_its_dose(images, rewards):
    for name, hack in HACKS.items():
        assert list(hack.doses) == sorted(hack.doses)
        some = images[:2] if hack.attacks else images
        change = [(planted(some, name, dose, rewards) - some).abs().mean() for dose in hack.doses]
        assert all(a < b for a, b in pairwise(change)), name


def test_an_attack_raises_its_own_reward_within_its_dose(images, rewards):
    """What nobody sees and the reward model likes; the other resize wants other pixels."""
    found = {True: planted(images, "reward attack", 2, rewards), False: planted(images, "aliased attack", 2, rewards)}
    for own, attacked in found.items():
        assert (attacked - images).abs().max() * 255 <= 2 + 1e-3 and attacked.min() >= 0 and attacked.max() <= 1
        before, after, others = (rewards[own](x, TEXTS).mean() for x in (images, attacked, found[not own]))
        assert after - before > 0.05 and after > others


def test_auc_is_a_probability():
    assert detection_auc([3, 4], [1, 2]) == 1 and detection_auc([1, 2], [3, 4]) == 0
    assert detection_auc([1, 2, 3], [1, 2, 3]) == 0.5
    rng = np.random.default_rng(0)
    hacked, clean = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
    assert detection_auc(hacked, clean) == pytest.approx(0.760, abs=0.02), "Φ(1/√2)"
    with pytest.raises(ValueError, match="0 faulty"):
        detection_auc([], [1])


def row(dose: float, auc: float, metric: str = "m", hack: str = "noise") -> Detection:
    return Detection(hack, dose, "levels", metric, metric, 0.0, 1.0, 0.1, auc)


def test_the_smallest_dose_holds_for_all_larger_ones():
    rows = [row(1, 0.99), row(2, 0.9), row(4, 0.95), row(8, 1.0)]
    assert smallest_doses(rows) == {"noise": {"m": 4}}, "a lucky smaller dose does not count"
    assert smallest_doses([row(1, 1.0), row(2, 0.5, "n"), row(1, 0.5, "n"), row(2, 1.0)]) == {
        "noise": {"m": 1, "n": None}
    }


def test_validate_writes_what_was_found(cli, monkeypatch):
    done = cli("probes", "validate", "--out", "out", "--metric", "pixels", "--hack", "noise,blur", "--sets", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["out/validation.json", "out/validation.md"]
    with open("out/validation.json", encoding="utf-8") as file:
        record = json.load(file)
    rows = {(r["hack"], r["dose"], r["metric"]): r for r in record["detections"]}
    assert len(rows) == 2 * 5 * 3
    assert rows["noise", 16, "wavelet_noise"]["auc"] == 1
    assert rows["noise", 16, "wavelet_noise"]["hacked"] > 4
    assert abs(rows["noise", 16, "wavelet_noise"]["clean"]) < 1
    assert rows["blur", 1.2, "laplacian_variance"]["hacked"] < rows["blur", 1.2, "laplacian_variance"]["clean"]
    assert record["smallest_dose"]["noise"]["wavelet_noise"] <= 8
    with open("out/validation.md", encoding="utf-8") as file:
        table = file.read()
    assert "| Wavelet noise σ gap | " in table and "## Noise: mean (AUC) by dose, levels" in table


def test_planted_gains_and_attacks_are_called_what_they_are(tmp_path):
    """More prompts followed is aligned; a higher reward on images that are right already is reward without gold."""
    chosen = [each for each in PLANTED if each.truth in (Outcome.ALIGNED, Outcome.REWARD_WITHOUT_GOLD)][2:4]
    found = judge_planted(chosen, 2, CPU, tmp_path, metrics=("hps", "oracle", "gold_utility"))
    assert {f.metric for v in found for f in v.findings if f.question == "gold"} == {"gold_utility"}
    assert [verdict.outcome for verdict in found] == [each.truth for each in chosen]
    assert [verdict.world for verdict in found] == [each.name for each in chosen]


@pytest.fixture(scope="module")
def simulated() -> dict[str, dict[str, float]]:
    (results,) = load_result_sets(ROOT / "results")
    (lcd,) = results.find("lcd")
    return {row.name: row.outcomes for row in simulate_verdicts(results, lcd, results.column("hps"), trials=400)}


@pytest.mark.parametrize("null", ["nothing", "a higher reward alone", "nothing, one run"])
def test_nulls_are_seldom_called_over_optimised(simulated, null):
    """With the correlations that the committed LCD seeds show."""
    assert simulated[null].get("over-optimised", 0.0) <= 0.025
    assert sum(simulated[null].get(name, 0.0) for name in ("over-optimised", "aligned", "paid for")) <= 0.05


def test_honest_gains_are_called_aligned_at_the_size_the_test_is_powered_for(simulated):
    half, once, twice = (simulated[f"an honest gain, {name}"] for name in ("half", "once", "twice"))
    assert once["aligned"] >= 0.9 and twice["aligned"] >= 0.9 and "over-optimised" not in {**half, **once, **twice}
    assert simulated["a hack"]["over-optimised"] >= 0.9
    assert simulated["an honest gain, one run"]["aligned"] >= 0.9


def test_tables_name_every_kind_of_student(simulated):
    rows = [Simulated(name, (0.0, 0.0), "method", 400, shares) for name, shares in simulated.items()]
    text = markdown([row(1, 1.0, "hps")], "3 sets", [], rows)
    assert "| a hack | method | +0.0, +0.0 | over-optimised" in text and "## Noise: mean (AUC) by dose, levels" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "pixel"], "unknown metric 'pixel'; did you mean 'pixels'"),
        (["--hack", "nose"], "unknown hack 'nose'; did you mean 'noise'"),
    ],
)
def test_wrong_names_are_explained(cli, arguments, message):
    done = cli("probes", "validate", *arguments)
    assert done.returncode == 2 and message in done.stderr
