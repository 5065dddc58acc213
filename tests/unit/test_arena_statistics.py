"""Strengths, resamples and agreement against closed forms and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rgbench.arena.statistics import bradley_terry, krippendorff_alpha, resample_counts, resampled_wins


def test_two_models_have_the_closed_form():
    assert bradley_terry(np.array([[0, 30], [10, 0]]), prior=0) == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    half = math.log(30.5 / 10.5) / 2
    assert bradley_terry(np.array([[0, 30], [10, 0]])) == pytest.approx([half, -half])


def test_strengths_solve_the_likelihood_equations():
    """Expected wins are the observed ones: the gradient of the log likelihood is zero."""
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 20, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    strength = bradley_terry(wins, prior=0)
    expected = (wins + wins.T) / (1 + np.exp(strength[None] - strength[:, None]))
    np.fill_diagonal(expected, 0)
    assert expected.sum(1) == pytest.approx(wins.sum(1), rel=1e-8)
    assert strength.sum() == pytest.approx(0, abs=1e-12)


def test_a_model_that_always_wins_has_a_finite_strength():
    found = bradley_terry(np.array([[0, 9, 9], [0, 0, 9], [0, 0, 0]]))
    assert np.isfinite(found).all() and found[0] > found[1] > found[2]


def test_many_tables_are_solved_at_once():
    tables = np.random.default_rng(1).integers(0, 9, (7, 3, 3))
    assert bradley_terry(tables) == pytest.approx(np.stack([bradley_terry(table) for table in tables]), abs=1e-8)


def test_resamples_draw_raters_and_prompts():
    counts = resample_counts(3, 10)
    assert (counts[0].sum(1) == 3).all() and (counts[1].sum(1) == 10).all() and len(counts[0]) == 2000
    wins, raters, prompts = np.arange(8.0).reshape(2, 2, 2), np.array([0, 2]), np.array([1, 1])
    found = resampled_wins(wins, raters, prompts, counts)
    for b in (0, 1999):
        by_hand = sum(counts[0][b, raters[v]] * counts[1][b, prompts[v]] * wins[v] for v in range(2))
        assert (found[b] == by_hand).all()


def test_the_bootstrap_sees_that_votes_on_one_prompt_belong_together():
    """Ten raters who agree on ten prompts are ten facts, not a hundred."""
    prompts, raters = np.repeat(np.arange(10), 10), np.tile(np.arange(10), 10)
    first = (prompts < 5).astype(float)
    wins = np.zeros((100, 2, 2))
    wins[:, 0, 1], wins[:, 1, 0] = first, 1 - first
    found = resampled_wins(wins, raters, prompts, resample_counts(10, 10))[:, 0, 1] / 100
    assert found.std() == pytest.approx(math.sqrt(0.25 / 10), rel=0.1)


# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), sections B and C: 0.095 and 0.743.
TWO = ("0100000010", "1110010000")
FOUR = ("1233214 12...", "1233224 125.3", ".333234 2251.", "1233244 1251.")


def test_agreement_is_krippendorffs():
    assert krippendorff_alpha(list(zip(*TWO, strict=True))) == pytest.approx(0.095, abs=5e-4)
    columns = zip(*(row.replace(" ", "") for row in FOUR), strict=True)
    units = [[answer for answer in unit if answer != "."] for unit in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_agreement_without_two_answers_or_two_values_is_undefined():
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1
