"""Diversity: the definition, mode collapse, and too few images of a prompt."""

from __future__ import annotations

import numpy as np
import pytest

from rgbench.benchtop.scenes import Scenes, render
from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.metrics.probes import diversity
from rgbench.metrics.statistics import jackknife_groups
from rgbench.metrics.values import metric_info
from tests.probing import measure
from tests.tiny_models import make_context


def test_pairwise_distance_equals_the_double_loop():
    x = np.random.default_rng(0).normal(size=(5, 7))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert diversity.mean_pairwise_distance(x) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert diversity.mean_pairwise_distance(np.repeat(x[:1], 4, 0)) == pytest.approx(0, abs=1e-12)
    assert diversity.mean_pairwise_distance(np.zeros((3, 7))) == 1


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    base = benchtop_prompts(2).prompts
    prompts = tuple(Prompt(f"{p.id}#{i}", p.text, p.group, p.scene) for p in base for i in range(8))
    return make_context(PromptSet("repeated", prompts), tmp_path_factory.mktemp("cache"))


def test_diversity_sees_mode_collapse(repeated):
    scenes = Scenes.from_dicts([prompt.scene for prompt in repeated.prompts.prompts])
    varied = render(scenes, "all", range(16))
    (clean,) = measure(diversity.Diversity, repeated, varied).values()
    collapsed = varied[[0] * 8 + [8] * 8]
    (hacked,) = measure(diversity.Diversity, repeated, collapsed).values()
    assert hacked.extra["level"] == pytest.approx(0, abs=1e-3) and hacked.value == pytest.approx(-hacked.extra["real"])
    assert clean.extra["level"] > 0.5 and abs(clean.value) < -hacked.value
    assert metric_info(clean.metric).direction == "higher" and len(hacked.extra["jackknife"]) == 2


def test_the_jackknife_leaves_out_one_prompts_images(repeated):
    scenes = Scenes.from_dicts([prompt.scene for prompt in repeated.prompts.prompts])
    collapsed = render(scenes, "all", range(16))[[0] * 8 + list(range(8, 16))]
    (found,) = measure(diversity.Diversity, repeated, collapsed).values()
    left, groups = found.extra["jackknife"], jackknife_groups(2)
    assert left[groups[0]] > left[groups[1]], "without the collapsed prompt the images are diverse"
    assert sum(left) / 2 == pytest.approx(found.value)


def test_diversity_needs_eight_images_of_a_prompt(tmp_path):
    with pytest.raises(UsageError, match="at least 8 images of each prompt, not 1; give --seeds 0-7"):
        diversity.Diversity(make_context(benchtop_prompts(2), tmp_path))
