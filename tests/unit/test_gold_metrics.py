"""Gold's metrics: utility and win rate worked out by hand, the teacher read or made once, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rgbench.benchtop.gold import DegradationRegressor, Gold
from rgbench.benchtop.oracle import CLASSIFIERS, load_oracle, score_reading
from rgbench.benchtop.preferences import PreferenceConfig, choose, preference
from rgbench.benchtop.scenes import Scenes, scene_batch
from rgbench.core.errors import UsageError
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate import evaluate as engine
from rgbench.metrics.context import Opponent
from rgbench.metrics.gold import GoldUtility
from rgbench.metrics.gold_win_rate import GoldWinRate
from rgbench.metrics.reference import from_uint8, to_uint8
from tests.tiny_models import make_context, run_eval, save_run
from tools.benchtop.clip import share_right

NUM = 6
ANNOTATORS = PreferenceConfig()


@pytest.fixture(scope="module")
def regressors(tmp_path_factory):
    """Three untrained regressors."""
    folder = tmp_path_factory.mktemp("regressors")
    torch.manual_seed(0)
    for name in CLASSIFIERS:
        (folder / name).mkdir()
        save_file(DegradationRegressor(name).state_dict(), folder / name / "model.safetensors")
    return folder


@pytest.fixture
def context(tmp_path, regressors):
    return make_context(benchtop_prompts(NUM), tmp_path, regressors_folder=regressors)


class Teacher:
    """Makes the images it is given, and counts them."""

    def __init__(self, images, stored=None, steps=50):
        self.steps = steps
        self.images, self.stored, self.asked, self.made = images, stored, [], 0

    def opponent(self):
        return Opponent("ddim50-0", {"steps": self.steps}, self.make, self.rows)

    def make(self, positions):
        self.made += len(positions)
        return to_uint8(self.images[positions])

    def rows(self, metric, protocol):
        self.asked.append((metric, protocol))
        return self.stored


def see(metric, images, positions=range(NUM)):
    at = np.array(list(positions))
    metric.update(images[at], [metric.context.prompts.prompts[i] for i in at], at)
    return metric


def test_preference_is_the_probability_of_a_choice():
    sharp = PreferenceConfig(sharpness=2.0, flip_rate=0.1)
    found = preference(torch.tensor([0.0, 1.0, -1.0, 50.0]), sharp)
    sigmoid = 1 / (1 + math.exp(-2))
    assert found.tolist() == pytest.approx([0.5, 0.1 + 0.8 * sigmoid, 0.9 - 0.8 * sigmoid, 0.9])
    drawn = choose(torch.full((200_000,), 0.1), ANNOTATORS, torch.Generator().manual_seed(0)).double().mean()
    assert float(preference(torch.tensor(0.1), ANNOTATORS)) == pytest.approx(float(drawn), abs=0.005)


def test_share_counts_slots_as_annotators_do():
    """Two objects: six slots and the layout; the mean over four attributes weighs the layout more."""
    _, wanted = scene_batch("test", range(8))
    shown = Scenes(wanted.layout, wanted.shape, (wanted.colour + 1) % 8, wanted.size)
    slots = [x[:, s] for s in (0, 1) for x in (shown.shape, shown.colour, shown.size)]
    reading = torch.stack([shown.layout, *slots], 1)
    found = score_reading(reading, wanted)
    hand = torch.where(wanted.count == 2, 5 / 7, 3 / 4)
    assert torch.allclose(found["share"], hand)
    shown.colour[wanted.shape < 0] = -1
    assert torch.allclose(found["share"], share_right(shown, wanted))
    assert torch.allclose(found["mean"], torch.tensor(0.75))


def test_utility_is_share_less_weighted_degradation(context):
    images, _ = scene_batch("all", range(NUM))
    metric = see(see(GoldUtility(context), images, [5, 3]), images, [0, 1, 2, 4])
    gold, degradation = metric.compute()
    scenes = [prompt.scene for prompt in context.prompts.prompts]
    share = load_oracle(context.classifiers_folder).score(images, scenes)["share"]
    strength = Gold(context.regressors_folder).read(images).sort(0).values[1]
    np.testing.assert_allclose(degradation.rows, strength, atol=1e-6)
    np.testing.assert_allclose(gold.rows, share - 0.8 * strength, atol=1e-6)
    assert gold.value == pytest.approx(gold.rows.mean())
    assert gold.interval.low <= gold.value <= gold.interval.high
    assert gold.extra["groups"]["heldout"] == pytest.approx(gold.rows[3])
    assert gold.protocol.fields["degradation_weight"] == 0.8
    assert len(gold.protocol.fields["regressors_sha256"]) == 64


def test_win_rate_is_the_mean_probability(context):
    images, _ = scene_batch("all", range(NUM))
    others = images.roll(1, 0)
    teacher = Teacher(others)
    found = see(GoldWinRate(replace(context, opponent=teacher.opponent)), images).compute()[0]
    own, other = (see(GoldUtility(context), from_uint8(to_uint8(x))).compute()[0].rows for x in (images, others))
    expected = [5 + 90 / (1 + math.exp(-12 * (a - b))) for a, b in zip(own, other, strict=True)]
    np.testing.assert_allclose(found.rows, expected, atol=0.2)  # images here are not rounded to 8 bits
    assert found.value == pytest.approx(np.mean(found.rows))
    assert found.protocol.fields["teacher"] == {"steps": 50}
    assert found.protocol.fields["flip_rate"] == 0.05
    equal = see(
        GoldWinRate(replace(context, opponent=Teacher(images, steps=49).opponent)), from_uint8(to_uint8(images))
    )
    assert equal.compute()[0].rows == pytest.approx(np.full(NUM, 50.0))


def test_the_teachers_images_are_made_once(context):
    images, _ = scene_batch("all", range(NUM))
    teacher = Teacher(images)
    first = GoldWinRate(replace(context, opponent=teacher.opponent))
    see(see(first, images, [0, 1]), images, [2, 3, 4, 5])
    again = see(GoldWinRate(replace(context, opponent=teacher.opponent)), images)
    assert teacher.made == NUM, "then from the cache"
    found, expected = again.compute()[0].rows, first.compute()[0].rows
    np.testing.assert_allclose(found, expected, atol=1e-3)  # batches of other sizes are rounded otherwise


def test_stored_utilities_of_the_teacher_are_used(context):
    images, _ = scene_batch("all", range(NUM))
    own = see(GoldUtility(context), images)
    teacher = Teacher(images, stored=own.compute()[0].rows - 0.1)
    found = see(GoldWinRate(replace(context, opponent=teacher.opponent)), images).compute()[0]
    assert found.rows == pytest.approx(np.full(NUM, 5 + 90 / (1 + math.exp(-1.2))))
    assert teacher.asked == [("gold_utility", own.planned[0][1].id)] and not teacher.made


def test_clear_refusals(context, tmp_path):
    bare = replace(context, regressors_folder=tmp_path / "none")
    for kind in (GoldUtility, GoldWinRate):
        with pytest.raises(UsageError, match=r"none/resnet: .*python -m tools\.benchtop build"):
            kind(bare)
        with pytest.raises(UsageError, match="512 px"):
            kind(replace(context, resolution=512))
    with pytest.raises(UsageError, match="no teacher"):
        GoldWinRate(context)
    with pytest.raises(UsageError, match="teacher's own images"):
        GoldWinRate(replace(context, opponent=Teacher(None).opponent, generation="ddim50-0"))


def test_an_evaluation_makes_the_teachers_images_or_reads_their_utilities(tmp_path, monkeypatch, regressors):
    """The same number to the bit, and no second time where the teacher was evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "REGRESSORS_FOLDER", regressors)
    save_run(tmp_path / "runs" / "rg_lcd-s0")
    shared = {"num": 3, "batch_size": 4}
    (made,) = run_eval(["rg_lcd-s0"], ["gold_win_rate"], results=tmp_path / "one", **shared)
    run_eval(["teacher"], ["gold_utility"], results=tmp_path / "two", **shared)
    monkeypatch.setattr(GoldWinRate, "_kept", lambda *_: pytest.fail("made again"))
    (read,) = run_eval(["rg_lcd-s0"], ["gold_win_rate"], results=tmp_path / "two", **shared)
    assert made.values[0].key == read.values[0].key
    assert (made.values[0].value, made.values[0].rows_sha256) == (read.values[0].value, read.values[0].rows_sha256)
    assert made.values[0].protocol.fields["teacher"]["steps"] == 50
    with pytest.raises(UsageError, match="teacher's own images"):
        run_eval(["teacher"], ["gold_win_rate"], results=tmp_path / "two", **shared)
