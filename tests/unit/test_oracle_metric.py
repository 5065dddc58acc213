"""Oracle metric: the oracle's own shares in per cent, with groups, intervals and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.metrics.oracle import OracleAccuracy
from rgbench.metrics.statistics import wilson_interval
from tests.tiny_models import make_context

NUM = 12


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
