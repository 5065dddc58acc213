"""Oracle metric: the oracle's own shares in per cent, with groups, intervals and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rgbench.benchtop.oracle import Oracle, heads_present, load_oracle, render_and_match
from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.data.samples import to_batch
from rgbench.evaluate.results import load_result
from rgbench.judge.models import load_result_sets
from rgbench.metrics import oracle as oracle_metric
from rgbench.metrics.oracle import OracleAccuracy
from rgbench.metrics.reference import from_uint8
from rgbench.metrics.statistics import wilson_interval
from rgbench.report.tables import all_tables
from tests.results_maker import make_result
from tests.tiny_models import make_context
from tests.unit.test_oracle import Fixed, truth

NUM = 12
ROOT = Path(__file__).parents[2]


@pytest.fixture
def context(tmp_path):
    return make_context(benchtop_prompts(NUM), tmp_path)


def test_values_are_the_oracles_in_prompt_order(context):
    images = scene_batch("all", range(NUM))[0]
    metric = OracleAccuracy(context)
    for at in (np.arange(NUM)[::-1][:7], np.arange(5)):
        metric.update(images[at.copy()], [context.prompts.prompts[i] for i in at], at)
    found = {m.metric: m for m in metric.compute()}
    assert list(found) == [f"oracle_{n}" for n in ("all", "mean", "shape", "colour", "size", "layout")]
    oracle = load_oracle(context.classifiers_folder)
    expected = oracle.score(images, [prompt.scene for prompt in context.prompts.prompts])
    for name, measured in found.items():
        rows = 100 * expected[name.removeprefix("oracle_")].double().numpy()
        np.testing.assert_allclose(measured.rows, rows, atol=1e-4)
        assert measured.value == pytest.approx(rows.mean(), abs=1e-4)
        assert measured.extra["groups"]["heldout"] == pytest.approx(rows[3::4].mean(), abs=1e-4)
        assert 0 <= measured.interval.low <= measured.value <= measured.interval.high <= 100
    agreement = 100 * expected["agreement"].mean().item()
    assert found["oracle_all"].extra["classifiers_agree"]["mean"] == pytest.approx(agreement, abs=1e-4)
    assert [name for name, measured in found.items() if "classifiers_agree" in measured.extra] == ["oracle_all"], "once"


def test_render_and_match_sees_what_fools_all_classifiers_alike(context):
    """Classifiers that read each image as its caption; half of the images show another."""
    scenes = context.reference.scenes[list(range(NUM))]
    metric = OracleAccuracy(context)
    metric.oracle = Oracle({name: Fixed(truth(scenes)) for name in "abc"})
    images = from_uint8(context.reference.images)
    images[::2] = images.roll(1, 0)[::2]
    metric.update(images, context.prompts.prompts, np.arange(NUM))
    found = metric.compute()[0]
    assert found.value == 100 and found.extra["classifiers_agree"]["mean"] == 100
    present = heads_present(scenes)
    by_hand = ((render_and_match(images, scenes.count) == truth(scenes)) & present).sum(1) / present.sum(1)
    assert by_hand[1::2].mean() > 0.99 and by_hand[::2].mean() < 0.6
    assert found.extra["render_and_match_agrees"] == pytest.approx(100 * by_hand.mean().item(), abs=1e-4)


@pytest.mark.parametrize("model", ["rg_lcd-s6", "lrm-s6"])
def test_render_and_match_reads_guided_students_and_is_reported(tmp_path, model):
    """The images that the committed students kept."""
    (folder,) = (ROOT / "results" / "benchtop" / model).iterdir()
    kept = {about.prompt_id: image for about, image in list(load_result(folder).images.items())[:NUM]}
    context = make_context(benchtop_prompts(NUM), tmp_path)
    images = to_batch([np.array(kept[prompt.id]) for prompt in context.prompts.prompts])
    metric = OracleAccuracy(context)
    metric.update(images, context.prompts.prompts, np.arange(NUM))
    found = metric.compute()[0]
    agreed = found.extra["render_and_match_agrees"]
    assert agreed > 90
    make_result(tmp_path / "results", model, rows={"oracle_all": found.rows}, extra={"oracle_all": found.extra})
    (results,) = load_result_sets(tmp_path / "results")
    shown = {table.key: table for table in all_tables(results, [])}
    ((_, (entry,)),) = shown["render-and-match-agrees"].rows
    assert entry.number == pytest.approx(agreed)


def test_only_the_first_images_are_matched(context, monkeypatch):
    monkeypatch.setattr(oracle_metric, "NUM_MATCHED", 2)
    images = from_uint8(context.reference.images)
    images[2:] = 0.5
    metric = OracleAccuracy(context)
    for at in (np.arange(NUM)[::-1][:7].copy(), np.arange(5)):
        metric.update(images[at], [context.prompts.prompts[i] for i in at], at)
    first = metric.oracle.score(images[:2], context.reference.scenes[[0, 1]], match=True)["match_agreement"]
    assert metric.compute()[0].extra["render_and_match_agrees"] == pytest.approx(100 * first.mean().item())
    assert first.mean() > 0.9


def test_all_right_is_a_proportion(context):
    images, _ = scene_batch("test", range(NUM))
    metric = OracleAccuracy(context)
    metric.update(images, context.prompts.prompts, np.arange(NUM))
    right = metric.compute()[0]
    wilson = wilson_interval(round(right.value * NUM / 100), NUM)
    assert right.interval.method == "Wilson"
    assert (right.interval.low, right.interval.high) == pytest.approx((100 * wilson.low, 100 * wilson.high))


def test_the_classifiers_are_part_of_the_protocol(context):
    fields = OracleAccuracy(context).planned[0][1].fields
    assert len(fields["classifiers_sha256"]) == 64
    assert fields["prompts"] == {"name": "benchtop", "sha256": context.prompts.sha256, "num": NUM}


def test_clear_refusals(tmp_path, context):
    mixed = PromptSet("mine", (context.prompts.prompts[0], Prompt("mine/7", "a cat")))
    with pytest.raises(UsageError, match="metric oracle: mine: prompt 'mine/7' has no scene"):
        OracleAccuracy(make_context(mixed, tmp_path))
    with pytest.raises(UsageError, match="reads 64 px images; this model makes 512 px"):
        OracleAccuracy(make_context(context.prompts, tmp_path, resolution=512))
    with pytest.raises(UsageError, match="none: the oracle's classifiers are missing; make them with: python -m tools"):
        OracleAccuracy(make_context(context.prompts, tmp_path, classifiers_folder=tmp_path / "none"))
